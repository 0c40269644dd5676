"""Migration URIs: read with suspicion, because they come from a peer."""

from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Self
from urllib.parse import urlsplit

from agent.hypervisor.base import HypervisorError

MAX_URI = 1024


@dataclass(frozen=True)
class Address:
    scheme: str
    host: str
    """An IP address."""
    port: int
    """0: none was said."""

    @classmethod
    def parse(cls, uri: str, schemes: Sequence[str]) -> Self:
        """Raises `HypervisorError` for all but ``scheme://address[:port]``."""
        if len(uri) > MAX_URI:
            raise HypervisorError(f"migration URI of {len(uri)} characters, at most {MAX_URI} are taken")
        try:
            parts = urlsplit(uri)
            port, host = parts.port or 0, str(ip_address(parts.hostname or ""))
        except ValueError as error:
            raise HypervisorError(f"migration URI {uri!r}: {error}") from error
        if parts.scheme not in schemes:
            raise HypervisorError(f"migration URI {uri!r}: only {', '.join(schemes)} are supported")
        if parts.username or parts.path.strip("/") or parts.query or parts.fragment:
            raise HypervisorError(f"migration URI {uri!r}: only an address and a port are taken")
        return cls(parts.scheme, host, port)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}" + (f":{self.port}" if self.port else "")
