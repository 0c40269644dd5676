"""Finds the hosts and the guest of a migration in the cluster (`agent.handshake.drive.ends.Directory`)."""

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Final

import grpc.aio

from agent.handshake.drive.ends import Candidate, Ends, Side
from agent.migration.placement import rank
from agent.runtime.backoff import OTHER_HOST, SYSTEM_CLOCK, Clock
from agent.runtime.bell import Bell
from agent.runtime.breaker import Breaker
from agent.runtime.errors import DroverError, Reason
from agent.runtime.events import Bus
from agent.service.bounds import answer_of
from agent.service.peers import ask_host, leaving_request
from agent.service.remote_peer import NO_ANSWER, QUESTION_SECONDS, RemotePeer
from coordinator.hosts.guests import find_guest
from coordinator.hosts.hosts import HostRegistry
from drover.agent.v1 import host_pb2, host_pb2_grpc
from drover.agent.v1 import migration_pb2 as pb
from drover.coordinator.v1.host_pb2 import HOST_STATE_UP, ClusterHost

REPORT_SECONDS: Final = 1.0
"""By then a host's report counts the slot of a migration that chose it."""
MOST_CHOSEN: Final = 1000


class ClusterDirectory:
    """The directory of a coordinator: source and destination are registered hosts."""

    def __init__(
        self,
        registry: HostRegistry,
        bus: Bus,
        clock: Clock = SYSTEM_CLOCK,
        networks: Callable[[], Sequence[host_pb2.Network]] = tuple,
    ) -> None:
        """`networks`: returns the cluster's networks, as in `Ends`."""
        self._registry = registry
        self._networks = networks
        self._clock = clock
        self._breaker = Breaker(OTHER_HOST, NO_ANSWER, bus, clock)
        self._chosen: deque[tuple[str, float]] = deque(maxlen=MOST_CHOSEN)

    @property
    def changed(self) -> Bell:
        return self._registry.changed

    def known(self, host: str) -> host_pb2.Host | None:
        return self._registry.last_report(host)

    def foreign(self) -> list[pb.Migration]:
        return []  # a coordinator is not told what agents move by themselves

    async def find(self, spec: pb.MigrationSpec) -> Ends:
        # Both hosts are asked at once; if both fail, the source's error is raised.
        source, destination = await asyncio.gather(self._source(spec), self._side(spec.destination_host), return_exceptions=True)
        if isinstance(source, BaseException):
            raise source
        if isinstance(destination, BaseException):
            raise destination
        return Ends(source[0], destination, source[1], self._networks())

    async def _source(self, spec: pb.MigrationSpec) -> tuple[Side, host_pb2.GetDomainResponse]:
        if spec.source_host:
            return await asyncio.gather(self._side(spec.source_host), self.guest(spec))
        name, guest = await find_guest(self._registry, leaving_request(spec), "--from")
        return await self._known(name), guest  # the host has just answered, so its last report is new enough

    async def guest(self, spec: pb.MigrationSpec) -> host_pb2.GetDomainResponse:
        """Return the guest, with what prevents this migration of it."""
        stub = host_pb2_grpc.HostServiceStub(self._registry.channel(spec.source_host))
        return await answer_of(stub.GetDomain(leaving_request(spec), timeout=QUESTION_SECONDS), spec.source_host)

    async def _side(self, name: str) -> Side:
        """Return the host as its watch reported it if it is up; else ask it, so that its error says what is wrong."""
        known = await self._registry.get(name)
        host = known.host
        if known.state != HOST_STATE_UP:
            with self._breaker.guard(name):
                host = self._registry.seen(await ask_host(self._registry.channel(name), name))
        return Side(host, self._peer(known.host, known.agent_address), known.agent_address)

    def _peer(self, host: host_pb2.Host, address: str) -> RemotePeer:
        """Return a peer that reaches the agent of that host, also after it registers at another address. Its calls raise
        HOST_UNREACHABLE once the name belongs to another host, which has none of its records. A host of that name at the same
        address is the same one, even if its libvirt's UUID has changed.
        """

        def channel() -> grpc.aio.Channel:
            if not self._registry.has(host.name, host.host_uuid, address):
                raise DroverError(
                    Reason.HOST_UNREACHABLE,
                    f'host {host.host_uuid} is no longer registered as "{host.name}"; `drover host list` shows the hosts',
                    metadata={"peer": host.name},
                )
            return self._registry.channel(host.name)

        return RemotePeer(channel, host.name, breaker=self._breaker)

    async def candidates(self, spec: pb.MigrationSpec, others: Sequence[pb.Migration] = ()) -> list[Candidate]:
        """Rank the hosts by their last reports; see `Directory.candidates`."""
        source, guest = await self._source(spec)
        known = await self._registry.list_hosts()
        hosts = {each.host.name: self._side_of(each) if self._answers(each) else None for each in known}
        ranked = rank(spec, source, guest, hosts, others, self._networks(), self._planned())
        if ranked[0].free and not spec.destination_host:  # else it only asks for advice, or waits
            self._chosen.append((ranked[0].name, self._clock.monotonic()))
        return ranked

    def _planned(self) -> Counter[str]:
        """Return how often each host was the best one lately."""
        while self._chosen and self._clock.monotonic() - self._chosen[0][1] > REPORT_SECONDS:
            self._chosen.popleft()
        return Counter(name for name, _ in self._chosen)

    async def ends(self, migration: pb.Migration) -> tuple[Side, Side]:
        source, destination = [await self._known(n) for n in (migration.source_host, migration.destination_host)]
        return source, destination

    async def source(self, migration: pb.Migration) -> Side:
        return await self._known(migration.source_host)

    async def _known(self, name: str) -> Side:
        """Return the host by its last report: it need not answer now."""
        return self._side_of(await self._registry.get(name))

    def _answers(self, known: ClusterHost) -> bool:
        return known.state == HOST_STATE_UP and not self._breaker.is_open(known.host.name)

    def _side_of(self, known: ClusterHost) -> Side:
        return Side(known.host, self._peer(known.host, known.agent_address), known.agent_address)
