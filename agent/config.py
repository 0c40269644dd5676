"""Configuration files: TOML, checked completely before anything starts; errors name the key and what is expected. `load` reads any
daemon's file; `AgentConfig` is the agent's."""

import ipaddress
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec

from agent.migration.fencing import FencingConfig
from agent.network.uri import address_problem
from agent.runtime.address import TcpAddress, parse_address
from agent.runtime.config_errors import KeyProblem, explain
from agent.runtime.log import LogLevel

T = TypeVar("T", bound=msgspec.Struct)

NAME_PATTERN: Final = r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?\Z"
MAX_NAME: Final = 63

Name = Annotated[
    str,
    msgspec.Meta(
        pattern=NAME_PATTERN,
        max_length=MAX_NAME,
        description='a name: at most 63 of a-z, 0-9, "." and "-", beginning and ending with a letter or digit',
    ),
]
"""Name of a host, a network or a coordinator."""

Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]


class ConfigError(Exception):
    """An invalid configuration; the message names the file, the key and what is expected."""


class LibvirtConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[libvirt]``"""

    uri: str = "qemu:///system"
    """Connection URI of the host's own libvirt."""
    first_port: Port = 49152
    """First port on which this host listens for guests' memory."""
    last_port: Port = 49215
    """Last such port, inclusive."""

    def __post_init__(self) -> None:
        if not self.uri.isprintable() or (":///" not in self.uri and "+unix://" not in self.uri):
            raise KeyProblem("uri", f'expected a local connection such as "qemu:///system", got "{self.uri}"')
        if self.last_port < self.first_port:
            raise KeyProblem("last_port", f"expected at least first_port ({self.first_port}), got {self.last_port}")


class NetworkConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[[networks]]``: a network on which this host has an address."""

    name: Name
    """The same on every host of the cluster."""
    address: str
    """This host's IP address on it."""
    roles: tuple[Literal["migration", "management"], ...] = ("migration",)
    """``migration``: the network may carry guests' memory."""
    line_bytes_per_second: Annotated[int, msgspec.Meta(ge=0, le=10**12)] = 0
    """Speed of the line. 0: unknown."""

    def __post_init__(self) -> None:
        try:
            address = ipaddress.ip_address(self.address)
        except ValueError:
            raise KeyProblem("address", f'expected an IP address, got "{self.address}"') from None
        if address.is_unspecified:
            raise KeyProblem("address", "expected the one address of this host on the network, got the wildcard")


class AgentConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The agent of one host."""

    name: Name
    """Name of this host, unique in the cluster."""
    listen: Annotated[tuple[str, ...], msgspec.Meta(min_length=1, max_length=16)] = ("unix:/run/drover/agent.sock",)
    """Addresses on which the agent serves: ``unix:/path`` or ``ip:port``."""
    advertise: str = ""
    """Address at which others reach this agent. Empty: see `advertised_address`."""
    state_dir: str = "/var/lib/drover/agent"
    """Directory of the journal."""
    hypervisor: Literal["libvirt", "sim"] = "libvirt"
    libvirt: LibvirtConfig = LibvirtConfig()
    sim: dict[str, Any] | None = None
    """Settings of the simulated hypervisor, checked by `agent.hypervisor.sim`."""
    networks: Annotated[tuple[NetworkConfig, ...], msgspec.Meta(max_length=64)] = ()
    incoming_limit: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 2
    """Most incoming migrations at once."""
    lease_seconds: Annotated[float, msgspec.Meta(ge=1, le=3600)] = 30
    """A slot that is not renewed for this long is free again."""
    takeover_after_seconds: Annotated[float, msgspec.Meta(ge=0.1, le=3600)] = 10
    """The source's agent takes over a migration whose driver is silent for this long."""
    coordinator: str = ""
    """Address of the coordinator. Empty: none; the agent serves peer to peer only."""
    peers: dict[Name, str] = {}
    """Addresses of agents by the name of their host, for migrations peer to peer."""
    fencing: FencingConfig | None = None
    """The command that makes sure that an unreachable host is dead. None: only an operator can state it."""
    allow_insecure_tcp: bool = False
    """Serve TCP beyond loopback without encryption and identity. For test networks only."""
    log_level: LogLevel = "info"

    def __post_init__(self) -> None:
        check_listen(self.listen, self.allow_insecure_tcp)
        check_path("state_dir", self.state_dir)
        for key, address in _addresses(self):
            check_address(key, address)
        if self.hypervisor != "sim":
            self._check_network_addresses()
        _check_unique("networks", [network.name for network in self.networks], "name")
        if self.name in self.peers:
            raise KeyProblem(f"peers.{self.name}", "is this host itself")

    def _check_network_addresses(self) -> None:
        for index, network in enumerate(self.networks):
            if problem := address_problem(ipaddress.ip_address(network.address)):
                key = f"networks[{index}].address"
                raise KeyProblem(key, f"{network.address} {problem}; expected the one address of this host on the network")

    def advertised_address(self, listening: Sequence[str] = ()) -> str:
        """Return the address to give to others: `advertise`, else the first TCP address on which it listens, else the first.
        `listening`: the server's actual addresses, if a port 0 may be configured."""
        addresses = tuple(listening) or self.listen
        return str(parse_address(self.advertise or next((a for a in addresses if not a.startswith("unix:")), addresses[0])))


