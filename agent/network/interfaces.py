"""Queries to the kernel about this host's own addresses."""

import socket
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final

_DISCARD: Final = 9
"""Any port: nothing is sent to it."""


def is_own(address: IPv4Address | IPv6Address) -> bool:
    """Return whether the kernel delivers what is sent to that address to this host itself.

    For a local address the kernel chooses the same address as the source. (A bind proves less: ``net.ipv4.ip_nonlocal_bind`` allows
    it for any address.)"""
    source = source_towards(address)
    return source is not None and source.packed == address.packed


def source_towards(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address | None:
    """Return the address, without a scope, from which the kernel sends to that address unless it is told otherwise. None: it has no
    route, or no such scope; a broadcast address.

    Connects a datagram socket, which sends nothing."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((str(address), _DISCARD))
        except OSError:
            return None
        return ip_address(probe.getsockname()[0])  # Python leaves the scope out
