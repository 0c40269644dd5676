"""Calls to other agents without a coordinator: to the peers of the configuration, or any agent's address (requirement H9)."""

import asyncio
import functools
from collections.abc import Mapping, Sequence
from typing import Final

import grpc.aio
import structlog

from agent.handshake.drive.ends import Candidate, Ends, Side
from agent.handshake.host.attempt import Attempt
from agent.handshake.host.peer import OtherHost
from agent.handshake.host.record_cache import RecordCache
from agent.handshake.machines.source import SourceState
from agent.migration.placement import rank
from agent.migration.takeover import taken_over
from agent.runtime.address import parse_address
from agent.runtime.alongside import alongside
from agent.runtime.backoff import CANDIDATE, OTHER_HOST
from agent.runtime.breaker import Breaker
from agent.runtime.errors import DroverError, Reason
from agent.runtime.events import Bus
from agent.service.bounds import answer_of
from agent.service.channel import open_channel
from agent.service.host import AgentHost
from agent.service.host_service import get_domain
from agent.service.remote_peer import NO_ANSWER, QUESTION_SECONDS, RemotePeer
from drover.agent.v1 import host_pb2, host_pb2_grpc
from drover.agent.v1 import migration_pb2 as pb

log = structlog.get_logger()

MAX_CHANNELS: Final = 64
"""Most channels that are kept open. Anybody may name an address, and an open channel costs some 60 KiB."""


CANDIDATE_SECONDS: Final = 1.0
"""Within this time a peer answers that may be chosen for a guest: all are asked at once, and one that hangs shall not hold up the
choice. After three silences a breaker leaves it out for a time."""


