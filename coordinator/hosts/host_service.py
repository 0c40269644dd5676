"""`drover.coordinator.v1.HostService`: the gRPC adapter of the registry. It raises `DroverError`, which the server's interceptor
translates.
"""

from typing import Any, Final

import grpc.aio
from google.protobuf.duration_pb2 import Duration

from agent.migration.migrations import Migrations
from agent.runtime.errors import DroverError, Reason
from agent.runtime.paging import Key, Paging
from coordinator.hosts.guests import find_guest
from coordinator.hosts.hosts import FORWARD_SECONDS, HostRegistry
from drover.agent.v1 import admission_pb2, admission_pb2_grpc, host_pb2_grpc
from drover.agent.v1 import host_pb2 as agent_pb
from drover.coordinator.v1 import host_pb2 as pb
from drover.coordinator.v1 import host_pb2_grpc as rpc

SERVICE = pb.DESCRIPTOR.services_by_name["HostService"].full_name

ASKED_AT_ONCE: Final = 256
"""Number of hosts that are asked for one page of guests."""

_Context = grpc.aio.ServicerContext[Any, Any]


class HostServicer(rpc.HostServiceServicer):
    """The servicer of the registry."""

    def __init__(self, registry: HostRegistry, migrations: Migrations) -> None:
        self._registry = registry
        self._migrations = migrations

    async def RegisterHost(self, request: pb.RegisterHostRequest, context: _Context) -> pb.RegisterHostResponse:  # noqa: N802
        await self._registry.register(request.host, request.agent_address)
        interval = Duration()
        interval.FromNanoseconds(round(self._registry.heartbeat_seconds * 1e9))
        return pb.RegisterHostResponse(heartbeat_interval=interval)

    async def GetHost(self, request: pb.GetHostRequest, context: _Context) -> pb.GetHostResponse:  # noqa: N802
        return pb.GetHostResponse(host=await self._registry.get(request.name))

    async def RemoveHost(self, request: pb.RemoveHostRequest, context: _Context) -> pb.RemoveHostResponse:  # noqa: N802
        ids = self._migrations.active_at(request.name)
        if ids:
            text = f"{request.name} takes part in migration {ids[0]}, which has not ended: `drover migration show {ids[0]}`"
            raise DroverError(Reason.HOST_IN_USE, text, metadata={"host": request.name, "migration_id": ids[0]})
        await self._registry.remove(request.name)
        return pb.RemoveHostResponse()

    async def ListHosts(self, request: pb.ListHostsRequest, context: _Context) -> pb.ListHostsResponse:  # noqa: N802
        paging = Paging(request, str)
        names = [name for name in self._registry.names() if paging.after is None or (name,) > paging.after]
        hosts = await self._registry.list_hosts(names[: paging.size + 1])
        page = paging.take(((known.host.name,), known) for known in hosts)
        return pb.ListHostsResponse(hosts=page.items, next_page_token=page.token)

    async def ListDomains(self, request: pb.ListDomainsRequest, context: _Context) -> pb.ListDomainsResponse:  # noqa: N802
        paging = Paging(request, str, int, str, str)
        names = [name for name in self._registry.names() if paging.after is None or _end_of(name) > paging.after]
        asked = names[:ASKED_AT_ONCE]
        found, silent = await self._registry.list_domains(request.host, asked)
        rows = sorted(((_key(host, domain), host, domain) for host, domain in found), key=lambda row: row[0])
        page = paging.take(
            ((key, pb.PlacedDomain(host=host, domain=domain)) for key, host, domain in rows),
            end=_end_of(asked[-1]) if names[len(asked) :] and not request.host else None,
        )
        unreachable = [name for name in silent if page.end is None or _end_of(name) <= page.end]
        return pb.ListDomainsResponse(domains=page.items, unreachable_hosts=unreachable, next_page_token=page.token)

    async def UpdateHost(self, request: pb.UpdateHostRequest, context: _Context) -> pb.UpdateHostResponse:  # noqa: N802
        return pb.UpdateHostResponse(host=await self._registry.update_host(request.name, request.update))

    async def UpdateDomain(self, request: pb.UpdateDomainRequest, context: _Context) -> pb.UpdateDomainResponse:  # noqa: N802
        looked_for = agent_pb.GetDomainRequest(domain=request.update.domain)
        host = request.host or (await find_guest(self._registry, looked_for, "--host"))[0]

        stub = host_pb2_grpc.HostServiceStub
        answer = await self._registry.forward(host, lambda to: stub(to).UpdateDomain(request.update, timeout=FORWARD_SECONDS))
        return pb.UpdateDomainResponse(domain=pb.PlacedDomain(host=host, domain=answer.domain))

    async def ListSlots(self, request: pb.ListSlotsRequest, context: _Context) -> pb.ListSlotsResponse:  # noqa: N802
        question = admission_pb2.ListSlotsRequest(page_size=request.page_size, page_token=request.page_token)
        stub = admission_pb2_grpc.AdmissionServiceStub
        page = await self._registry.forward(request.name, lambda to: stub(to).ListSlots(question, timeout=FORWARD_SECONDS))
        return pb.ListSlotsResponse(slots=page.slots, next_page_token=page.next_page_token)


def _key(host: str, domain: agent_pb.Domain) -> Key:
    """Return the sort key of a guest among those of the cluster."""
    return host, 0, domain.name, domain.uuid


def _end_of(host: str) -> Key:
    """Return the sort key after every guest of the host and before those of the next one."""
    return host, 1, "", ""
