"""The hosts of the cluster, in memory and in the store.

A claim of a name is stored before it counts. Later reports of a host are stored in the background, so that a slow disk makes no host
look dead.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import structlog

from agent.runtime.backoff import STORE, Clock, Pauses
from agent.runtime.errors import DroverError, Reason
from agent.runtime.events import Bus, HostChanged
from agent.runtime.supervision import supervise
from coordinator.hosts.claims import check_free
from coordinator.hosts.host_link import CLOSE_SECONDS, HostLink, close_links
from coordinator.hosts.known_host import RETRY_SECONDS, KnownHost, find
from coordinator.store import Compare, Delete, KeyValue, Operation, Put, Store
from drover.agent.v1 import host_pb2 as agent_pb
from drover.coordinator.v1 import host_pb2 as pb

PREFIX: Final = "/hosts/"
"""A host's key is this and its name; the value is a `drover.coordinator.v1.ClusterHost`."""

_ATTEMPTS: Final = 3

log = structlog.get_logger(__name__)


class HostTable:
    """The hosts by name. `link_to` opens the connection to a host's agent; the table closes it when it drops the host."""

    def __init__(self, store: Store, link_to: Callable[[pb.ClusterHost], HostLink], clock: Clock, bus: Bus) -> None:
        self.hosts: dict[str, KnownHost] = {}
        self._store = store
        self._link_to = link_to
        self._clock = clock
        self._bus = bus
        self._writing = asyncio.Lock()  # one writer of /hosts/ at a time
        self._unsaved: set[str] = set()
        self._wake_saver = asyncio.Event()
        self._closing: set[asyncio.Task[None]] = set()
        self._saver: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Load the hosts of the store and connect to their agents; each host is unreachable until its agent reports."""
        after, more = "", True
        while more:
            page = await self._store.list(PREFIX, after=after)
            for item in page.items:
                self._adopt(item.key, item)
            after, more = page.items[-1].key if page.items else "", page.more
        self._saver = supervise("save-hosts", self._keep_saving, self._clock)

    async def close(self) -> None:
        """End every watch, close every channel, save unsaved changes. Can be called again."""
        saver, self._saver = self._saver, None
        if saver is not None:
            saver.cancel()
            await asyncio.wait({saver}, timeout=CLOSE_SECONDS)
            await self._save_all()
        links = [entry.link for entry in self.hosts.values()]
        self.hosts.clear()
        await close_links(links)
        if self._closing:
            await asyncio.wait(self._closing, timeout=2 * CLOSE_SECONDS)

    # ---- changes that are stored before they count

    async def claim(self, known: pb.ClusterHost) -> None:
        """Enter the host under its name, in place of its former entry. If the store has changed meanwhile, adopt its entry and check
        again. Raises as `check_free`; BUSY, JOURNAL_UNAVAILABLE.
        """
        host = known.host
        key = PREFIX + host.name
        async with self._writing:
            for _ in range(_ATTEMPTS):
                before = self.hosts.get(host.name)
                renamed = self.former_names(host, known.agent_address)[:8]  # far below the limit of one transaction
                operations: list[Operation] = [Put(key, known.SerializeToString())]
                operations += [Delete(PREFIX + name) for name in renamed]
                result = await self._store.txn([Compare(key, before.mod_revision if before else 0)], operations)
                if isinstance(result, int):
                    self._drop([*renamed, host.name])
                    entry = self._enter(known, result)
                    entry.heard_at = self._clock.monotonic()  # it was asked just now
                    entry.link.hurry()
                    text = f"{host.host_uuid} at {known.agent_address}"
                    self._bus.publish(HostChanged(host.name, change="registered", message=text))
                    if before is not None and before.known.host.host_uuid != host.host_uuid:
                        was = before.known.host.host_uuid
                        log.warning("host.uuid_changed", host=host.name, host_uuid=host.host_uuid, was=was)
                    return
                self._adopt(key, result.current[key])
        raise DroverError(Reason.BUSY, f'other hosts claim the name "{host.name}" at this moment', retry_after=RETRY_SECONDS)

    def former_names(self, host: agent_pb.Host, address: str) -> list[str]:
        """Return `check_free` among the hosts of the table. Raises as that does."""
        return check_free(host, address, {name: entry.known for name, entry in self.hosts.items()})

    async def remove(self, name: str, check: Callable[[KnownHost], None]) -> None:
        """Forget the host, unless `check` raises. Raises HOST_NOT_FOUND, BUSY, JOURNAL_UNAVAILABLE, and as `check`."""
        key = PREFIX + name
        async with self._writing:
            for _ in range(_ATTEMPTS):
                entry = find(self.hosts, name)
                check(entry)
                result = await self._store.txn([Compare(key, entry.mod_revision)], [Delete(key)])
                if isinstance(result, int):
                    self._drop([name])
                    self._bus.publish(HostChanged(name, change="removed", message=f"was at {entry.known.agent_address}"))
                    return
                self._adopt(key, result.current[key])
        raise DroverError(Reason.BUSY, f'the entry of host "{name}" changes at this moment; try again', retry_after=RETRY_SECONDS)

    def _adopt(self, key: str, item: KeyValue | None) -> None:
        """Take over the store's entry, which another writer has changed; None: it was deleted."""
        name = key.removeprefix(PREFIX)
        entry = self.hosts.get(name)
        if item is None:
            self._drop([name])
            return
        known = pb.ClusterHost.FromString(item.value)
        if entry is not None and entry.is_same_agent(known.host, known.agent_address):
            entry.mod_revision = item.mod_revision  # the entry in memory is newer
            return
        self._drop([name])
        was_up, known.state = known.state == pb.HOST_STATE_UP, pb.HOST_STATE_UNREACHABLE
        entry = self._enter(known, item.mod_revision)
        if was_up:
            self.save_soon(entry)  # stores UNREACHABLE

    def _enter(self, known: pb.ClusterHost, mod_revision: int) -> KnownHost:
        entry = KnownHost(known, mod_revision, self._clock.monotonic(), self._link_to(known))
        self.hosts[known.host.name] = entry
        return entry

    def _drop(self, names: Iterable[str]) -> None:
        for name in names:
            entry = self.hosts.pop(name, None)
            if entry is not None:
                # A task of its own: a registration need not wait for it, and its cancellation cannot leave it half done.
                closing = asyncio.create_task(entry.link.close(), name=f"close-host-{name}")
                self._closing.add(closing)
                closing.add_done_callback(self._closing.discard)

    # ---- into the store, in the background

    def unsaved_for(self, entry: KnownHost) -> float:
        """Return the seconds since the entry was last saved."""
        return self._clock.monotonic() - entry.saved

    def save_soon(self, entry: KnownHost) -> None:
        self._unsaved.add(entry.name)
        self._wake_saver.set()

    async def _keep_saving(self) -> None:
        pauses = Pauses(STORE, self._clock)
        while True:
            await self._wake_saver.wait()
            self._wake_saver.clear()
            if await self._save_all():
                pauses.succeeded()
            else:
                await pauses.pause()  # no event tells when the disk works again
                self._wake_saver.set()

    async def _save_all(self) -> bool:
        """Save every unsaved host; return whether all were saved. One that fails stays unsaved and does not stop the others, unless
        the store cannot be used at all.
        """
        all_saved = True
        for name in sorted(self._unsaved):
            try:
                async with self._writing:
                    await self._save(name)
            except DroverError as error:
                log.warning("host.not_saved", host=name, error=error.message)
                all_saved = False
                if error.reason is Reason.JOURNAL_UNAVAILABLE:
                    break
        return all_saved

    async def _save(self, name: str) -> None:
        key = PREFIX + name
        self._unsaved.discard(name)
        try:
            for _ in range(_ATTEMPTS):
                entry = self.hosts.get(name)
                if entry is None:
                    return
                put: Sequence[Operation] = [Put(key, entry.known.SerializeToString())]
                result = await self._store.txn([Compare(key, entry.mod_revision)], put)
                if isinstance(result, int):
                    entry.mod_revision, entry.saved = result, self._clock.monotonic()
                    return
                self._adopt(key, result.current[key])
        except BaseException:
            self._unsaved.add(name)
            raise
