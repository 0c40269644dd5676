"""`drover.coordinator.v1.NetworkService`. It raises `DroverError`, which the server's interceptor translates."""

from ipaddress import ip_address, ip_network
from typing import Any

import grpc.aio

from agent.migration.collection import Collection
from agent.network.rules import checked, on_network
from agent.runtime.bell import first_of
from agent.runtime.errors import DroverError, Reason
from agent.runtime.masks import masked
from agent.runtime.paging import Paging
from coordinator.hosts.hosts import HostRegistry
from coordinator.networks.table import NetworkTable, definition
from drover.agent.v1 import host_pb2 as agent_pb
from drover.agent.v1 import migration_pb2
from drover.coordinator.v1 import network_pb2 as pb
from drover.coordinator.v1 import network_pb2_grpc as rpc

SERVICE = pb.DESCRIPTOR.services_by_name["NetworkService"].full_name

_Context = grpc.aio.ServicerContext[Any, Any]


class NetworkServicer(rpc.NetworkServiceServicer):
    """After each change, what waits for its slot chooses its network again; the table's bell gives the others new shares."""

    def __init__(self, table: NetworkTable, registry: HostRegistry, collection: Collection) -> None:
        self._table = table
        self._registry = registry
        self._collection = collection

    async def CreateNetwork(self, request: pb.CreateNetworkRequest, context: _Context) -> pb.CreateNetworkResponse:  # noqa: N802
        network = await self._table.create(request.network)
        self._collection.plan_again()
        return pb.CreateNetworkResponse(network=network)

    async def GetNetwork(self, request: pb.GetNetworkRequest, context: _Context) -> pb.GetNetworkResponse:  # noqa: N802
        network = self._table.get(request.name)
        using = self._collection.using(network.name)
        hosts = [
            pb.NetworkHost(
                host=known.host.name,
                network=_without_rules(side),
                out_bytes_per_second=sum(m.allotted_bytes_per_second for m in using if m.source_host == known.host.name),
                in_bytes_per_second=sum(m.allotted_bytes_per_second for m in using if m.destination_host == known.host.name),
            )
            for known in await self._registry.list_hosts()
            for side in on_network(definition(network), known.host.interfaces)
        ]
        return pb.GetNetworkResponse(network=network, hosts=hosts[:4096], migration_ids=[m.migration_id for m in using][:4096])

    async def ListNetworks(self, request: pb.ListNetworksRequest, context: _Context) -> pb.ListNetworksResponse:  # noqa: N802
        page = Paging(request, str).take(((network.name,), network) for network in self._table.all())
        return pb.ListNetworksResponse(networks=page.items, next_page_token=page.token)

    async def UpdateNetwork(self, request: pb.UpdateNetworkRequest, context: _Context) -> pb.UpdateNetworkResponse:  # noqa: N802
        def change(network: pb.Network) -> None:
            rules = masked(network.rules, request.rules, request.update_mask)
            network.rules.CopyFrom(rules)
            if "cidrs" in request.update_mask.paths:
                self._check_ranges(network.name, rules)
            if "tenants" in request.update_mask.paths:
                self._check_tenants(network.name, rules)

        network = await self._table.change(request.name, change, "changed")
        self._collection.set_rules(network.name, network.rules)
        self._collection.plan_again()
        return pb.UpdateNetworkResponse(network=network)

    async def DeleteNetwork(self, request: pb.DeleteNetworkRequest, context: _Context) -> pb.DeleteNetworkResponse:  # noqa: N802
        def check() -> None:
            if using := self._collection.using(request.name):
                raise _in_use(request.name, using, "it cannot be removed")

        await self._table.remove(request.name, check)
        self._collection.plan_again()
        return pb.DeleteNetworkResponse()

    async def GrantRole(self, request: pb.GrantRoleRequest, context: _Context) -> pb.GrantRoleResponse:  # noqa: N802
        def change(network: pb.Network) -> None:
            if network.migration_role and not network.revoking:
                text = f"network {network.name} has the migration role already; nothing was changed"
                raise DroverError(Reason.ROLE_ALREADY_GRANTED, text, metadata={"network": network.name})
            network.migration_role, network.revoking = True, False

        network = await self._table.change(request.name, change, "role granted")
        self._collection.plan_again()
        return pb.GrantRoleResponse(network=network)

    async def RevokeRole(self, request: pb.RevokeRoleRequest, context: _Context) -> pb.RevokeRoleResponse:  # noqa: N802
        def change(network: pb.Network) -> None:
            if not network.migration_role or network.revoking:
                state = "is losing the migration role already" if network.revoking else "does not have the migration role"
                text = f"network {network.name} {state}; nothing was changed"
                raise DroverError(Reason.ROLE_NOT_GRANTED, text, metadata={"network": network.name})
            using = self._collection.using(network.name)
            if using and not request.drain:
                raise _in_use(network.name, using, "its role cannot be taken now; with --drain, it is once they have ended")
            network.migration_role = network.revoking = bool(using)

        network = await self._table.change(request.name, change, "role revoked")
        self._collection.plan_again()
        return pb.RevokeRoleResponse(network=network)

    def _check_ranges(self, name: str, rules: agent_pb.NetworkRules) -> None:
        """Raise NETWORK_IN_USE if a migration uses an address of the network that is no longer in its ranges; as `checked`."""
        ranges = [ip_network(cidr) for cidr in checked(rules).cidrs]
        left = [
            m
            for m in self._collection.using(name)
            for address in (m.network_choice.source_address, m.network_choice.destination_address)
            if address and not any(ip_address(address) in cidr for cidr in ranges)
        ]
        if left:
            raise _in_use(name, left, "the range of their addresses cannot be taken away")

    def _check_tenants(self, name: str, rules: agent_pb.NetworkRules) -> None:
        """Raise NETWORK_IN_USE if a migration uses the network whose guest is not of these tenants."""
        left = [m for m in self._collection.using(name) if rules.tenants and m.tenant not in rules.tenants]
        if left:
            raise _in_use(name, left, "it cannot be closed to their guests")


def _without_rules(side: agent_pb.Network) -> agent_pb.Network:
    side.ClearField("rules")  # they are those of the network
    return side


def _in_use(name: str, using: list[migration_pb2.Migration], what: str) -> DroverError:
    ids = sorted({m.migration_id for m in using})
    users = f"migration {ids[0]}" if len(ids) == 1 else f"{len(ids)} migrations, such as {ids[0]}"
    text = f"network {name} is used by {users}, so {what}. Nothing was changed"
    return DroverError(Reason.NETWORK_IN_USE, text, metadata={"network": name, "migration_id": ids[0], "count": str(len(ids))})


async def finish_revoking(table: NetworkTable, migrations: Collection) -> None:
    """Take the migration role of networks that are drained, once no migration uses them; for ever, also after a restart."""
    while True:
        changed = (table.changed.next, migrations.changed.next)
        for network in table.all():
            if network.revoking and not migrations.using(network.name):
                await _finish(table, network.name)
        await first_of(*changed)


async def _finish(table: NetworkTable, name: str) -> None:
    def take(network: pb.Network) -> None:
        if network.revoking:  # else it was granted again meanwhile
            network.migration_role = network.revoking = False

    try:
        await table.change(name, take, "role revoked")
    except DroverError as error:
        if error.reason is not Reason.NETWORK_NOT_FOUND:
            raise  # the store does not answer: supervision tries again
