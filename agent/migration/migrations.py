"""Migrations as a resource: start, get, list, watch, cancel. The coordinator and every agent run this same code.

Who serves it differs only in how names become hosts (a `Directory`) and in where migrations are kept (a `MigrationLog`).
"""

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import structlog

from agent.handshake.drive.driver import Driver
from agent.handshake.drive.ends import Directory, Side
from agent.handshake.drive.pause import see_pause
from agent.handshake.drive.plan import Plan
from agent.handshake.host.records import timing_to_proto
from agent.handshake.host.stopwatch import Stopwatch
from agent.hypervisor.guest_fact import fact_of_description
from agent.migration.fencing import Fences, FencingConfig
from agent.migration.migration import FINAL, Entry, MigrationLog
from agent.migration.planning import make_plan, resume_plan
from agent.migration.progress import describe, impossible
from agent.migration.uptime import uptime
from agent.runtime.backoff import OTHER_HOST, SYSTEM_CLOCK, Clock, Pauses
from agent.runtime.bell import Bell
from agent.runtime.errors import DroverError, Reason
from agent.runtime.supervision import supervise
from drover.agent.v1 import handshake_pb2
from drover.agent.v1 import migration_pb2 as pb

log = structlog.get_logger()

KEEP: Final = 1000
"""Migrations that have ended and are kept."""

TELL_SECONDS: Final = 0.01
"""After which readers are told what a driver has learned; what it learned meanwhile is told with it."""


@dataclass(frozen=True)
class _Starting:
    spec: pb.MigrationSpec
    task: "asyncio.Task[pb.Migration]"


