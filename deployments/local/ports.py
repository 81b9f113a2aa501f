"""Ports of this machine: taken before anything starts, or refused with a remedy."""

import errno
import socket


class PortError(Exception):
    """A port that cannot be had; the message names the remedy."""


def listen(host: str, port: int, what: str, option: str) -> socket.socket:
    """A listening socket.

    Raises PortError naming the port, what it is for and the option that changes it.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen(128)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            reason = f"port {port} ({what}) is in use on {host}"
        else:
            reason = f"port {port} ({what}) cannot be opened on {host}: {error.strerror}"
        raise PortError(f"{reason}; stop what listens there, or choose another with {option}") from None
    return sock


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that are free now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [sock.getsockname()[1] for sock in sockets]
    finally:
        for sock in sockets:
            sock.close()
