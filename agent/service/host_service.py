"""`drover.agent.v1.HostService`: the host and its guests."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio

from agent.handshake.host.stopwatch import timed
from agent.hypervisor.base import Domain, DomainState
from agent.hypervisor.features import check_bandwidth
from agent.hypervisor.guest_settings import GuestSettings
from agent.hypervisor.reasons import translated
from agent.hypervisor.wire import domain_to_proto, requirements_to_proto, settings_from_proto, settings_to_proto
from agent.runtime.errors import DroverError, invalid_field
from agent.runtime.masks import masked
from agent.runtime.paging import Paging
from agent.runtime.wire import cut, duration
from agent.service.host import AgentHost
from drover.agent.v1 import host_pb2 as pb
from drover.agent.v1 import host_pb2_grpc as rpc

SERVICE = pb.DESCRIPTOR.services_by_name["HostService"].full_name

_Context = grpc.aio.ServicerContext[Any, Any]


class HostServicer(rpc.HostServiceServicer):
    def __init__(self, host: AgentHost) -> None:
        self._host = host
        self._updating = asyncio.Lock()

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
        with translated(self._host.name):
            domains = await self._host.hypervisor.list_domains()
        found = sorted((domain_to_proto(domain) for domain in domains), key=_identity)
        page = Paging(request, str, str).take((_identity(domain), domain) for domain in found)
        return pb.ListDomainsResponse(domains=page.items, next_page_token=page.token)

    async def GetDomain(self, request: pb.GetDomainRequest, context: _Context) -> pb.GetDomainResponse:  # noqa: N802
        return await get_domain(self._host, request)

    async def UpdateDomain(self, request: pb.UpdateDomainRequest, context: _Context) -> pb.UpdateDomainResponse:  # noqa: N802
        async with self._updating:
            return pb.UpdateDomainResponse(domain=domain_to_proto(await update_domain(self._host, request)))

    async def UpdateHost(self, request: pb.UpdateHostRequest, context: _Context) -> pb.UpdateHostResponse:  # noqa: N802
        await self._host.engine.desk.update(request)
        return pb.UpdateHostResponse(host=self._host.describe())


def _identity(domain: pb.Domain) -> tuple[str, str]:
    return domain.name, domain.uuid


async def get_domain(host: AgentHost, request: pb.GetDomainRequest) -> pb.GetDomainResponse:
    """Return the guest; if it runs, also its requirements, and what keeps it from leaving if the request asks that."""
    with timed("plan") as watch:
        with translated(host.name, request.domain):
            domain, needs = await host.hypervisor.describe(request.domain)
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


async def update_domain(host: AgentHost, request: pb.UpdateDomainRequest) -> Domain:
    """Change a guest's own settings. Raises INVALID_FIELD, BANDWIDTH_UNSUPPORTED, DOMAIN_NOT_FOUND, DOMAIN_AMBIGUOUS, DOMAIN_BUSY;
    nothing has changed then."""
    with translated(host.name, request.domain):
        domain, _ = await host.hypervisor.describe(request.domain)
    message = masked(settings_to_proto(domain.settings or GuestSettings()), request.settings, request.update_mask)
    settings = settings_from_proto(message)
    if problem := settings.problem:
        raise invalid_field("settings", f"{problem}. Nothing was changed")
    for rate in (settings.min_bandwidth, settings.max_bandwidth):
        check_bandwidth(rate, host.engine.host.features, host.name)
    with translated(host.name, request.domain):
        return await host.hypervisor.set_settings(domain.uuid, settings)


def obstacle_to_proto(error: DroverError) -> pb.Obstacle:
    metadata = {key: cut(value, 1024) for key, value in error.metadata.items()}
    return pb.Obstacle(reason=error.reason, message=cut(error.message, 4096), metadata=metadata)