class Migrations:
    """Every migration that this process drives or drove."""

    def __init__(
        self,
        name: str,
        directory: Directory,
        kept: MigrationLog,
        fencing: FencingConfig | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._name = name
        self._clock = clock
        self._fences = Fences(fencing) if fencing is not None else None
        self._directory = directory
        self._kept = kept
        self._entries: dict[str, Entry] = {}
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
            entry = self._entries[migration.migration_id] = Entry(migration, self._kept)
            if not entry.final:
                entry.task = self._driving(entry)

    async def close(self) -> None:
        """Let go of every driver; the records remain, and the source ends what runs."""
        tasks: list[asyncio.Task[Any]] = [starting.task for starting in self._starting.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for entry in self._entries.values():
            if entry.telling is not None:
                entry.telling.cancel()
        tasks = [task for entry in self._entries.values() for task in (entry.task, entry.fencing, entry.saving) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._fences is not None:
            await self._fences.close()

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
        """See `MigrationService.StartMigration`. Goes on when its caller goes away; the answer is given once the log has it."""
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
        began, moment, watch = time.time(), uptime(), Stopwatch("plan")
        if self.draining:
            raise DroverError(Reason.DRAINING, f"{self._name} is stopping and starts no new migration", retry_after=5.0)
        ends = await self._directory.find(spec)
        planned = timing_to_proto(watch.timing)
        planned.hypervisor_duration.CopyFrom(ends.guest.hypervisor_duration)
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
            timings=[planned],
            driver=self._name,
            create_uptime=moment,
        )
        migration.create_time.FromNanoseconds(int(began * 1e9))
        entry = Entry(migration, self._kept)
        entry.driver = self._driver(entry, ends.source, ends.destination, plan)
        await entry.driver.reserve()
        # Durable before it is acknowledged. Where it cannot be written, the guest was not touched and the slot ends with its lease;
        # the same request again takes up the same slot.
        await entry.save()
        self._trim()
        self._entries[migration_id] = entry
        self._tell(entry)
        accepted = entry.migration
        entry.task = self._driving(entry)
        return accepted

    def take_over(self, migration: pb.Migration) -> None:
        """Drive to its end what another driver has begun and left; nothing where that is done here already."""
        entry = self._entries.get(migration.migration_id)
        if entry is not None and not entry.final:
            return
        self._trim()
        entry = self._entries[migration.migration_id] = Entry(migration, self._kept)
        self._publish(entry, migration)
        entry.task = self._driving(entry)

    async def cancel(self, migration_id: str) -> pb.Migration:
        """See `MigrationService.CancelMigration`. The driver is told at once; the answer is given once the log has it.

        Raises MIGRATION_NOT_FOUND, JOURNAL_UNAVAILABLE (the driver was told, but a restart now would forget it).
        """
        entry = self._entry(migration_id)
        if entry.final or entry.gave_up:
            return entry.migration
        if entry.cancelled is None:
            cancelled = entry.changed_to(state=pb.MIGRATION_STATE_CANCELLING)
            cancelled.cancel_time.GetCurrentTime()
            self._publish(entry, cancelled)
        if entry.driver is not None and entry.cancelled is not None:
            entry.driver.view.cancel(entry.cancelled)
            self._tell(entry)
        answer = entry.migration
        await entry.save()
        return answer

    async def resolve(self, migration_id: str, statement: handshake_pb2.Statement) -> pb.Migration:
        """See `MigrationService.ResolveMigration`. The host is asked now; only where it does not answer does the statement count,
        once the log has it.

        Raises MIGRATION_NOT_FOUND, HOST_NOT_FOUND, NOT_IN_DOUBT, JOURNAL_UNAVAILABLE; nothing changed then.
        """
        entry = self._entry(migration_id)
        migration, driver, side = entry.migration, entry.driver, entry.side(statement.dead_host)
        if not side:
            raise DroverError(
                Reason.HOST_NOT_FOUND,
                f"{statement.dead_host} takes no part in migration {migration_id}, which goes from {migration.source_host} to "
                f"{migration.destination_host}",
                metadata={"host": statement.dead_host},
            )
        if driver is None or entry.final:
            raise entry.not_in_doubt(statement.dead_host)
        if await driver.answers(side) or entry.driver is not driver:
            raise entry.not_in_doubt(statement.dead_host)
        if not statement.HasField("say_time"):
            statement.say_time.GetCurrentTime()
        others = [other for other in entry.migration.statements if other.dead_host != statement.dead_host]
        stated = entry.changed_to()
        del stated.statements[:]
        stated.statements.extend([*others, statement])
        await entry.save(stated)
        if side not in driver.view.silent_since or entry.driver is not driver:  # it answered meanwhile
            entry.forget_refuted()
            raise entry.not_in_doubt(statement.dead_host)
        log.warning(
            "declared dead", migration=migration_id, host=statement.dead_host, said_by=statement.said_by, reason=statement.reason
        )
        driver.view.declare_dead(side, statement)
        self._tell(entry)
        return entry.migration

    def get(self, migration_id: str) -> pb.Migration:
        """Raises MIGRATION_NOT_FOUND."""
        return self._entry(migration_id).migration

    def list(self, *, active_only: bool) -> "list[pb.Migration]":
        """The newest first."""
        return sorted((e.migration for e in self._entries.values() if not (active_only and e.final)), key=newest_first)

    def active_at(self, host: str) -> Sequence[str]:
        """Ids of migrations from or to that host that have not ended."""
        return [key for key, entry in self._entries.items() if not entry.final and entry.side(host)]

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

    def _entry(self, migration_id: str) -> Entry:
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

    def _driver(self, entry: Entry, source: Side, destination: Side, plan: Plan | None) -> Driver:
        ref = handshake_pb2.AttemptRef(migration_id=entry.migration.migration_id, attempt=entry.migration.attempt)
        driver = Driver(ref, source.handshake, destination.handshake, plan, lambda: self._update(entry), self._clock)
        if entry.cancelled is not None:
            driver.view.cancel(entry.cancelled)
        for statement in entry.migration.statements:
            driver.view.declare_dead(entry.side(statement.dead_host), statement)
        return driver

    def _driving(self, entry: Entry) -> asyncio.Task[None]:
        return supervise(f"drive {entry.migration.migration_id[:8]}", functools.partial(self._drive, entry), self._clock)

    async def _drive(self, entry: Entry) -> None:
        """To its end. Without a driver (after a restart of this process, as a take-over, or once one was broken off), the records
        say where to go on.
        """
        try:
            if entry.driver is None:
                await self._take_up(entry)
            await self._run(entry)
        except asyncio.CancelledError:
            entry.driver = None  # the next one looks first
            raise

    async def _take_up(self, entry: Entry) -> None:
        pauses = Pauses(OTHER_HOST, self._clock)
        while True:
            try:
                source, destination = await self._directory.ends(entry.migration)
                entry.driver = self._driver(entry, source, destination, resume_plan(entry.migration, source, destination))
                await entry.driver.resume()
            except DroverError as error:
                log.warning("cannot go on yet", migration=entry.migration.migration_id, error=error.message)
                await pauses.pause()
            else:
                return

    async def _run(self, entry: Entry) -> None:
        """Drive to the end, tell, and make that durable: a next life would learn it from the records again."""
        driver = entry.driver
        if driver is None:
            return
        try:
            await driver.run()
            await see_pause(driver)
        except Exception:
            log.critical("the driver stopped on an impossible state", migration=entry.migration.migration_id, exc_info=True)
            entry.driver, entry.gave_up = None, True
            self._fence_if_in_doubt(entry)
            self._publish(entry, impossible(entry.migration))
            self._ended.ring()
            return
        self._publish(entry, describe(entry.migration, driver.view, entry.elapsed, ended=True, wall=entry.wall))
        entry.driver = None
        self._fence_if_in_doubt(entry)
        await entry.save_if_possible()
        self._ended.ring()

    def _update(self, entry: Entry) -> None:
        """The driver learned something: let it act on that first, then tell the readers. Its end is told by `_run`."""
        if entry.telling is None:
            entry.telling = asyncio.get_running_loop().call_later(TELL_SECONDS, self._tell, entry)

    def _tell(self, entry: Entry) -> None:
        entry.telling = None
        if entry.driver is not None and entry.migration.migration_id in self._entries:
            self._publish(entry, describe(entry.migration, entry.driver.view, entry.elapsed, ended=False, wall=entry.wall))
            entry.forget_refuted()
            self._fence_if_in_doubt(entry)

    def _fence_if_in_doubt(self, entry: Entry) -> None:
        """Start, or end, the wait for the fencing of the one host on which the outcome hangs."""
        driver = entry.driver
        side = driver.view.hangs_on if driver is not None and self._fences is not None else ""
        if side == entry.fenced_side:
            return
        if entry.fencing is not None:
            entry.fencing.cancel()
        entry.fenced_side = side
        if side and driver is not None and self._fences is not None:
            fencing = functools.partial(self._fence, entry, driver, side, self._fences)
            entry.fencing = supervise(f"fence {entry.migration.migration_id[:8]}", fencing)

    async def _fence(self, entry: Entry, driver: Driver, side: str, fences: Fences) -> None:
        """Until that host is dead for certain, and the statement about it was taken. Cancelled when it answers."""
        host = entry.migration.source_host if side == "source" else entry.migration.destination_host
        while True:
            outcome = await fences.dead(host, lambda: driver.view.silent_for(side))
            statement = handshake_pb2.Statement(dead_host=host, reason=outcome, said_by="fencing command")
            try:
                await self.resolve(entry.migration.migration_id, statement)
            except DroverError as error:
                log.warning("the fencing command's word was not taken", host=host, error=error.message)
                await asyncio.sleep(fences.after_seconds)
            else:
                return

    def _publish(self, entry: Entry, migration: pb.Migration) -> None:
        # Rises over restarts too: what a reader knows from an earlier life is older.
        self._revision = max(self._revision + 1, time.time_ns() // 1_000_000)
        migration.revision = self._revision
        entry.migration = migration
        entry.changed.ring()


def _exists(migration_id: str) -> DroverError:
    return DroverError(
        Reason.MIGRATION_EXISTS,
        f"migration {migration_id} exists with another spec; nothing was done. Choose a new UUID for a new migration",
    )


def newest_first(migration: pb.Migration) -> tuple[int, str]:
    return -migration.create_time.ToNanoseconds(), migration.migration_id
