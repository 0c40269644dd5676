"""Migration URIs, such as ``tcp://10.92.0.2:49152``: one parser and one normal form."""

import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final, Self

MAX_URI: Final = 1024

_URI: Final = re.compile(r"(?P<scheme>[A-Za-z]+)://(?P<host>\[[0-9A-Za-z:.%_-]+\]|[0-9.]+)(:(?P<port>[0-9]{0,5}))?/?", re.ASCII)


@dataclass(frozen=True)
class MigrationUri:
    """The address on which a destination listens for a guest's memory. Equal for every spelling of one address."""

    scheme: str
    """In lower case."""
    host: IPv4Address | IPv6Address
    port: int = 0
    """0: not given; the destination chooses one."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse ``SCHEME://ADDRESS[:PORT]``, and nothing else. Raises `ValueError` with a message for a person."""
        match = _URI.fullmatch(text) if len(text) <= MAX_URI else None
        if match is None:
            raise ValueError("expected SCHEME://ADDRESS[:PORT] with an IP address (IPv6 in brackets)")
        host, port = match["host"], int(match["port"] or 0)
        if port > 65535:
            raise ValueError(f"{port} is not a port")
        try:
            address = ip_address(host.removeprefix("[").removesuffix("]"))
        except ValueError:
            raise ValueError(f"{host} is not an IP address") from None
        if (address.version == 6) != host.startswith("["):
            raise ValueError("brackets belong around an IPv6 address, and only there")
        return cls(match["scheme"].lower(), address, port)

    def __str__(self) -> str:
        """Return the normal form."""
        host = f"[{self.host}]" if self.host.version == 6 else str(self.host)
        return f"{self.scheme}://{host}" + (f":{self.port}" if self.port else "")


def address_problem(address: IPv4Address | IPv6Address) -> str:
    """Return why an address can never lead other hosts to the one that has it; empty if it may."""
    meant = (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address
    if meant.is_unspecified:
        return "is the wildcard"
    if meant.is_loopback:
        return "is loopback, which every host has"
    if meant.is_multicast:
        return "is multicast"
    if meant.is_link_local and getattr(meant, "scope_id", None) is None:
        return "is link-local without a scope"
    return ""


def same_address(one: str, other: IPv4Address | IPv6Address) -> bool:
    """Return whether a text is that address, in any spelling."""
    try:
        return ip_address(one) == other
    except ValueError:
        return False
