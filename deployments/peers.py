"""How many connections one address may have: no single host takes all that there are."""

from __future__ import annotations

import ipaddress
import os
from collections import Counter

from uvicorn.middleware.proxy_headers import _TrustedHosts

from deployments.config import ConfigError

SETTING = "JENGA_CONNECTIONS_PER_ADDRESS"
"""Variable of a node, or of `jenga serve`."""
_MOST = 1024
_IPV6_BITS = 64
"""Of an IPv6 address: what one host is given; the rest is its own choice."""


def most() -> int:
    """Connections that one address may have; raises ConfigError where the setting is no whole number above zero."""
    told = os.environ.get(SETTING, str(_MOST))
    if not told.isdecimal() or int(told) == 0:
        raise ConfigError(f"{SETTING}: '{told}' is no number of connections; give a whole number above 0, or none")
    return int(told)


class Peers:
    """Open connections by address.  This machine and uvicorn's trusted proxies (FORWARDED_ALLOW_IPS) have no bound."""

    def __init__(self) -> None:
        """Raises what `most` does."""
        self._most = most()
        self._trusted = _TrustedHosts(os.environ.get("FORWARDED_ALLOW_IPS", ""))
        self._open: Counter[str] = Counter()

    def enter(self, host: str | None) -> bool:
        """Whether one more may come; one that came is to `leave`."""
        origin = self._bounded(host)
        if origin is None:
            return True
        if self._open[origin] >= self._most:
            return False
        self._open[origin] += 1
        return True

    def leave(self, host: str | None) -> None:
        """A connection that had entered is over."""
        origin = self._bounded(host)
        if origin is not None:
            self._open[origin] -= 1
            if self._open[origin] <= 0:
                del self._open[origin]

    def _bounded(self, host: str | None) -> str | None:
        """Under what an address is counted, None if it has no bound."""
        address = _address(host)
        if address is None or address.is_loopback or str(address) in self._trusted:
            return None
        return origin(host)


def origin(host: str | None) -> str:
    """What one host cannot have many of: an IPv4 address, an IPv6 /64; as it is what is no address (a Unix socket)."""
    address = _address(host)
    if address is not None and address.version == 6:
        return str(ipaddress.ip_network((address, _IPV6_BITS), strict=False))
    return str(address or host or "")


def _address(host: str | None) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(host or "")
    except ValueError:
        return None
    if address.version == 6 and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address
