"""Whether Ray can have its own network and process namespace, and the command that gives it one.

Ray listens on all interfaces whatever it is told; in a network namespace with nothing but a
loopback that harms nobody.  The process namespace makes one kill end all of it.
"""

import fcntl
import os
import shutil
import socket
import struct
import subprocess

_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1


def _as_root_there() -> list[str]:
    """Options of unshare(1) for somebody who is not root here."""
    return [] if os.geteuid() == 0 else ["--user", "--map-root-user"]


def network_command() -> list[str]:
    """Prefix that runs a command, in this very process, in a new network namespace."""
    return ["unshare", *_as_root_there(), "--net", "--"]


def process_command() -> list[str]:
    """Prefix that runs a command as process 1 of a new process namespace, which ends with it.

    Shared memory is private too, so that nothing of a killed engine stays in it.
    """
    private_memory = ["sh", "-c", 'mount -t tmpfs tmpfs /dev/shm && exec "$@"', "sh"]
    return ["unshare", "--pid", "--mount-proc", "--fork", "--kill-child", "--", *private_memory]


def why_not() -> str | None:
    """Why no namespaces can be had here; None if they can: it is tried."""
    if shutil.which("unshare") is None:
        return "the program unshare (util-linux) is not installed"
    trial = [*network_command(), *process_command(), "true"]
    try:
        result = subprocess.run(trial, capture_output=True, text=True, timeout=10, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return None if result.returncode == 0 else (result.stderr.strip() or f"unshare ended with {result.returncode}")


def bring_up_loopback() -> None:
    """A new network namespace has its loopback down."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("16sh14x", b"lo", 0)
        (flags,) = struct.unpack("16xh14x", fcntl.ioctl(sock, _SIOCGIFFLAGS, request))
        fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | _IFF_UP))
