"""The client's calls and types for hosts and their guests. A module of its own, so that migrations need not import it."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import grpc.aio

from agent.runtime.errors import Reason
from agent.runtime.open_enum import OpenEnum
from agent.service.channel import all_pages
from coordinator.client.convert import FromWire, wire
from coordinator.client.errors import ServerFailed, no_such_host
from drover.agent.v1 import host_pb2, host_pb2_grpc
from drover.coordinator.v1 import host_pb2 as cluster_pb2
from drover.coordinator.v1 import host_pb2_grpc as cluster_pb2_grpc


class HostState(OpenEnum):
    UNSPECIFIED = "unspecified"
    UP = "up"
    UNREACHABLE = "unreachable"


class DomainState(OpenEnum):
    UNSPECIFIED = "unspecified"
    RUNNING = "running"
    PAUSED = "paused"
    SHUTOFF = "shutoff"
    CRASHED = "crashed"
    OTHER = "other"


@dataclass(frozen=True, kw_only=True)
class Network(FromWire):
    name: str
    address: str
    """IP address of the host on this network."""
    roles: tuple[str, ...]
    """"migration" (the memory of guests may travel here), "management"."""
    line_rate: int = wire("line_bytes_per_second")
    """Bytes per second. 0: unknown."""


@dataclass(frozen=True, kw_only=True)
class Host(FromWire):
    """A host, as reported by its agent (by its last report, while it is unreachable)."""

    name: str = wire("host.name")
    state: HostState
    address: str = wire("agent_address")
    """Address of its agent."""
    last_seen: datetime | None = wire("last_seen_time")
    driver: str = wire("host.driver")
    hypervisor: str = wire("host.hypervisor")
    """Such as "QEMU 7.2.22"."""
    agent_version: str = wire("host.agent_version")
    incoming_in_use: int = wire("host.incoming_in_use")
    incoming_limit: int = wire("host.incoming_limit")
    """Largest number of incoming migrations at once."""
    networks: tuple[Network, ...] = wire("host.networks")
    option_support: dict[str, str] = wire("host.migration_features.options")
    """For each option "supported", "always_on" or "unsupported"."""
    option_reasons: dict[str, str] = wire("host.migration_features.reasons")
    """For each option that this host cannot use though its driver has it: why not."""
    uri_transports: tuple[str, ...] = wire("host.migration_features.uri_transports")
    bandwidth: bool = wire("host.migration_features.bandwidth")
    """The host can limit the rate of a transfer."""
    split_phases: bool = wire("host.migration_features.split_phases")
    draining: bool = wire("host.draining")
    last_seen_age: float | None
    """Seconds between the host's last message and the coordinator's answer. None: the server does not send it."""
    last_seen_by_wall_clock: bool
    """`last_seen_age` is the difference of two readings of the coordinator's wall clock, not measured."""
    unreachable_reason: str
    """Why it is unreachable; empty if it is up."""
    clock_skew: float | None
    """Seconds by which its wall clock is ahead of the coordinator's; negative: behind. None: unknown."""
    proto: cluster_pb2.ClusterHost = field(repr=False, compare=False)

    @classmethod
    def of_agent(cls, host: host_pb2.Host, address: str) -> "Host":
        """Return the host from the answer of its own agent at `address`."""
        return cls.from_proto(cluster_pb2.ClusterHost(host=host, agent_address=address, state=cluster_pb2.HOST_STATE_UP))


@dataclass(frozen=True, kw_only=True)
class Domain(FromWire):
    """A guest on a host."""

    host: str
    name: str = wire("domain.name")
    uuid: str = wire("domain.uuid")
    state: DomainState = wire("domain.state")
    state_reason: str = wire("domain.reason")
    memory_bytes: int = wire("domain.memory_bytes")
    vcpus: int = wire("domain.vcpus")
    persistent: bool = wire("domain.persistent")
    job: str = wire("domain.job")
    """The migration job that holds it: "none", "outgoing", "incoming", or "unknown" while its process does not answer."""
    silent_for: float = wire("domain.silence")
    """Seconds since its process stopped answering; 0 if it answers."""
    running_version: str = wire("domain.running_version")
    """Version of the hypervisor that runs it. Empty: unknown."""
    installed_version: str = wire("domain.installed_version")
    """Version of the hypervisor that its next start would use."""
    proto: cluster_pb2.PlacedDomain = field(repr=False, compare=False)


@dataclass(frozen=True)
class DomainList:
    """Guests, by name, and the hosts that did not answer (whose guests are missing)."""

    domains: tuple[Domain, ...]
    unreachable_hosts: tuple[str, ...] = ()

    @classmethod
    def from_proto(cls, pages: Iterable[cluster_pb2.ListDomainsResponse]) -> "DomainList":
        pages = list(pages)
        domains = [Domain.from_proto(domain) for page in pages for domain in page.domains]
        domains.sort(key=lambda domain: (domain.name, domain.host))
        return cls(tuple(domains), tuple(host for page in pages for host in page.unreachable_hosts))

    @classmethod
    def of_agent(cls, host: str, domains: Iterable[host_pb2.Domain]) -> "DomainList":
        """Return the guests of a host from the answer of its own agent."""
        return cls(tuple(Domain.from_proto(cluster_pb2.PlacedDomain(host=host, domain=domain)) for domain in domains))

    def __iter__(self) -> Iterator[Domain]:
        return iter(self.domains)

    def __len__(self) -> int:
        return len(self.domains)


class HostQuestions:
    """Queries about hosts, to a coordinator or to one agent; the first query finds out which of the two it is.

    `call` awaits a gRPC call and raises its errors as those of the client.
    """

    def __init__(
        self, channel: grpc.aio.Channel, address: str, timeout: float, call: Callable[[Awaitable[Any]], Awaitable[Any]]
    ) -> None:
        self._cluster = cluster_pb2_grpc.HostServiceStub(channel)
        self._hosts = host_pb2_grpc.HostServiceStub(channel)
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
