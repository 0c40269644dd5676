"""What the kernel says of this host's own addresses."""

import socket
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final

_DISCARD: Final = 9
"""A port; nothing is sent to it."""


def is_own(address: IPv4Address | IPv6Address) -> bool:
    """Whether the kernel delivers what is sent to that address to this host itself.

    It routes the address of a connected datagram socket, and sends nothing. For a local address the source that it chooses is that
    address. (Whether it can be bound says less: ``net.ipv4.ip_nonlocal_bind`` allows that for any address.)
    """
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((str(address), _DISCARD))
            return ip_address(probe.getsockname()[0]).packed == address.packed  # Python leaves the scope out
        except OSError:
            return False  # no route, no such scope, a broadcast address
