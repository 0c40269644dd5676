"""The client's calls about hosts and their guests. A module of its own, so that migrations need not import it."""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import grpc.aio
from google.protobuf.field_mask_pb2 import FieldMask

from agent.runtime.errors import Reason
from agent.service.channel import all_pages
from coordinator.client.errors import ServerFailed, no_such_host
from coordinator.client.host_types import Domain, DomainList, Host, Slot
from drover.agent.v1 import admission_pb2, admission_pb2_grpc, host_pb2, host_pb2_grpc
from drover.coordinator.v1 import host_pb2 as cluster_pb2
from drover.coordinator.v1 import host_pb2_grpc as cluster_pb2_grpc


class HostQuestions:
    """Queries about hosts, to a coordinator or to one agent; the first query finds out which of the two it is.

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
        """Return every host of the cluster, by name; an agent knows only its own."""
        if not self._is_agent:
            try:
                pages = self._pages(self._cluster.ListHosts, cluster_pb2.ListHostsRequest())
                return [Host.from_proto(host) async for page in pages for host in page.hosts]
            except ServerFailed as error:
                self._note_agent(error)
        return [await self._agent_host()]

    async def get_host(self, name: str) -> Host:
        """Return the host. Raises `NotFound`."""
        if not self._is_agent:
            try:
                request = cluster_pb2.GetHostRequest(name=name)
                response = await self._call(self._cluster.GetHost(request, timeout=self.timeout))
            except ServerFailed as error:
                self._note_agent(error)
            else:
                return Host.from_proto(response.host)
        return await self._agent_host(name)

    async def remove_host(self, name: str) -> None:
        """Forget a host that does not answer. Raises `NotFound`, `Refused`."""
        await self._call(self._cluster.RemoveHost(cluster_pb2.RemoveHostRequest(name=name), timeout=self.timeout))

    async def list_domains(self, host: str = "") -> DomainList:
        """Return the guests of one host, or of all (`host` empty); an agent knows only those of its own host."""
        if not self._is_agent:
            try:
                pages = self._pages(self._cluster.ListDomains, cluster_pb2.ListDomainsRequest(host=host))
                return DomainList.from_proto([page async for page in pages])
            except ServerFailed as error:
                self._note_agent(error)
        return await self._agent_domains(host)

    async def update_host(self, name: str, changes: Mapping[str, Any], changed_by: str, comment: str) -> Host:
        """See `Client.update_host`. `changes`: by field of `HostSettings`; "default" resets it."""
        settings = host_pb2.HostSettings(**{field: value for field, value in changes.items() if value != "default"})
        change = host_pb2.SettingsChange(changed_by=changed_by, comment=comment)
        update = host_pb2.UpdateHostRequest(settings=settings, update_mask=FieldMask(paths=changes), change=change)
        if not self._is_agent:
            try:
                request = cluster_pb2.UpdateHostRequest(name=name, update=update)
                response = await self._call(self._cluster.UpdateHost(request, timeout=self.timeout))
            except ServerFailed as error:
                self._note_agent(error)
            else:
                return Host.from_proto(response.host)
        await self._agent_host(name)
        changed = await self._call(self._hosts.UpdateHost(update, timeout=self.timeout))
        return Host.of_agent(changed.host, self.address)

    async def list_slots(self, host: str) -> list[Slot]:
        """See `Client.list_slots`."""
        if not self._is_agent:
            try:
                pages = self._pages(self._cluster.ListSlots, cluster_pb2.ListSlotsRequest(name=host))
                return [Slot.from_proto(slot) async for page in pages for slot in page.slots]
            except ServerFailed as error:
                self._note_agent(error)
        await self._agent_host(host)
        pages = self._pages(self._slots.ListSlots, admission_pb2.ListSlotsRequest())
        return [Slot.from_proto(slot) async for page in pages for slot in page.slots]

    async def update_domain(self, domain: str, changes: Mapping[str, Any], host: str) -> Domain:
        """See `Client.update_domain`. `changes`: by field of `DomainSettings`; an empty value removes it."""
        settings = host_pb2.DomainSettings(**changes)
        update = host_pb2.UpdateDomainRequest(domain=domain, settings=settings, update_mask=FieldMask(paths=changes))
        if not self._is_agent:
            try:
                request = cluster_pb2.UpdateDomainRequest(host=host, update=update)
                response = await self._call(self._cluster.UpdateDomain(request, timeout=self.timeout))
            except ServerFailed as error:
                self._note_agent(error)
            else:
                return Domain.from_proto(response.domain)
        here = await self._agent_host(host)
        changed = await self._call(self._hosts.UpdateDomain(update, timeout=self.timeout))
        return Domain.from_proto(cluster_pb2.PlacedDomain(host=here.name, domain=changed.domain))

    def _note_agent(self, error: ServerFailed) -> None:
        """Take the server for an agent, which does not serve the coordinator's service. Raises `error` if that is not why."""
        if error.reason != Reason.UNIMPLEMENTED:
            raise error
        self._is_agent = True

    async def _agent_host(self, name: str = "") -> Host:
        response = await self._call(self._hosts.GetHost(host_pb2.GetHostRequest(), timeout=self.timeout))
        if name not in ("", response.host.name):
            raise no_such_host(name, response.host.name, self.address)
        return Host.of_agent(response.host, self.address)

    async def _agent_domains(self, host: str) -> DomainList:
        here = await self._agent_host(host)
        pages = self._pages(self._hosts.ListDomains, host_pb2.ListDomainsRequest())
        return DomainList.of_agent(here.name, [domain async for page in pages for domain in page.domains])

    def _pages(self, method: Any, request: Any) -> AsyncIterator[Any]:
        return all_pages(lambda page: self._call(method(page, timeout=self.timeout)), request)
