"""The agent's configuration file; read it with `agent.runtime.configuration.load`."""

import ipaddress
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import msgspec

from agent.migration.fencing import FencingConfig
from agent.network.rules import check_apart, checked
from agent.network.uri import address_problem
from agent.runtime.address import parse_address
from agent.runtime.config_errors import KeyProblem
from agent.runtime.configuration import Name, Port, check_address, check_listen, check_path, check_unique
from agent.runtime.errors import DroverError
from agent.runtime.log import LogLevel
from agent.runtime.wire import MOST_RATE
from drover.agent.v1 import host_pb2

Rate = Annotated[int, msgspec.Meta(ge=0, le=MOST_RATE)]
"""Bytes per second."""


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
    """``[[networks]]``: a network of this host, for migrations without a coordinator, and where that has no network of its name or
    range. The rates and tenants mean what they do in `drover.agent.v1.NetworkRules`."""

    name: Name
    """The same on every host of the cluster."""
    address: str = ""
    """This host's IP address on it. Empty: that of its interface in `cidrs`."""
    cidrs: Annotated[tuple[str, ...], msgspec.Meta(max_length=16)] = ()
    """Ranges of its addresses, the same on every host. Empty: `address` says it."""
    roles: tuple[Literal["migration", "management"], ...] = ("migration",)
    """``migration``: the network may carry guests' memory."""
    line_bytes_per_second: Rate = 0
    """Speed of the line. 0: as its interface reports."""
    tenants: Annotated[tuple[Name, ...], msgspec.Meta(max_length=256)] = ()
    cap_bytes_per_second: Rate = 0
    max_bytes_per_second: Rate = 0
    default_bytes_per_second: Rate = 0
    fallback: bool = False

    def __post_init__(self) -> None:
        if bool(self.address) == bool(self.cidrs):
            raise KeyProblem("address", "expected either the address of this host on the network, or the network's cidrs")
        if self.address:
            self._check_address()
        try:
            checked(self._rules())
        except DroverError as error:
            key = error.metadata["field"].removeprefix("rules.")
            raise KeyProblem(key, error.violations[0].description) from None

    def _check_address(self) -> None:
        try:
            address = ipaddress.ip_address(self.address)
        except ValueError:
            raise KeyProblem("address", f'expected an IP address, got "{self.address}"') from None
        if address.is_unspecified:
            raise KeyProblem("address", "expected the one address of this host on the network, got the wildcard")

    def _rules(self) -> host_pb2.NetworkRules:
        return host_pb2.NetworkRules(
            cidrs=self.cidrs,
            tenants=self.tenants,
            capacity_bytes_per_second=self.line_bytes_per_second,
            cap_bytes_per_second=self.cap_bytes_per_second,
            max_bytes_per_second=self.max_bytes_per_second,
            default_bytes_per_second=self.default_bytes_per_second,
            fallback=self.fallback,
        )

    def definition(self) -> host_pb2.Network:
        """Return the network without this host's side of it."""
        rules = checked(self._rules())
        return host_pb2.Network(name=self.name, roles=self.roles, line_bytes_per_second=self.line_bytes_per_second, rules=rules)


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
    """Most guests that come in at once. 0: none may. Changed while the agent runs with `drover host set`, as the next two."""
    outgoing_limit: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 2
    """Most guests that leave at once."""
    prepared_limit: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 1
    """Most migrations in each direction that are prepared beside those that transfer."""
    slot_unit_memory: Annotated[int, msgspec.Meta(ge=0, le=2**50)] = 0
    """Memory in bytes for which a guest counts as one in these limits; a bigger guest counts for more. 0: every guest counts as
    one."""
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
        check_unique("networks", [network.name for network in self.networks], "name")
        self._check_apart()
        if self.name in self.peers:
            raise KeyProblem(f"peers.{self.name}", "is this host itself")

    def _check_apart(self) -> None:
        rules = {network.name: network.definition().rules for network in self.networks}
        for index, network in enumerate(self.networks):
            try:
                check_apart(network.name, rules[network.name], rules)
            except DroverError as error:
                key = error.metadata["field"].removeprefix("rules.")
                raise KeyProblem(f"networks[{index}].{key}", f"overlaps a range of network {error.metadata['other']}") from None

    def _check_network_addresses(self) -> None:
        for index, network in enumerate(self.networks):
            if network.address and (problem := address_problem(ipaddress.ip_address(network.address))):
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
