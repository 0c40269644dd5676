"""The client's calls about hosts and their guests. A module of its own, so that migrations need not import it."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

import grpc.aio
from google.protobuf.field_mask_pb2 import FieldMask

from agent.runtime.errors import Reason
from agent.service.channel import all_pages
from coordinator.client.errors import ServerFailed, no_such_host
from coordinator.client.host_types import Domain, DomainList, Host, Slot
from drover.agent.v1 import admission_pb2, admission_pb2_grpc, host_pb2, host_pb2_grpc
from drover.coordinator.v1 import host_pb2 as cluster_pb2
from drover.coordinator.v1 import host_pb2_grpc as cluster_pb2_grpc

T = TypeVar("T")


class HostQuestions:
    """The calls of `HostCalls`, to a coordinator or to one agent; the first one finds out which of the two it is.

    `call` awaits a gRPC call and raises its errors as those of the client.
    """

    def __init__(
        self, channel: grpc.aio.Channel, address: str, timeout: float, call: Callable[[Awaitable[Any]], Awaitable[Any]]
    ) -> None:
        self._cluster = cluster_pb2_grpc.HostServiceStub(channel)
        self._hosts = host_pb2_grpc.HostServiceStub(channel)
        self._slots = admission_pb2_grpc.AdmissionServiceStub(channel)
        self._call = call
        self.address = address
        self.timeout = timeout
        self._is_agent = False

    async def list_hosts(self) -> list[Host]:
        pages = await self._cluster_pages(self._cluster.ListHosts, cluster_pb2.ListHostsRequest())
        if pages is None:
            return [await self._agent_host()]
        return [Host.from_proto(host) for page in pages for host in page.hosts]

    async def get_host(self, name: str) -> Host:
        response = await self._ask_cluster(self._cluster.GetHost, cluster_pb2.GetHostRequest(name=name))
        return Host.from_proto(response.host) if response is not None else await self._agent_host(name)

    async def remove_host(self, name: str) -> None:
        await self._call(self._cluster.RemoveHost(cluster_pb2.RemoveHostRequest(name=name), timeout=self.timeout))

    async def list_domains(self, host: str = "") -> DomainList:
        pages = await self._cluster_pages(self._cluster.ListDomains, cluster_pb2.ListDomainsRequest(host=host))
        return DomainList.from_proto(pages) if pages is not None else await self._agent_domains(host)

    async def update_host(self, name: str, changes: Mapping[str, Any], changed_by: str, comment: str) -> Host:
        """`changes`: by field of `HostSettings`; "default" resets it."""
        settings = host_pb2.HostSettings(**{field: value for field, value in changes.items() if value != "default"})
        change = host_pb2.SettingsChange(changed_by=changed_by, comment=comment)
        update = host_pb2.UpdateHostRequest(settings=settings, update_mask=FieldMask(paths=changes), change=change)
        response = await self._ask_cluster(self._cluster.UpdateHost, cluster_pb2.UpdateHostRequest(name=name, update=update))
        if response is not None:
            return Host.from_proto(response.host)
        await self._agent_host(name)
        changed = await self._call(self._hosts.UpdateHost(update, timeout=self.timeout))
        return Host.of_agent(changed.host, self.address)

    async def list_slots(self, host: str) -> list[Slot]:
        pages = await self._cluster_pages(self._cluster.ListSlots, cluster_pb2.ListSlotsRequest(name=host))
        if pages is None:
            await self._agent_host(host)
            pages = await self._pages(self._slots.ListSlots, admission_pb2.ListSlotsRequest())
        slots = [Slot.from_proto(slot) for page in pages for slot in page.slots]
        return sorted(slots, key=lambda slot: (slot.direction, slot.waiting, slot.position))

    async def update_domain(self, domain: str, changes: Mapping[str, Any], host: str) -> Domain:
        """`changes`: by field of `DomainSettings`; an empty value removes it."""
        settings = host_pb2.DomainSettings(**changes)
        update = host_pb2.UpdateDomainRequest(domain=domain, settings=settings, update_mask=FieldMask(paths=changes))
        response = await self._ask_cluster(self._cluster.UpdateDomain, cluster_pb2.UpdateDomainRequest(host=host, update=update))
        if response is not None:
            return Domain.from_proto(response.domain)
        here = await self._agent_host(host)
        changed = await self._call(self._hosts.UpdateDomain(update, timeout=self.timeout))
        return Domain.from_proto(cluster_pb2.PlacedDomain(host=here.name, domain=changed.domain))

    async def _ask_cluster(self, method: Any, request: Any) -> Any | None:
        """Return a coordinator's answer; None from an agent, which does not serve the coordinator's service."""
        return await self._unless_agent(lambda: self._call(method(request, timeout=self.timeout)))

    async def _cluster_pages(self, method: Any, request: Any) -> list[Any] | None:
        """Return all pages of a coordinator's answer; None from an agent."""
        return await self._unless_agent(lambda: self._pages(method, request))

    async def _unless_agent(self, ask: Callable[[], Awaitable[T]]) -> T | None:
        if not self._is_agent:
            try:
                return await ask()
            except ServerFailed as error:
                if error.reason != Reason.UNIMPLEMENTED:
                    raise
                self._is_agent = True
        return None

    async def _agent_host(self, name: str = "") -> Host:
        response = await self._call(self._hosts.GetHost(host_pb2.GetHostRequest(), timeout=self.timeout))
        if name not in ("", response.host.name):
            raise no_such_host(name, response.host.name, self.address)
        return Host.of_agent(response.host, self.address)

    async def _agent_domains(self, host: str) -> DomainList:
        here = await self._agent_host(host)
        pages = await self._pages(self._hosts.ListDomains, host_pb2.ListDomainsRequest())
        return DomainList.of_agent(here.name, [domain for page in pages for domain in page.domains])

    async def _pages(self, method: Any, request: Any) -> list[Any]:
        return [page async for page in all_pages(lambda page: self._call(method(page, timeout=self.timeout)), request)]
