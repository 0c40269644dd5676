"""Migration URIs: ``tcp://10.92.0.2:49152``. One reader and one normal form, for whatever a user or a peer writes."""

import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final, Self

MAX_URI: Final = 1024

_URI: Final = re.compile(r"(?P<scheme>[A-Za-z]+)://(?P<host>\[[0-9A-Za-z:.%_-]+\]|[0-9.]+)(:(?P<port>[0-9]{0,5}))?/?", re.ASCII)


@dataclass(frozen=True)
class MigrationUri:
    """Where a destination listens for the memory of a guest. Equal for every spelling of one address."""

    scheme: str
    """In lower case."""
    host: IPv4Address | IPv6Address
    port: int = 0
    """0: none was said; the destination chooses one."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Takes ``SCHEME://ADDRESS[:PORT]`` and nothing else. Raises `ValueError` with a sentence for a person."""
        match = _URI.fullmatch(text) if len(text) <= MAX_URI else None
        if match is None:
            raise ValueError("only SCHEME://ADDRESS[:PORT] is taken, with an IP address (IPv6 in brackets)")
        host, port = match["host"], int(match["port"] or 0)
        if port > 65535:
            raise ValueError(f"{port} is no port")
        try:
            address = ip_address(host.removeprefix("[").removesuffix("]"))
        except ValueError:
            raise ValueError(f"{host} is no IP address") from None
        if (address.version == 6) != host.startswith("["):
            raise ValueError("brackets belong around an IPv6 address, and only there")
        return cls(match["scheme"].lower(), address, port)

    def __str__(self) -> str:
        """The normal form."""
        host = f"[{self.host}]" if self.host.version == 6 else str(self.host)
        return f"{self.scheme}://{host}" + (f":{self.port}" if self.port else "")


def address_problem(address: IPv4Address | IPv6Address) -> str:
    """Why that address leads no other host to this one, whoever has it; empty where it may."""
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
    """Whether a text is that address, however it is spelled; False for what is none."""
    try:
        return ip_address(one) == other
    except ValueError:
        return False
