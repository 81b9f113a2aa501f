"""Which of Ray's own ports can be reached from outside a private network: they ask for no password."""

import contextlib
import ipaddress
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import psutil

# Where every process of a node listens by default; the rest are found by the process's name.
PORTS = {6379: "GCS", 8265: "Ray dashboard", 8080: "metrics", 10001: "Ray client", 9090: "Prometheus", 3000: "Grafana"}
_RAY = ("raylet", "gcs_server", "ray::", "dashboard", "ray-dashboard")
_REACH_S = 1.0


@dataclass(frozen=True)
class Listener:
    """A listening TCP socket and the name of its process."""

    address: str
    port: int
    process: str


def is_private(address: str) -> bool:
    """Whether an address is for a private network or this machine only."""
    parsed = ipaddress.ip_address(address.partition("%")[0].removeprefix("::ffff:"))
    return parsed.is_private or parsed.is_link_local or parsed.is_loopback


def exposed(listeners: Iterable[Listener], own: Sequence[str], public_ports: Sequence[int] = ()) -> list[str]:
    """`ADDRESS:PORT (what)` of each listener of Ray's, Prometheus' or Grafana's on an address that is not private.

    own: the node's addresses, which a socket on all interfaces listens on.  public_ports: meant to be reached.
    """
    found = set()
    for item in listeners:
        what = PORTS.get(item.port) or (item.process if item.process.startswith(_RAY) else None)
        if what is None or item.port in public_ports:
            continue
        wildcard = ipaddress.ip_address(item.address.partition("%")[0]).is_unspecified
        for address in own if wildcard else [item.address]:
            if not is_private(address):
                found.add(f"{address}:{item.port} ({what})")
    return sorted(found)


def own_addresses() -> list[str]:
    """Addresses of this machine's interfaces."""
    families = (socket.AF_INET, socket.AF_INET6)
    return [item.address for items in psutil.net_if_addrs().values() for item in items if item.family in families]


def own_listeners() -> list[Listener]:
    """Listening TCP sockets of this machine; without a name where the process is somebody else's."""
    found = []
    for item in psutil.net_connections("tcp"):
        if item.status == psutil.CONN_LISTEN and item.laddr:
            name = ""
            with contextlib.suppress(psutil.Error, TypeError):
                name = psutil.Process(item.pid).name()
            found.append(Listener(item.laddr.ip, item.laddr.port, name))
    return found


def reachable(address: str, public_ports: Sequence[int] = ()) -> list[str]:
    """Ports of ``PORTS`` that answer from here at an address that is not private: through every firewall between."""
    if is_private(address):
        return []
    found = []
    for port, what in PORTS.items():
        if port not in public_ports:
            with contextlib.suppress(OSError), socket.create_connection((address, port), timeout=_REACH_S):
                found.append(f"{address}:{port} ({what})")
    return found
