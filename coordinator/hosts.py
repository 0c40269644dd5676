"""The hosts of the cluster: who they are, whether their agents answer, and how to talk to them.

Two things tell that a host is there: its agent registers every `heartbeat_seconds`, and it answers a watch that the
coordinator holds open to it. A broken watch makes the host UNREACHABLE at once (and is opened again and again); three
heartbeats without a word make it UNREACHABLE too, which catches an agent that hangs while its connection lives.

What is known is in memory; the store keeps it across restarts. A host's claim on its name is in the store before it is
confirmed; later changes follow in the background, so a slow disk makes no host look dead.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Final, TypeVar

import grpc.aio
import structlog

from agent.errors import DroverError, Reason
from coordinator.claims import Proofs, check_claim, check_free
from coordinator.host_link import CLOSE_SECONDS, HostLink, Lanes, answer_of, close_links
from coordinator.store import Compare, Delete, KeyValue, Operation, Put, Store
from drover.agent.v1 import host_pb2 as agent_pb
from drover.coordinator.v1 import host_pb2 as pb

PREFIX: Final = "/hosts/"
"""A host's key is this and its name; the value is a `drover.coordinator.v1.ClusterHost`."""

HEARTBEATS_MISSED: Final = 3
"""So many heartbeats without a word, and a host counts as unreachable."""
LAST_SEEN_SECONDS: Final = 60.0
"""The store's `last_seen_time` of a host that is up is at most so old."""
RETRY_SECONDS: Final = 1.0
"""After so long a write to the store that failed is tried again."""
_ATTEMPTS: Final = 3

log = structlog.get_logger(__name__)

T = TypeVar("T")

Answers = tuple[list[tuple[str, T]], list[str]]
"""What hosts answered, with the host's name each; and the hosts that did not answer."""


@dataclass
class _Entry:
    """A host, as this coordinator knows it."""

    known: pb.ClusterHost
    mod_revision: int
    """Of its key in the store; 0: it is not there."""
    heard: float
    """When it was last heard of, by the monotonic clock."""
    saved: float
    """When it was last saved, by the monotonic clock."""
    link: HostLink
    rivals: frozenset[str] = frozenset()
    """Other coordinators that claim it, as last told."""

    @property
    def name(self) -> str:
        return self.known.host.name

    @property
    def up(self) -> bool:
        return self.known.state == pb.HOST_STATE_UP


