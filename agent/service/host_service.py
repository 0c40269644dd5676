"""`drover.agent.v1.HostService`: what an agent knows of its host. The servicer, and how hypervisor words read on the wire."""

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio

from agent.handshake.host.stopwatch import timed
from agent.hypervisor.base import Domain, DomainState, HypervisorError, Requirements
from agent.hypervisor.features import from_hypervisor
from agent.runtime.errors import DroverError
from agent.runtime.paging import Paging
from agent.runtime.wire import cut, duration
from agent.service.host import AgentHost
from drover.agent.v1 import host_pb2 as pb
from drover.agent.v1 import host_pb2_grpc as rpc

SERVICE = pb.DESCRIPTOR.services_by_name["HostService"].full_name

_Context = grpc.aio.ServicerContext[Any, Any]


class HostServicer(rpc.HostServiceServicer):
    """Serves this host."""

    def __init__(self, host: AgentHost) -> None:
        self._host = host

    async def GetHost(self, request: pb.GetHostRequest, context: _Context) -> pb.GetHostResponse:  # noqa: N802
        return pb.GetHostResponse(host=self._host.describe())

    async def WatchHost(self, request: pb.WatchHostRequest, context: _Context) -> AsyncIterator[pb.WatchHostResponse]:  # noqa: N802
        repeat_seconds = request.repeat_interval.ToNanoseconds() / 1e9
        async with contextlib.aclosing(self._host.watch(request.coordinator, repeat_seconds)) as hosts:
            async for host in hosts:
                response = pb.WatchHostResponse(host=host)
                response.send_time.GetCurrentTime()
                yield response

    async def ListDomains(self, request: pb.ListDomainsRequest, context: _Context) -> pb.ListDomainsResponse:  # noqa: N802
        try:
            domains = await self._host.hypervisor.list_domains()
        except HypervisorError as error:
            raise from_hypervisor(error, self._host.name) from None
        found = sorted((domain_to_proto(domain) for domain in domains), key=_identity)
        page = Paging(request, str, str).take((_identity(domain), domain) for domain in found)
        return pb.ListDomainsResponse(domains=page.items, next_page_token=page.token)

    async def GetDomain(self, request: pb.GetDomainRequest, context: _Context) -> pb.GetDomainResponse:  # noqa: N802
        return await get_domain(self._host, request)


def _identity(domain: pb.Domain) -> tuple[str, str]:
    return domain.name, domain.uuid


async def get_domain(host: AgentHost, request: pb.GetDomainRequest) -> pb.GetDomainResponse:
    """The guest and, when it runs, what it needs, and what keeps it from leaving if that is asked."""
    with timed("plan") as watch:
        try:
            domain, needs = await host.hypervisor.describe(request.domain)
        except HypervisorError as error:
            raise from_hypervisor(error, host.name, request.domain) from None
        response = pb.GetDomainResponse(domain=domain_to_proto(domain))
        if domain.state in (DomainState.RUNNING, DomainState.PAUSED):
            response.requirements.CopyFrom(requirements_to_proto(needs))
            if request.HasField("leaving"):
                try:
                    await host.engine.check_leaving(domain, request.leaving)
                except DroverError as error:
                    response.obstacle.CopyFrom(obstacle_to_proto(error))
    response.hypervisor_duration.CopyFrom(duration(watch.timing.hypervisor))
    return response


def obstacle_to_proto(error: DroverError) -> pb.Obstacle:
    metadata = {key: cut(value, 1024) for key, value in error.metadata.items()}
    return pb.Obstacle(reason=error.reason, message=cut(error.message, 4096), metadata=metadata)


def domain_to_proto(domain: Domain) -> pb.Domain:
    return pb.Domain(
        name=domain.name,
        uuid=domain.uuid,
        state=pb.DomainState.Value(f"DOMAIN_STATE_{domain.state.name}"),
        reason=domain.reason,
        memory_bytes=domain.memory_bytes,
        vcpus=domain.vcpus,
        persistent=domain.persistent,
        job=domain.job.value,
        silence=duration(domain.silent_for) if domain.silent_for else None,
        running_version=domain.running_version,
        installed_version=domain.installed_version,
    )


def requirements_to_proto(requirements: Requirements) -> pb.GuestRequirements:
    return pb.GuestRequirements(
        name=requirements.name,
        uuid=requirements.uuid,
        memory_bytes=requirements.memory_bytes,
        vcpus=requirements.vcpus,
        arch=requirements.arch,
        machine=requirements.machine,
        virt_type=requirements.virt_type,
        cpu=requirements.cpu,
        host_cpu=requirements.host_cpu,
    )
