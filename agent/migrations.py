"""Migrations as a resource: start, get, list, watch, cancel. The coordinator and every agent run this same code.

Who serves it differs only in how names become hosts (a `Directory`) and in where migrations are kept (a `MigrationLog`).
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass
from typing import Any, Final, Protocol

import structlog

from agent.bell import Bell
from agent.errors import DroverError, Reason
from agent.fencing import FencingConfig, fence
from agent.handshake.driver import Driver, Plan
from agent.handshake.guest_fact import fact_of_description
from agent.handshake.peer import HandshakePeer
from agent.handshake.records import Failure
from agent.planning import make_plan, resume_plan
from agent.progress import describe, impossible
from drover.agent.v1 import handshake_pb2, host_pb2
from drover.agent.v1 import migration_pb2 as pb

log = structlog.get_logger()

KEEP: Final = 1000
"""Migrations that have ended and are kept."""

TELL_SECONDS: Final = 0.01
"""After which readers are told what a driver has learned; what it learned meanwhile is told with it."""

FINAL: Final = frozenset({pb.MIGRATION_STATE_SUCCEEDED, pb.MIGRATION_STATE_FAILED, pb.MIGRATION_STATE_CANCELLED})


@dataclass(frozen=True)
class Side:
    """One end of a migration: its host, how to speak to it, and how others do."""

    host: host_pb2.Host
    handshake: HandshakePeer
    agent_address: str


@dataclass(frozen=True)
class Ends:
    """Both ends, and the guest as the source describes it."""

    source: Side
    destination: Side
    guest: host_pb2.GetDomainResponse


class Directory(Protocol):
    """Turns the names of a spec into hosts."""

    async def find(self, spec: pb.MigrationSpec) -> Ends:
        """Raises DOMAIN_NOT_FOUND, DOMAIN_AMBIGUOUS, HOST_NOT_FOUND, HOST_UNREACHABLE."""
        ...

    async def ends(self, migration: pb.Migration) -> tuple[Side, Side]:
        """Source and destination of a migration that was started before; they need not answer now."""
        ...


class MigrationLog(Protocol):
    """Keeps migrations over a restart."""

    async def save(self, migration_id: str, body: bytes, *, ended: bool) -> None: ...

    async def load(self) -> list[bytes]: ...


class _Entry:
    """One migration, its driver while it runs, and who waits for a change."""

    def __init__(self, migration: pb.Migration) -> None:
        self.migration = migration
        self.driver: Driver | None = None
        self.task: asyncio.Task[None] | None = None
        self.fencing: asyncio.Task[None] | None = None
        self.gave_up = False
        """Nothing is done any more, though it has not ended: its records contradict each other."""
        self.cancelled: Failure | None = None
        """Somebody asked for the end; every driver of this migration is told."""
        self.telling: asyncio.TimerHandle | None = None
        """Runs when its driver has learned something that readers were not told yet."""
        self.changed = Bell()

    @property
    def final(self) -> bool:
        return self.migration.state in FINAL


@dataclass(frozen=True)
class _Starting:
    spec: pb.MigrationSpec
    task: "asyncio.Task[pb.Migration]"


class Migrations:
    """Every migration that this process drives or drove."""

    def __init__(self, name: str, directory: Directory, kept: MigrationLog, fencing: FencingConfig | None = None) -> None:
        self._name = name
        self._fencing = fencing
        self._directory = directory
        self._kept = kept
        self._entries: dict[str, _Entry] = {}
        self._starting: dict[str, _Starting] = {}
        self._revision = 0
        self._ended = Bell()
        self.draining = False

    # ---- life

    async def recover(self) -> None:
        """Read what is kept, and go on with what has not ended."""
        for body in await self._kept.load():
            migration = pb.Migration.FromString(body)
            self._revision = max(self._revision, migration.revision)
            entry = self._entries[migration.migration_id] = _Entry(migration)
            if not entry.final:
                entry.task = asyncio.create_task(self._resume(entry), name=f"resume {migration.migration_id[:8]}")

    async def close(self) -> None:
        """Let go of every driver; the records remain, and the source ends what runs."""
        tasks: list[asyncio.Task[Any]] = [starting.task for starting in self._starting.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for entry in self._entries.values():
            if entry.telling is not None:
                entry.telling.cancel()
        tasks = [task for entry in self._entries.values() for task in (entry.task, entry.fencing) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def idle(self, timeout: float) -> bool:
        """Wait until every migration has ended; False when one still runs after `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                while self._starting or any(not entry.final and not entry.gave_up for entry in self._entries.values()):
                    await self._ended.next.wait()
        except TimeoutError:
            return False
        return True

    # ---- calls

    async def start(self, migration_id: str, spec: pb.MigrationSpec) -> pb.Migration:
        """See `MigrationService.StartMigration`. Goes on when its caller goes away."""
        if known := self._entries.get(migration_id):
            if known.migration.spec != spec:
                raise _exists(migration_id)
            return known.migration
        if migration_id not in self._starting:
            task = asyncio.create_task(self._start(migration_id, spec), name=f"start {migration_id[:8]}")
            self._starting[migration_id] = _Starting(spec, task)
            task.add_done_callback(lambda _: self._started(migration_id))
        starting = self._starting[migration_id]
        if starting.spec != spec:
            raise _exists(migration_id)
        return await asyncio.shield(starting.task)

    def _started(self, migration_id: str) -> None:
        task = self._starting.pop(migration_id).task
        if not task.cancelled():
            task.exception()  # it was told to whoever asked; nobody may be left
        self._ended.ring()

    async def _start(self, migration_id: str, spec: pb.MigrationSpec) -> pb.Migration:
        began = time.time()
        if self.draining:
            raise DroverError(Reason.DRAINING, f"{self._name} is stopping and starts no new migration", retry_after=5.0)
        ends = await self._directory.find(spec)
        plan, warnings = make_plan(spec, ends.source.host, ends.destination.host, ends.guest, ends.source.agent_address,
                                   ends.destination.agent_address)  # fmt: skip
        migration = pb.Migration(
            migration_id=migration_id,
            spec=spec,
            state=pb.MIGRATION_STATE_PENDING,
            attempt=1,
            source_host=plan.source_host,
            destination_host=plan.destination_host,
            domain_name=plan.domain_name,
            domain_uuid=plan.domain_uuid,
            source_guest=fact_of_description(ends.guest.domain),
            network=plan.network,
            options=plan.options,
            warnings=warnings,
            driver=self._name,
        )
        migration.create_time.FromNanoseconds(int(began * 1e9))
        entry = _Entry(migration)
        entry.driver = self._driver(entry, ends.source, ends.destination, plan)
        await entry.driver.reserve()
        self._trim()
        self._entries[migration_id] = entry
        self._tell(entry)
        accepted = entry.migration
        entry.task = asyncio.create_task(self._run(entry, self._save(entry)), name=f"drive {migration_id[:8]}")
        return accepted

    def take_over(self, migration: pb.Migration) -> None:
        """Drive to its end what another driver has begun and left; nothing where that is done here already."""
        entry = self._entries.get(migration.migration_id)
        if entry is not None and not entry.final:
            return
        self._trim()
        entry = self._entries[migration.migration_id] = _Entry(migration)
        self._publish(entry, migration)
        entry.task = asyncio.create_task(self._resume(entry), name=f"take over {migration.migration_id[:8]}")

    async def cancel(self, migration_id: str) -> pb.Migration:
        """See `MigrationService.CancelMigration`."""
        entry = self._entry(migration_id)
        if entry.final or entry.gave_up:
            return entry.migration
        entry.cancelled = Failure(Reason.CANCELLED, "cancelled on request")
        if entry.driver is not None:
            entry.driver.cancel(entry.cancelled)
            self._tell(entry)
        return entry.migration

    def resolve(self, migration_id: str, word: handshake_pb2.OperatorWord) -> pb.Migration:
        """See `MigrationService.ResolveMigration`."""
        entry = self._entry(migration_id)
        migration = entry.migration
        sides = {migration.source_host: "source", migration.destination_host: "destination"}
        if word.dead_host not in sides:
            raise DroverError(
                Reason.HOST_NOT_FOUND,
                f"{word.dead_host} takes no part in migration {migration_id}, which goes from {migration.source_host} to "
                f"{migration.destination_host}",
            )
        if entry.driver is None or entry.final or sides[word.dead_host] not in entry.driver.silent_since:
            raise DroverError(
                Reason.NOT_IN_DOUBT,
                f"migration {migration_id} has ended" if entry.final else f"{word.dead_host} answers, so its own word counts",
                metadata={"host": word.dead_host},
            )
        if not word.HasField("say_time"):
            word.say_time.GetCurrentTime()
        log.warning("declared dead", migration=migration_id, host=word.dead_host, said_by=word.said_by, reason=word.reason)
        entry.driver.declare_dead(sides[word.dead_host], word)
        self._tell(entry)
        return entry.migration

    def get(self, migration_id: str) -> pb.Migration:
        """Raises MIGRATION_NOT_FOUND."""
        return self._entry(migration_id).migration

    def list(self, *, active_only: bool) -> "list[pb.Migration]":
        """The newest first."""
        return sorted((e.migration for e in self._entries.values() if not (active_only and e.final)), key=newest_first)

    async def watch(self, migration_id: str, from_revision: int) -> AsyncIterator[pb.Migration]:
        """The migration now, then whenever it has changed since the reader last took it, until it has ended."""
        entry = self._entry(migration_id)
        first = True
        while True:
            changed, migration = entry.changed.next, entry.migration
            if first or migration.revision > from_revision or migration.state in FINAL:
                yield migration
            if migration.state in FINAL:
                return
            first = False
            await changed.wait()

    def _entry(self, migration_id: str) -> _Entry:
        entry = self._entries.get(migration_id)
        if entry is None:
            raise DroverError(
                Reason.MIGRATION_NOT_FOUND,
                f"{self._name} knows no migration {migration_id}; `drover migration list` shows those that it knows",
            )
        return entry

    def _trim(self) -> None:
        ended = [key for key, entry in self._entries.items() if entry.final]
        for key in ended[: max(0, len(ended) - KEEP + 1)]:
            del self._entries[key]

    # ---- driving

    def _driver(self, entry: _Entry, source: Side, destination: Side, plan: Plan | None) -> Driver:
        ref = handshake_pb2.AttemptRef(migration_id=entry.migration.migration_id, attempt=entry.migration.attempt)
        driver = Driver(ref, source.handshake, destination.handshake, plan, lambda: self._update(entry))
        if entry.cancelled is not None:
            driver.cancel(entry.cancelled)
        return driver

    async def _resume(self, entry: _Entry) -> None:
        """Go on after a restart of this process: the records say where."""
        while True:
            try:
                source, destination = await self._directory.ends(entry.migration)
                entry.driver = self._driver(entry, source, destination, resume_plan(entry.migration, source, destination))
                await entry.driver.resume()
            except DroverError as error:
                log.warning("cannot go on yet", migration=entry.migration.migration_id, error=error.message)
                await asyncio.sleep(1.0)
            else:
                break
        await self._run(entry)

    async def _run(self, entry: _Entry, first: Awaitable[None] | None = None) -> None:
        """Drive to the end, make that durable, and tell.

        That the migration was accepted (`first`) is written while its first phase is under way: should this process die
        before it is, the source's agent ends what has begun, and nobody has to remember.
        """
        driver = entry.driver
        if driver is None:
            return
        try:
            await asyncio.gather(driver.run(), _kept(first, entry.migration.migration_id))
        except asyncio.CancelledError:
            if (task := asyncio.current_task()) is None or task.cancelling():
                raise
            log.error("a driver was broken off, and nobody asked for it", migration=entry.migration.migration_id, exc_info=True)
            await asyncio.sleep(1.0)
            entry.task = asyncio.create_task(self._resume(entry), name=f"resume {entry.migration.migration_id[:8]}")
            return
        except Exception:
            log.critical("the driver stopped on an impossible state", migration=entry.migration.migration_id, exc_info=True)
            entry.driver, entry.gave_up = None, True
            self._publish(entry, impossible(entry.migration))
            self._ended.ring()
            return
        self._publish(entry, describe(entry.migration, driver, time.time(), ended=True))
        entry.driver = None
        await _kept(self._save(entry), entry.migration.migration_id)
        self._ended.ring()

    def _update(self, entry: _Entry) -> None:
        """The driver learned something: let it act on that first, then tell the readers. Its end is told by `_run`."""
        if entry.telling is None:
            entry.telling = asyncio.get_running_loop().call_later(TELL_SECONDS, self._tell, entry)

    def _tell(self, entry: _Entry) -> None:
        entry.telling = None
        if entry.driver is not None and entry.migration.migration_id in self._entries:
            self._publish(entry, describe(entry.migration, entry.driver, time.time(), ended=False))
            if self._fencing is not None and entry.fencing is None and entry.driver.outcome_unknown:
                entry.fencing = asyncio.create_task(self._fence(entry, self._fencing))

    async def _fence(self, entry: _Entry, config: FencingConfig) -> None:
        """While the outcome stays unknown, make sure that the one host which does not answer is dead, and say so."""
        while (driver := entry.driver) is not None and driver.outcome_unknown:
            side, migration = driver.hangs_on, entry.migration
            missing = config.after_seconds - driver.silent_for(side)
            if missing > 0:
                await asyncio.sleep(missing)
                continue
            host = migration.source_host if side == "source" else migration.destination_host
            outcome = await fence(config, host)
            if outcome is not None and driver.hangs_on == side:
                word = handshake_pb2.OperatorWord(dead_host=host, reason=outcome[:1000], said_by="fencing command")
                with contextlib.suppress(DroverError):  # it answers after all
                    self.resolve(entry.migration.migration_id, word)
                    break
            await asyncio.sleep(config.after_seconds)
        entry.fencing = None

    def _publish(self, entry: _Entry, migration: pb.Migration) -> None:
        # Rises over restarts too: what a reader knows from an earlier life is older.
        self._revision = max(self._revision + 1, time.time_ns() // 1_000_000)
        migration.revision = self._revision
        entry.migration = migration
        entry.changed.ring()

    async def _save(self, entry: _Entry) -> None:
        migration = entry.migration
        await self._kept.save(migration.migration_id, migration.SerializeToString(), ended=entry.final)


async def _kept(saving: Awaitable[None] | None, migration_id: str) -> None:
    """A migration that cannot be written down goes on all the same: the agents' records are what it rests on."""
    try:
        if saving is not None:
            await saving
    except DroverError as error:
        log.error("a migration was not written down", migration=migration_id, error=error.message)


def _exists(migration_id: str) -> DroverError:
    return DroverError(
        Reason.MIGRATION_EXISTS,
        f"migration {migration_id} exists with another spec; nothing was done. Choose a new UUID for a new migration",
    )


def newest_first(migration: pb.Migration) -> tuple[int, str]:
    return -migration.create_time.ToNanoseconds(), migration.migration_id
