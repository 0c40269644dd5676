"""`drover.coordinator.v1.HostService`: the hosts of the cluster on the wire. Errors are raised as `DroverError`; the server's
interceptor translates them."""

from typing import Any

import grpc.aio
from google.protobuf.duration_pb2 import Duration

from coordinator.hosts import HostRegistry
from drover.coordinator.v1 import host_pb2 as pb
from drover.coordinator.v1 import host_pb2_grpc as rpc

SERVICE = pb.DESCRIPTOR.services_by_name["HostService"].full_name

_Context = grpc.aio.ServicerContext[Any, Any]


class HostServicer(rpc.HostServiceServicer):
    """Serves the registry."""

    def __init__(self, registry: HostRegistry) -> None:
        self._registry = registry

    async def RegisterHost(self, request: pb.RegisterHostRequest, context: _Context) -> pb.RegisterHostResponse:  # noqa: N802
        await self._registry.register(request.host, request.agent_address)
        interval = Duration()
        interval.FromNanoseconds(round(self._registry.heartbeat_seconds * 1e9))
        return pb.RegisterHostResponse(heartbeat_interval=interval)

    async def GetHost(self, request: pb.GetHostRequest, context: _Context) -> pb.GetHostResponse:  # noqa: N802
        return pb.GetHostResponse(host=await self._registry.get(request.name))

    async def ListHosts(self, request: pb.ListHostsRequest, context: _Context) -> pb.ListHostsResponse:  # noqa: N802
        return pb.ListHostsResponse(hosts=await self._registry.list_hosts())

    async def ListDomains(self, request: pb.ListDomainsRequest, context: _Context) -> pb.ListDomainsResponse:  # noqa: N802
        found, silent = await self._registry.list_domains(request.host)
        placed = [pb.PlacedDomain(host=host, domain=domain) for host, domain in found]
        placed.sort(key=lambda each: (each.domain.name, each.host))
        return pb.ListDomainsResponse(domains=placed, unreachable_hosts=silent)