class HostRegistry:
    """`clock` (seconds that never go back) judges heartbeats, `wall` (Unix time in seconds) is what people read."""

    def __init__(
        self,
        store: Store,
        heartbeat_seconds: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        coordinator: str = "",
    ) -> None:
        self._coordinator = coordinator
        self.heartbeat_seconds = heartbeat_seconds
        self._store = store
        self._clock = clock
        self._wall = wall
        self._entries: dict[str, _Entry] = {}
        self._claiming = asyncio.Lock()  # one writer of /hosts/ at a time
        self._lanes = Lanes()
        self._proofs = Proofs()
        self._unsaved: set[str] = set()
        self._wake_saver = asyncio.Event()
        self._wake_sweeper = asyncio.Event()
        self._closing: set[asyncio.Task[None]] = set()
        self._tasks: list[asyncio.Task[None]] = []

    async def open(self) -> None:
        """Load the hosts of the store: unreachable until heard of, and their agents are asked at once."""
        after, more = "", True
        while more:
            page = await self._store.list(PREFIX, after=after)
            for item in page.items:
                self._adopt(item.key, item)
            after, more = page.items[-1].key if page.items else "", page.more
        self._tasks = [
            asyncio.create_task(self._keep_saving(), name="save-hosts"),
            asyncio.create_task(self._keep_sweeping(), name="sweep-hosts"),
        ]

    async def close(self) -> None:
        """End every watch, close every channel, save what is not saved yet. Can be called again."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_SECONDS)
            await self._save_all()
        links = [entry.link for entry in self._entries.values()]
        self._entries.clear()
        await close_links(links)
        if self._closing:
            await asyncio.wait(self._closing, timeout=2 * CLOSE_SECONDS)

    # ---- the verbs

    async def register(self, host: agent_pb.Host, agent_address: str) -> None:
        """The agent at `agent_address` says that it serves `host`; a heartbeat, if that is known.

        A new claim (name, host or address) counts once the agent at that address has answered with this identity, and is in the
        store when this returns. A name whose holder does not answer passes to the host that asks for it.
        Errors: INVALID_FIELD, HOST_NAME_TAKEN (a live host has the name), HOST_UUID_TAKEN (another host has this host_uuid),
        HOST_UNREACHABLE and DEADLINE_EXCEEDED (the agent does not answer at that address), BUSY, JOURNAL_UNAVAILABLE.
        """
        address = check_claim(host, agent_address)
        self._sweep()
        entry = self._entries.get(host.name)
        if entry is not None and _same_agent(entry, host, address):
            self._heard(entry, host, up=entry.link.connected or entry.known.host.incarnation != host.incarnation)
            if not entry.link.connected:
                entry.link.hurry()
            return
        self._former_names(host, address)  # what is refused anyway opens no connection
        proved = await self._proofs.prove(host, address)
        async with self._claiming:
            await self._claim(proved, address)

    async def remove(self, name: str) -> None:
        """Forget a host that does not answer; it comes back when it registers again. Gone from the store when this returns.
        Errors: HOST_NOT_FOUND, HOST_IN_USE (it is up), BUSY, JOURNAL_UNAVAILABLE."""
        self._sweep()
        async with self._claiming:
            for _ in range(_ATTEMPTS):
                entry = self._find(name)
                if entry.up:
                    text = f"{name} at {entry.known.agent_address} is up and would register again; stop its agent first"
                    raise DroverError(Reason.HOST_IN_USE, text, metadata={"host": name})
                result = await self._store.txn([Compare(PREFIX + name, entry.mod_revision)], [Delete(PREFIX + name)])
                if isinstance(result, int):
                    self._drop([name])
                    log.info("host.removed", host=name, address=entry.known.agent_address)
                    return
                self._adopt(PREFIX + name, result.current[PREFIX + name])
        raise DroverError(Reason.BUSY, f'host "{name}" is just changing', retry_after=RETRY_SECONDS)

    def note_clock(self, name: str, ahead_ns: int) -> None:
        self._find(name).known.clock_skew.FromNanoseconds(ahead_ns)

    async def get(self, name: str) -> pb.ClusterHost:
        """A copy of what is known. Errors: HOST_NOT_FOUND."""
        self._sweep()
        return deepcopy(self._find(name).known)

    def names(self) -> list[str]:
        return sorted(self._entries)

    async def list_hosts(self, among: Sequence[str] | None = None) -> list[pb.ClusterHost]:
        """Those `among`, or every one by name."""
        self._sweep()
        return [deepcopy(self._entries[name].known) for name in (self.names() if among is None else among)]

    def has(self, name: str, host_uuid: str) -> bool:
        """Whether that host has the name now."""
        entry = self._entries.get(name)
        return entry is not None and entry.known.host.host_uuid == host_uuid

    def channel(self, name: str) -> grpc.aio.Channel:
        """The channel to the host's agent, whether it answers or not; not yours to close. Ask again for each use: it is
        closed when the agent's address changes. Errors: HOST_NOT_FOUND."""
        return self._find(name).link.channel

    async def find_domain(self, name_or_uuid: str) -> Answers[agent_pb.GetDomainResponse]:
        """The hosts that have such a guest, running or not, and the hosts that did not answer within 2 s (those that are
        unreachable are not asked). Both by name."""
        return await self._ask_all(lambda link: link.get_domain(name_or_uuid))

    async def list_domains(self, host: str = "", among: Sequence[str] | None = None) -> Answers[agent_pb.Domain]:
        """Every guest of that host, or of those `among` (None: all); and the hosts that did not answer within 2 s.

        Errors, if one host is asked for: HOST_NOT_FOUND, HOST_UNREACHABLE, and what its agent says.
        """
        if not host:
            return await self._ask_all(HostLink.list_domains, among)
        self._sweep()
        entry = self._find(host)
        if not entry.up:
            raise _unreachable(entry)
        return [(host, domain) for domain in await entry.link.list_domains()], []

    # ---- questions to agents

    async def _ask_all(self, ask: Callable[[HostLink], Awaitable[Sequence[T]]], among: Sequence[str] | None = None) -> Answers[T]:
        self._sweep()
        entries = [self._entries[name] for name in (self.names() if among is None else among)]
        asked = [entry for entry in entries if entry.up]
        answers = await asyncio.gather(*(answer_of(ask(entry.link)) for entry in asked))
        by_name = {entry.name: answer for entry, answer in zip(asked, answers, strict=True)}
        found = [(name, item) for name, answer in by_name.items() for item in answer or ()]
        return found, [entry.name for entry in entries if by_name.get(entry.name) is None]

    def _find(self, name: str) -> _Entry:
        entry = self._entries.get(name)
        if entry is None:
            raise DroverError(
                Reason.HOST_NOT_FOUND,
                f'no host "{name}" has registered; `drover host list` shows those that have',
                metadata={"host": name},
            )
        return entry

    # ---- claims: proved, then in the store

    def _former_names(self, host: agent_pb.Host, address: str) -> list[str]:
        return check_free(host, address, {name: entry.known for name, entry in self._entries.items()})

    async def _claim(self, host: agent_pb.Host, address: str) -> None:
        """Write the claim if the store still holds what is known here; else learn from it and look again."""
        key = PREFIX + host.name
        for _ in range(_ATTEMPTS):
            before = self._entries.get(host.name)
            renamed = self._former_names(host, address)[:8]  # far below what one transaction takes
            known = pb.ClusterHost(host=host, agent_address=address, state=pb.HOST_STATE_UP)
            known.last_seen_time.FromNanoseconds(int(self._wall() * 1e9))
            operations: list[Operation] = [Put(key, known.SerializeToString())]
            operations += [Delete(PREFIX + name) for name in renamed]
            result = await self._store.txn([Compare(key, before.mod_revision if before else 0)], operations)
            if isinstance(result, int):
                self._drop([*renamed, host.name])
                self._enter(known, result, self._clock())
                log.info("host.registered", host=host.name, host_uuid=host.host_uuid, address=address)
                if before is not None and before.known.host.host_uuid != host.host_uuid:
                    log.warning("host.uuid_changed", host=host.name, host_uuid=host.host_uuid, was=before.known.host.host_uuid)
                return
            self._adopt(key, result.current[key])
        raise DroverError(Reason.BUSY, f'the name "{host.name}" is being claimed by others too', retry_after=RETRY_SECONDS)

    def _adopt(self, key: str, item: KeyValue | None) -> None:
        """Take over what the store says, where it was not this coordinator's last word that wrote it."""
        name = key.removeprefix(PREFIX)
        entry = self._entries.get(name)
        if item is None:
            self._drop([name])
            return
        known = pb.ClusterHost.FromString(item.value)
        if entry is not None and _same_agent(entry, known.host, known.agent_address):
            entry.mod_revision = item.mod_revision  # what is known here is newer
            return
        self._drop([name])
        was_up, known.state = known.state == pb.HOST_STATE_UP, pb.HOST_STATE_UNREACHABLE
        self._enter(known, item.mod_revision, float("-inf"))
        if was_up:
            self._save_soon(self._entries[name])  # so that the store says so too

    def _enter(self, known: pb.ClusterHost, mod_revision: int, heard: float) -> None:
        link = HostLink(known.agent_address, self._word, self._silence, self._lanes, self._coordinator)
        self._entries[known.host.name] = _Entry(known, mod_revision, heard, self._clock(), link)
        self._wake_sweeper.set()

    def _drop(self, names: Iterable[str]) -> None:
        for name in names:
            entry = self._entries.pop(name, None)
            if entry is not None:
                # A task of its own: whoever registers does not wait for it, and by going away cannot leave it half done.
                closing = asyncio.create_task(entry.link.close(), name=f"close-host-{name}")
                self._closing.add(closing)
                closing.add_done_callback(self._closing.discard)

    # ---- what is heard; nothing here waits

    def _word(self, link: HostLink, host: agent_pb.Host) -> None:
        entry = self._entry_of(link)
        if entry is None:
            return
        if (host.name, host.host_uuid) != (entry.name, entry.known.host.host_uuid):
            raise DroverError(
                Reason.HOST_UNREACHABLE,
                f"host {host.name} ({host.host_uuid}) answers at the address of {entry.name} ({entry.known.host.host_uuid})",
            )
        rivals = frozenset(host.coordinators) - {self._coordinator}
        if others := rivals - entry.rivals:
            log.warning("host.claimed_by_another_coordinator", host=entry.name, others=sorted(others))
        entry.rivals = rivals
        self._heard(entry, host, up=True)

    def _silence(self, link: HostLink, why: str) -> None:
        entry = self._entry_of(link)
        if entry is not None:
            self._set_unreachable(entry, why)

    def _entry_of(self, link: HostLink) -> _Entry | None:
        """None for a link that was dropped and is not closed yet."""
        return next((entry for entry in self._entries.values() if entry.link is link), None)

    def _heard(self, entry: _Entry, host: agent_pb.Host, *, up: bool) -> None:
        entry.heard = self._clock()
        changed = entry.known.host != host or (up and not entry.up) or entry.heard - entry.saved >= LAST_SEEN_SECONDS
        if up and not entry.up:
            log.info("host.up", host=entry.name)
            entry.known.state = pb.HOST_STATE_UP
            self._wake_sweeper.set()
        entry.known.host.CopyFrom(host)
        entry.known.last_seen_time.FromNanoseconds(int(self._wall() * 1e9))
        if changed:
            self._save_soon(entry)

    def _set_unreachable(self, entry: _Entry, why: str) -> None:
        if entry.up:
            log.warning("host.unreachable", host=entry.name, why=why)
            entry.known.state = pb.HOST_STATE_UNREACHABLE
            self._save_soon(entry)

    def _sweep(self) -> None:
        """Make unreachable who has missed its heartbeats. Done before every answer, so that none depends on a timer."""
        limit = self._clock() - HEARTBEATS_MISSED * self.heartbeat_seconds
        for entry in self._entries.values():
            if entry.up and entry.heard <= limit:
                self._set_unreachable(entry, f"not heard of for {HEARTBEATS_MISSED * self.heartbeat_seconds:g} s")

    async def _keep_sweeping(self) -> None:
        while True:
            self._wake_sweeper.clear()
            self._sweep()
            last_words = [entry.heard for entry in self._entries.values() if entry.up]
            end = min(last_words) + HEARTBEATS_MISSED * self.heartbeat_seconds if last_words else None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if end is None else end - self._clock()):
                    await self._wake_sweeper.wait()

    # ---- into the store, in the background

    def _save_soon(self, entry: _Entry) -> None:
        self._unsaved.add(entry.name)
        self._wake_saver.set()

    async def _keep_saving(self) -> None:
        while True:
            await self._wake_saver.wait()
            self._wake_saver.clear()
            if not await self._save_all():
                await asyncio.sleep(RETRY_SECONDS)  # the disk does not say when it is well again
                self._wake_saver.set()

    async def _save_all(self) -> bool:
        """False if something could not be saved; it stays in the set. One host that cannot be saved stops no other."""
        whole = True
        for name in sorted(self._unsaved):
            try:
                async with self._claiming:
                    await self._save(name)
            except DroverError as error:
                log.warning("host.not_saved", host=name, error=error.message)
                whole = False
                if error.reason is Reason.JOURNAL_UNAVAILABLE:
                    break
        return whole

    async def _save(self, name: str) -> None:
        key = PREFIX + name
        self._unsaved.discard(name)
        try:
            for _ in range(_ATTEMPTS):
                entry = self._entries.get(name)
                if entry is None:
                    return
                put = Put(key, entry.known.SerializeToString())
                result = await self._store.txn([Compare(key, entry.mod_revision)], [put])
                if isinstance(result, int):
                    entry.mod_revision, entry.saved = result, self._clock()
                    return
                self._adopt(key, result.current[key])
        except BaseException:
            self._unsaved.add(name)
            raise


def _same_agent(entry: _Entry, host: agent_pb.Host, address: str) -> bool:
    return entry.known.host.host_uuid == host.host_uuid and entry.known.agent_address == address


def _unreachable(entry: _Entry) -> DroverError:
    return DroverError(
        Reason.HOST_UNREACHABLE,
        f"the agent of {entry.name} at {entry.known.agent_address} does not answer; its guests may well run: look at the "
        "agent and at the network between it and the coordinator",
        metadata={"host": entry.name, "peer": entry.known.agent_address},
        retry_after=RETRY_SECONDS,
    )