class Channels:
    """Channels to agents by address. The least recently used one is closed when there are too many."""

    def __init__(self) -> None:
        self._open: dict[str, grpc.aio.Channel] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def get(self, address: str) -> grpc.aio.Channel:
        """Return the channel to an address. Get it for each call, and do not keep it. Raises `ValueError` for an invalid address."""
        self._open[address] = self._open.pop(address) if address in self._open else open_channel(address)
        if len(self._open) > MAX_CHANNELS:
            oldest = self._open.pop(next(iter(self._open)))
            closing = asyncio.create_task(oldest.close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
        return self._open[address]

    async def close(self) -> None:
        await asyncio.gather(*(channel.close() for channel in self._open.values()), *self._closing)
        self._open.clear()


def other_side(channels: Channels, attempt: Attempt) -> OtherHost | None:
    """Return the agent on the other side of an attempt; None if its address is unknown or invalid."""
    record = attempt.record
    if not record.peer_agent:
        return None
    try:
        channels.get(record.peer_agent)
    except ValueError as error:
        log.error("the other agent cannot be called", migration=record.migration_id, host=record.peer_host, error=str(error))
        return None
    return RemotePeer(lambda: channels.get(record.peer_agent), record.peer_host)


async def ask_host(channel: grpc.aio.Channel, name: str, within: float = QUESTION_SECONDS) -> host_pb2.Host:
    """Return an agent's description of its host. Raises HOST_UNREACHABLE, DEADLINE_EXCEEDED."""
    call = host_pb2_grpc.HostServiceStub(channel).GetHost
    return (await answer_of(call(host_pb2.GetHostRequest(), timeout=within), name)).host


def leaving_request(spec: pb.MigrationSpec) -> host_pb2.GetDomainRequest:
    """Return the request to a source for the guest of this migration, and for what keeps it from leaving."""
    leaving = host_pb2.Leaving(options=spec.options, destination_name=spec.destination_name)
    return host_pb2.GetDomainRequest(domain=spec.domain, leaving=leaving)


class PeerDirectory:
    """The `Directory` of an agent: the source is this host, the destination a peer."""

    def __init__(
        self, host: AgentHost, own_address: str, peers: Mapping[str, str], channels: Channels, heard: RecordCache, bus: Bus
    ) -> None:
        self._heard = heard
        self._breaker = Breaker(OTHER_HOST, NO_ANSWER, bus)
        self._candidates = Breaker(CANDIDATE, NO_ANSWER, bus)
        self._host = host
        self._own_address = own_address
        self._peers = peers
        self._channels = channels
        self.changed = host.engine.changed
        self._answered: dict[str, host_pb2.Host] = {}
        """Other hosts as they last answered, the last one last."""

    def known(self, host: str) -> host_pb2.Host | None:
        return self._host.describe() if host == self._host.name else self._answered.get(host)

    def foreign(self) -> list[pb.Migration]:
        sends = [a.record for a in self._host.engine.active() if a.record.state == SourceState.PERFORMING]
        return [taken_over(record, self._host.name) for record in sends]

    async def find(self, spec: pb.MigrationSpec) -> Ends:
        own = self._host.describe()
        if spec.source_host not in ("", own.name):
            text = f"this agent moves guests of its own host {own.name} only; ask the agent of {spec.source_host}, or a coordinator"
            raise DroverError(Reason.HOST_NOT_FOUND, text, metadata={"host": spec.source_host})
        if spec.destination_host == own.name:
            raise DroverError(Reason.SAME_HOST, f"the guest would stay on {own.name}; choose another destination")
        address = self.address_of(spec.destination_host)
        async with alongside(self._ask(spec.destination_host, address, self._breaker)) as asking:
            guest = await get_domain(self._host, leaving_request(spec))  # errors of the source come first
            host = await asking
        return Ends(self._source(), self._side(host, address), guest, self._host.defined_networks)

    async def ends(self, migration: pb.Migration) -> tuple[Side, Side]:
        address = self.address_of(migration.spec.destination_host or migration.destination_host)
        try:
            return self._source(), self._side(await ask_host(self._channels.get(address), migration.destination_host), address)
        except DroverError:
            host = host_pb2.Host(name=migration.destination_host)
        return self._source(), Side(host, self.peer(migration.destination_host, address), address)

    async def guest(self, spec: pb.MigrationSpec) -> host_pb2.GetDomainResponse:
        return await get_domain(self._host, leaving_request(spec))

    async def source(self, migration: pb.Migration) -> Side:
        return self._source()

    async def candidates(self, spec: pb.MigrationSpec, others: Sequence[pb.Migration] = ()) -> list[Candidate]:
        """Ask each peer of the configuration for its slots; see `Directory.candidates`."""
        async with alongside(self._ask_peers()) as asking:
            guest = await get_domain(self._host, leaving_request(spec))
            return rank(spec, self._source(), guest, await asking, others, self._host.defined_networks)

    async def _ask_peers(self) -> dict[str, Side | None]:
        """Return every peer of the configuration, None for one that does not answer soon."""
        asked = [self._ask(name, address, self._candidates, CANDIDATE_SECONDS) for name, address in self._peers.items()]
        answers = zip(self._peers.items(), await asyncio.gather(*asked, return_exceptions=True), strict=True)
        return {name: self._side(host, at) if isinstance(host, host_pb2.Host) else None for (name, at), host in answers}

    async def _ask(self, name: str, address: str, breaker: Breaker, within: float = QUESTION_SECONDS) -> host_pb2.Host:
        with breaker.guard(name):
            return await ask_host(self._channels.get(address), name, within)

    def _side(self, host: host_pb2.Host, address: str) -> Side:
        self._answered.pop(host.name, None)
        self._answered[host.name] = host
        if len(self._answered) > MAX_CHANNELS:
            del self._answered[next(iter(self._answered))]
        return Side(host, self.peer(host.name, address), address)

    def _source(self) -> Side:
        return Side(self._host.describe(), self._host.engine, self._own_address)

    def peer(self, name: str, address: str) -> RemotePeer:
        return RemotePeer(lambda: self._channels.get(address), name, functools.partial(self._heard.note, address), self._breaker)

    def address_of(self, name_or_address: str) -> str:
        """Return the address of a peer's agent. Raises HOST_NOT_FOUND for what is neither a peer's name nor an address."""
        if name_or_address in self._peers:
            return self._peers[name_or_address]
        try:
            return str(parse_address(name_or_address))
        except ValueError:
            known = ", ".join(sorted(self._peers)) or "none"
            raise DroverError(
                Reason.HOST_NOT_FOUND,
                f'"{name_or_address}" is neither a peer of this agent\'s configuration ({known}) nor the address of an agent; '
                "nothing was done to the guest",
                metadata={"host": name_or_address},
            ) from None