def _addresses(config: AgentConfig) -> Iterator[tuple[str, str]]:
    """Yield the keys and values of addresses that others are called at, or call."""
    yield from ((f"peers.{name}", address) for name, address in config.peers.items())
    optional = {"advertise": config.advertise, "coordinator": config.coordinator}
    yield from ((key, address) for key, address in optional.items() if address)


def check_listen(listen: Sequence[str], allow_insecure_tcp: bool) -> None:
    """Raise `KeyProblem` unless the addresses to listen on are valid and distinct, and no TCP beyond loopback unless allowed."""
    for index, text in enumerate(listen):
        key = f"listen[{index}]"
        address = check_address(key, text, port_zero=True)
        if isinstance(address, TcpAddress) and not address.host.is_loopback and not allow_insecure_tcp:
            raise KeyProblem(
                key,
                f'"{text}" is open to the network, and this version has no mutual TLS; '
                'listen on "unix:/path" or loopback, or set allow_insecure_tcp = true on a network that you trust',
            )
    _check_unique("listen", [text for text in listen if not text.endswith(":0")])


def check_address(key: str, text: str, *, port_zero: bool = False) -> object:
    """Return the parsed address. Raises `KeyProblem`; without `port_zero` also for port 0 and the wildcard, which nobody can
    call."""
    try:
        address = parse_address(text)
    except ValueError as error:
        raise KeyProblem(key, str(error)) from None
    if isinstance(address, TcpAddress) and not port_zero and (address.port == 0 or address.host.is_unspecified):
        raise KeyProblem(key, f'"{text}" cannot be connected to; expected an address of a host, and its port')
    return address


def check_path(key: str, path: str) -> None:
    if not Path(path).is_absolute() or "\0" in path:
        raise KeyProblem(key, f'expected an absolute path, got "{path}"')


def make_state_dir(path: str) -> Path:
    """Create the directory, for its owner only. Raises `ConfigError`."""
    try:
        Path(path).mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"state_dir {path} cannot be created: {error.strerror}") from error
    return Path(path)


def _check_unique(key: str, values: Sequence[str], what: str = "address") -> None:
    for index, value in enumerate(values):
        if value in values[:index]:
            raise KeyProblem(f"{key}[{index}]", f'the {what} "{value}" is listed twice')


def load(path: str | Path, kind: type[T]) -> T:
    """Read a file and check it against `kind`. Raises `ConfigError`."""
    try:
        data = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: is not valid TOML: {error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text: byte {error.start} is wrong") from error
    return convert(data, kind, str(path))


def convert(data: dict[str, Any], kind: type[T], where: str) -> T:
    """Check parsed tables against `kind`. `where`: the file, for the error. Raises `ConfigError`."""
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {explain(error, data, kind)}") from error
