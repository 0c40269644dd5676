"""The registry of the cluster's hosts: their identity, whether their agents answer, and their last reports.

Everything known about a host comes from its agent at its address: from the identity check of a new claim, and from the watch that
the coordinator keeps open. A registration is only a reason to look. The agent sends a report on the watch at every change, and every
`heartbeat_seconds` without one. A watch that breaks makes the host UNREACHABLE at once, as does one without a report for three
heartbeats; the coordinator keeps opening it again.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, TypeVar

import grpc.aio
import structlog
from google.protobuf.message import Message

from agent.runtime.backoff import SYSTEM_CLOCK, Clock
from agent.runtime.bell import Bell
from agent.runtime.errors import DroverError, Reason
from agent.runtime.events import Bus, HostChanged
from agent.runtime.wire import cut
from agent.service.bounds import answer_of
from coordinator.hosts.claims import Proofs, check_claim
from coordinator.hosts.host_link import ConnectLimits, HostLink, HostReport, answer_if_any
from coordinator.hosts.host_table import HostTable
from coordinator.hosts.known_host import KnownHost, after_report, find, is_worth_saving, shown
from coordinator.store import Store
from drover.agent.v1 import host_pb2 as agent_pb
from drover.agent.v1 import host_pb2_grpc as agent_rpc
from drover.coordinator.v1 import host_pb2 as pb

log: Final = structlog.get_logger(__name__)

T = TypeVar("T")
M = TypeVar("M", bound=Message)

FORWARD_SECONDS: Final = 5.0
"""Deadline of a request that is passed on to an agent; one that changes something writes to the disk there."""

Answers = tuple[list[tuple[str, T]], list[str]]
"""(host's name, answer) of each host that answered, and the names of the hosts that did not."""


class HostRegistry:
    """The registry of the cluster's hosts. `clock`: for pauses and durations; `wall`: Unix time in seconds, for people."""

    def __init__(
        self,
        store: Store,
        bus: Bus,
        heartbeat_seconds: float = 5.0,
        clock: Clock = SYSTEM_CLOCK,
        wall: Callable[[], float] = time.time,
        coordinator: str = "",
        seen: Callable[[agent_pb.Host], agent_pb.Host] = lambda host: host,
        changed: Bell | None = None,
    ) -> None:
        """`seen`: returns a host as its report is shown and planned with, such as with the cluster's networks; `changed`: rings when
        that has changed."""
        self.heartbeat_seconds = heartbeat_seconds
        self.changed = changed or Bell()
        """Rings when a host reports anything new, or is seen in another way."""
        self._coordinator = coordinator
        self.seen = seen
        self._bus = bus
        self._clock = clock
        self._wall = wall
        self._lanes = ConnectLimits()
        self._proofs = Proofs(bus, clock)
        self._table = HostTable(store, self._link_to, clock, bus)

    async def open(self) -> None:
        """Load the hosts of the store and connect to their agents; each host is unreachable until its agent reports."""
        await self._table.open()

    async def close(self) -> None:
        """End every watch, close every channel, save unsaved changes. Can be called again."""
        await self._table.close()

    # ---- the verbs

    async def register(self, host: agent_pb.Host, agent_address: str) -> None:
        """Take the claim, from anybody, that the agent at `agent_address` serves `host`. Only its name and host_uuid count.

        A known host does not change, but if it is silent the coordinator tries to reach it at once. A new claim (name, host or
        address) counts once the agent at that address has answered with this identity; it is stored when this returns. A name whose
        holder does not answer passes to the host that claims it.

        Raises INVALID_FIELD, HOST_NAME_TAKEN (a live host has the name), HOST_UUID_TAKEN (another host has this host_uuid),
        HOST_UNREACHABLE, DEADLINE_EXCEEDED (the agent does not answer at that address), BUSY, JOURNAL_UNAVAILABLE.
        """
        address = check_claim(host, agent_address)
        entry = self._table.hosts.get(host.name)
        if entry is not None and entry.is_same_agent(host, address):
            if not entry.link.connected:
                entry.link.hurry()
            return
        self._table.former_names(host, address)  # refuses before a connection is opened
        report = await self._proofs.prove(host, address)
        await self._table.claim(after_report(pb.ClusterHost(agent_address=address), report, self._wall()))

    async def remove(self, name: str) -> None:
        """Forget a host that does not answer; it comes back when it registers again. It is gone from the store when this returns.

        Raises HOST_NOT_FOUND, HOST_IN_USE (it is up), BUSY, JOURNAL_UNAVAILABLE.
        """
        await self._table.remove(name, _check_removable)

    async def get(self, name: str) -> pb.ClusterHost:
        """Return a copy of the host's entry. Raises HOST_NOT_FOUND."""
        return self._shown(self._find(name))

    def names(self) -> list[str]:
        return sorted(self._table.hosts)

    async def list_hosts(self, among: Sequence[str] | None = None) -> list[pb.ClusterHost]:
        """Return the hosts named in `among` (None: all, by name)."""
        return [self._shown(entry) for entry in self._among(among)]

    def has(self, name: str, host_uuid: str, address: str) -> bool:
        """Return whether that host has the name now: the UUID is the same, or (if it was changed) the address of the agent is."""
        entry = self._table.hosts.get(name)
        return entry is not None and (entry.known.host.host_uuid == host_uuid or entry.known.agent_address == address)

    def channel(self, name: str) -> grpc.aio.Channel:
        """Return the channel to the host's agent, whether it answers or not. Do not close it, and ask again for each use: the
        registry closes it when the agent's address changes. Raises HOST_NOT_FOUND.
        """
        return self._find(name).link.channel

    # ---- queries to agents

    async def find_domain(self, request: agent_pb.GetDomainRequest) -> Answers[agent_pb.GetDomainResponse]:
        """Return the answers of the hosts that have such a guest, running or not, and the hosts that did not answer within 2 s
        (unreachable ones are not asked). Both are sorted by host name.
        """
        return await self._ask_all(lambda link: link.get_domain(request))

    async def list_domains(self, host: str = "", among: Sequence[str] | None = None) -> Answers[agent_pb.Domain]:
        """Return every guest of `host`, or (if empty) of those `among` (None: all), and the hosts that did not answer within 2 s.

        Raises, if `host` is given: HOST_NOT_FOUND, HOST_UNREACHABLE, and its agent's error.
        """
        if not host:
            return await self._ask_all(HostLink.list_domains, among)
        entry = self._find(host)
        if not entry.up:
            raise entry.unreachable()
        return [(host, domain) for domain in await entry.link.list_domains()], []

    async def forward(self, name: str, call: Callable[[grpc.aio.Channel], Awaitable[M]]) -> M:
        """Return the answer of a host's agent, checked. `call` makes the call, with the deadline `FORWARD_SECONDS`.

        Raises HOST_NOT_FOUND, HOST_UNREACHABLE (at once for a host that is not up), DEADLINE_EXCEEDED, PROTOCOL_MISMATCH (its agent
        is older), and the agent's error.
        """
        entry = self._find(name)
        if not entry.up:
            raise entry.unreachable()
        try:
            return await answer_of(call(entry.link.channel), name)
        except DroverError as error:
            if error.reason is not Reason.UNIMPLEMENTED:  # else a client would take this coordinator for an agent
                raise
            text = f"the agent of {name} is older than this coordinator and cannot do that; nothing was changed. Upgrade it"
            raise DroverError(Reason.PROTOCOL_MISMATCH, text, metadata={"host": name}) from None

    async def update_host(self, name: str, request: agent_pb.UpdateHostRequest) -> pb.ClusterHost:
        """Pass a change of its settings on to a host; return its new entry. Raises as `forward`."""
        entry, stub = self._find(name), agent_rpc.HostServiceStub
        host = (await self.forward(name, lambda to: stub(to).UpdateHost(request, timeout=FORWARD_SECONDS))).host
        entry.check_identity(host)
        known = pb.ClusterHost()  # readers of the old one keep it
        known.CopyFrom(entry.known)
        known.host.CopyFrom(host)
        entry.known = known  # its watch reports the same, perhaps later: whoever asks next sees the change
        self._table.save_soon(entry)
        return self._shown(entry)

    async def _ask_all(self, ask: Callable[[HostLink], Awaitable[Sequence[T]]], among: Sequence[str] | None = None) -> Answers[T]:
        entries = self._among(among)
        asked = [entry for entry in entries if entry.up]
        answers = await asyncio.gather(*(answer_if_any(ask(entry.link)) for entry in asked))
        by_name = {entry.name: answer for entry, answer in zip(asked, answers, strict=True)}
        found = [(name, item) for name, answer in by_name.items() for item in answer or ()]
        return found, [entry.name for entry in entries if by_name.get(entry.name) is None]

    def last_report(self, name: str) -> agent_pb.Host | None:
        """Return a host as it last reported; None if it is not registered."""
        entry = self._table.hosts.get(name)
        return None if entry is None else self.seen(entry.known.host)

    def _among(self, names: Sequence[str] | None) -> list[KnownHost]:
        return [self._table.hosts[name] for name in (self.names() if names is None else names)]

    def _shown(self, entry: KnownHost) -> pb.ClusterHost:
        host = shown(entry, self._clock.monotonic(), self._wall())
        host.host.CopyFrom(self.seen(entry.known.host))
        return host

    def _find(self, name: str) -> KnownHost:
        return find(self._table.hosts, name)

    # ---- callbacks of the links; none of them waits

    def _link_to(self, known: pb.ClusterHost) -> HostLink:
        name, address = known.host.name, known.agent_address
        return HostLink(
            name, address, self._on_report, self._on_silence, self._lanes, self.heartbeat_seconds, self._coordinator, self._clock
        )

    def _on_report(self, link: HostLink, report: HostReport) -> None:
        entry = self._entry_of(link)
        if entry is None:
            return
        entry.check_identity(report.host)
        self._warn_of_rivals(entry, frozenset(report.host.coordinators) - {self._coordinator})
        entry.heard_at = self._clock.monotonic()
        before, entry.known = entry.known, after_report(entry.known, report, self._wall())
        if before.state != entry.known.state:
            self._bus.publish(HostChanged(entry.name, change="up"))
        if before.host != entry.known.host:
            self.changed.ring()
        if is_worth_saving(before, entry.known, self._table.unsaved_for(entry)):
            self._table.save_soon(entry)

    def _warn_of_rivals(self, entry: KnownHost, rivals: frozenset[str]) -> None:
        """Log each other coordinator that claims the host once, within the rate of `Seldom`. A rival that exceeds the rate is logged
        later, if it is still there.
        """
        came, entry.rivals = rivals - entry.rivals, rivals
        entry.named_rivals &= rivals
        now, others = self._clock.monotonic(), rivals - entry.named_rivals
        if not others:
            return
        if not entry.warnings.due(now):
            entry.warnings.held_back += bool(came)
            return
        held_back = entry.warnings.told(now)
        log.warning("host.claimed_by_another_coordinator", host=entry.name, others=sorted(others), held_back=held_back)
        entry.named_rivals = rivals

    def _on_silence(self, link: HostLink, why: str) -> None:
        entry = self._entry_of(link)
        if entry is not None and entry.up:
            entry.known.state = pb.HOST_STATE_UNREACHABLE
            self._bus.publish(HostChanged(entry.name, change="unreachable", reason=Reason.HOST_UNREACHABLE, message=cut(why, 1024)))
            self._table.save_soon(entry)
        if entry is not None:
            entry.known.unreachable_reason = cut(why, 1024)

    def _entry_of(self, link: HostLink) -> KnownHost | None:
        """Return the link's host, or None if the link was dropped but is not closed yet."""
        entry = self._table.hosts.get(link.name)
        return entry if entry is not None and entry.link is link else None


def _check_removable(entry: KnownHost) -> None:
    """Raise HOST_IN_USE if the host is up."""
    if entry.up:
        text = f"{entry.name} at {entry.known.agent_address} is up and would register again; stop its agent first"
        raise DroverError(Reason.HOST_IN_USE, text, metadata={"host": entry.name})
