"""The client's calls about the cluster's networks, and what they return. Migrations need not import this module."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypedDict, Unpack

import grpc.aio
from google.protobuf.field_mask_pb2 import FieldMask

from agent.service.channel import all_pages
from coordinator.client.convert import FromWire, wire
from drover.agent.v1 import host_pb2
from drover.coordinator.v1 import network_pb2 as pb
from drover.coordinator.v1 import network_pb2_grpc


@dataclass(frozen=True, kw_only=True)
class ClusterNetwork(FromWire):
    """A network of the cluster. Rates in bytes per second; 0: none, or as the interfaces report."""

    name: str
    migration_role: bool
    revoking: bool
    """Its role is being taken: no new migration takes it."""
    cidrs: tuple[str, ...] = wire("rules.cidrs")
    tenants: tuple[str, ...] = wire("rules.tenants")
    capacity: int = wire("rules.capacity_bytes_per_second")
    cap: int = wire("rules.cap_bytes_per_second")
    """Of all migrations together."""
    max_bandwidth: int = wire("rules.max_bytes_per_second")
    """Of one migration."""
    default_bandwidth: int = wire("rules.default_bytes_per_second")
    """Of a migration that names none."""
    fallback: bool = wire("rules.fallback")
    proto: pb.Network = field(repr=False, compare=False)


@dataclass(frozen=True, kw_only=True)
class NetworkHost(FromWire):
    """A host on a network."""

    host: str
    address: str = wire("network.address")
    interface: str = wire("network.interface")
    mtu: int = wire("network.mtu")
    line_rate: int = wire("network.line_bytes_per_second")
    down: bool = wire("network.down")
    out_rate: int = wire("out_bytes_per_second")
    in_rate: int = wire("in_bytes_per_second")


@dataclass(frozen=True, kw_only=True)
class NetworkDetails(FromWire):
    """A network with its hosts, and the migrations that use it."""

    network: ClusterNetwork
    hosts: tuple[NetworkHost, ...]
    migration_ids: tuple[str, ...]
    proto: pb.GetNetworkResponse = field(repr=False, compare=False)


class Rules(TypedDict, total=False):
    """Rules of a network; a missing one is left as it is. Rates in bytes per second; 0 takes one away."""

    cidrs: Sequence[str]
    """Ranges of its addresses, such as "10.92.0.0/24"; they overlap with those of no other network."""
    tenants: Sequence[str]
    """Tenants whose guests may use it; none: all guests."""
    capacity: int
    """Speed of each host's line, in place of what its interface reports."""
    cap: int
    """Most of all migrations together."""
    max_bandwidth: int
    """Most of one migration."""
    default_bandwidth: int
    """Limit of a migration that names none."""
    fallback: bool
    """It carries guests' memory, with a warning, where no network with the migration role can."""


_FIELDS = {
    rule.name: rule.metadata["wire"][0].removeprefix("rules.")
    for rule in fields(ClusterNetwork)
    if rule.name in Rules.__annotations__
}


class Networks:
    """The cluster's networks; an agent does not serve these calls. `call` awaits a gRPC call and raises its errors as those of the
    client. Each method raises `Unreachable`, and `NotFound` where a network is named.
    """

    def __init__(self, channel: grpc.aio.Channel, timeout: float, call: Callable[[Awaitable[Any]], Awaitable[Any]]) -> None:
        self._stub = network_pb2_grpc.NetworkServiceStub(channel)
        self._timeout = timeout
        self._call = call

    async def list(self) -> list[ClusterNetwork]:
        """Return the networks of the cluster, by name."""
        pages = all_pages(lambda page: self._ask(self._stub.ListNetworks, page), pb.ListNetworksRequest())
        return [ClusterNetwork.from_proto(network) async for page in pages for network in page.networks]

    async def get(self, name: str) -> NetworkDetails:
        """Return a network, its hosts, and the migrations that use it."""
        return NetworkDetails.from_proto(await self._ask(self._stub.GetNetwork, pb.GetNetworkRequest(name=name)))

    async def add(self, name: str, *, migration_role: bool = False, **rules: Unpack[Rules]) -> ClusterNetwork:
        """Add a network to the cluster. Raises `InvalidRequest`, `Refused`."""
        network = pb.Network(name=name, migration_role=migration_role, rules=host_pb2.NetworkRules(**_wired(rules)))
        return await self._changed(self._stub.CreateNetwork, pb.CreateNetworkRequest(network=network))

    async def set(self, name: str, **rules: Unpack[Rules]) -> ClusterNetwork:
        """Change the given rules of a network. Raises `InvalidRequest`, `Refused`."""
        given = _wired(rules)
        request = pb.UpdateNetworkRequest(name=name, rules=host_pb2.NetworkRules(**given), update_mask=FieldMask(paths=given))
        return await self._changed(self._stub.UpdateNetwork, request)

    async def grant(self, name: str) -> ClusterNetwork:
        """Give a network the migration role. Raises `Refused`."""
        return await self._changed(self._stub.GrantRole, pb.GrantRoleRequest(name=name))

    async def revoke(self, name: str, *, drain: bool = False) -> ClusterNetwork:
        """Take the role from a network. Raises `Refused` if a migration uses it; with `drain`, the role goes once none does."""
        return await self._changed(self._stub.RevokeRole, pb.RevokeRoleRequest(name=name, drain=drain))

    async def remove(self, name: str) -> None:
        """Remove a network that no migration uses. Raises `Refused`."""
        await self._ask(self._stub.DeleteNetwork, pb.DeleteNetworkRequest(name=name))

    async def _changed(self, method: Any, request: Any) -> ClusterNetwork:
        return ClusterNetwork.from_proto((await self._ask(method, request)).network)

    async def _ask(self, method: Any, request: Any) -> Any:
        return await self._call(method(request, timeout=self._timeout))


def _wired(rules: Rules) -> dict[str, Any]:
    return {_FIELDS[name]: value for name, value in rules.items()}
