"""Addresses of agents and coordinators: ``unix:/path``, ``10.91.0.1:7400`` or ``[fd00::1]:7400``.

Host names are rejected: a name may resolve differently at each look-up, and the address decides where a guest goes."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ipaddress

MAX_SOCKET_PATH = 107
"""Bytes: Linux's limit for the path of a unix socket."""

EXAMPLES = '"10.91.0.1:7400", "[fd00::1]:7400" or "unix:/run/drover/agent.sock"'


@dataclass(frozen=True)
class UnixAddress:
    path: str
    """Absolute, at most 107 bytes."""

    def __str__(self) -> str:
        return f"unix:{self.path}"


@dataclass(frozen=True)
class TcpAddress:
    host: "ipaddress.IPv4Address | ipaddress.IPv6Address"
    port: int
    """0 to 65535; 0 lets the system choose, for listening only."""

    def __str__(self) -> str:
        return f"{self.host}:{self.port}" if self.host.version == 4 else f"[{self.host}]:{self.port}"


Address = UnixAddress | TcpAddress


def parse_address(text: str) -> Address:
    """Return the parsed address. Raises `ValueError` with a message for a person."""
    if text.startswith("unix:"):
        return _unix(text.removeprefix("unix:"))
    import ipaddress  # noqa: PLC0415 - commands that use the local socket start sooner without it

    host, colon, port = text.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError(f'"{text}" is not an address with a port; expected {EXAMPLES}')
    bracketed = host.startswith("[") and host.endswith("]")
    try:
        address = ipaddress.ip_address(host[1:-1] if bracketed else host)
    except ValueError:
        raise ValueError(f'"{host}" is not an IP address; expected {EXAMPLES}') from None
    if bracketed != (address.version == 6):
        raise ValueError(f'"{text}": brackets belong around an IPv6 address, and only there; expected {EXAMPLES}')
    return TcpAddress(address, int(port))


def _unix(path: str) -> UnixAddress:
    # gRPC takes "unix:///run/x" for the same path; keep one spelling, so that addresses can be compared.
    path = path.removeprefix("//") if path.startswith("///") else path
    if not path.startswith("/") or "\0" in path:
        raise ValueError(f'"unix:{path}": the path of a socket must be absolute, such as "unix:/run/drover/agent.sock"')
    if len(path.encode()) > MAX_SOCKET_PATH:
        raise ValueError(f'"unix:{path}": the path of a socket has at most {MAX_SOCKET_PATH} bytes')
    return UnixAddress(path)
