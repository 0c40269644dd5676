"""Migrations as resources: start, get, list, watch, cancel, resolve. The coordinator and every agent run this code; they differ only
in how they find hosts by name (a `Directory`) and where they store migrations (a `MigrationLog`)."""

import asyncio
import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import structlog
from google.protobuf.field_mask_pb2 import FieldMask

from agent.handshake.drive.driver import Driver
from agent.handshake.drive.ends import Directory
from agent.handshake.drive.view import statement_event
from agent.handshake.host.records import timing_to_proto
from agent.handshake.host.stopwatch import Stopwatch
from agent.migration.choice import Chooser
from agent.migration.collection import Collection, life_of
from agent.migration.driving import Runner
from agent.migration.fencing import Fences, FencingConfig
from agent.migration.migration import Entry, MigrationLog
from agent.migration.planning import planned
from agent.migration.settings import check, check_downtime_kept, updated
from agent.migration.uptime import uptime
from agent.migration.waiting import check_asked
from agent.runtime.backoff import SYSTEM_CLOCK, Clock
from agent.runtime.errors import DroverError, Reason
from agent.runtime.events import Bus
from agent.runtime.supervision import supervise
from agent.runtime.wire import duration
from drover.agent.v1 import handshake_pb2
from drover.agent.v1 import migration_pb2 as pb

log = structlog.get_logger()

MOST_WAITING: Final = 1000
"""Most migrations that wait for their slots: each is in memory, and asks for its slot every few seconds."""


@dataclass(frozen=True)
class _Starting:
    spec: pb.MigrationSpec
    waits: bool
    task: "asyncio.Task[Entry]"


class Migrations:
    """Every migration that this process drives or drove."""

    def __init__(
        self,
        name: str,
        directory: Directory,
        kept: MigrationLog,
        bus: Bus,
        fencing: FencingConfig | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._name = name
        self._bus = bus
        self._fences = Fences(fencing) if fencing is not None else None
        self._directory = directory
        self._kept = kept
        self.collection = Collection(name, bus)
        """To get, list and watch them."""
        self._choice = Chooser(directory, self.collection, name)
        self.runner = Runner(name, directory, self.collection, self._choice, self._fence_if_in_doubt, bus, clock)
        self._work: list[asyncio.Task[Any]] = []
        self._starting: dict[str, _Starting] = {}

    # ---- life

    async def recover(self) -> None:
        """Load the stored migrations, and resume those that have not ended."""
        entries = [Entry(pb.Migration.FromString(body), self._kept, recovered=True) for body in await self._kept.load()]
        newest = max((entry.migration.revision for entry in entries), default=0)
        self.collection.open(await self._kept.next_life(life_of(newest)), entries)
        for entry in entries:
            if not entry.final:
                self.collection.publish(entry, entry.changed_to())  # an earlier life may have published more than it saved
                self.runner.start(entry)
        self._work += [supervise(name, work) for name, work in self.runner.background.items()]

    async def close(self) -> None:
        """Cancel every driver; the records remain, and the source's agent ends what runs."""
        tasks = [*self._work, *(starting.task for starting in self._starting.values())]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        entries = self.collection.all()
        for entry in entries:
            if entry.telling is not None:
                entry.telling.cancel()
        tasks = [task for entry in entries for task in (entry.task, entry.fencing, entry.saving) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._fences is not None:
            await self._fences.close()

    async def idle(self, timeout: float) -> bool:
        """Wait until all have ended but those that wait for their slot (the next life drives them). Return False on timeout."""
        try:
            async with asyncio.timeout(timeout):
                while self._starting or any(entry.busy for entry in self.collection.all()):
                    await self.collection.changed.next.wait()
        except TimeoutError:
            return False
        return True

    # ---- calls

    async def start(self, migration_id: str, spec: pb.MigrationSpec, slot_wait: float = 0.0) -> pb.Migration:
        """See `MigrationService.StartMigration`. Goes on when the caller is cancelled; the migration is durable when it returns."""
        check_asked(spec, slot_wait)
        entry = self.collection.find(migration_id)
        if entry is None:
            if migration_id not in self._starting:
                self._check_accepts(waits=bool(slot_wait))
                task = asyncio.create_task(self._start(migration_id, spec, slot_wait), name=f"start {migration_id[:8]}")
                self._starting[migration_id] = _Starting(spec, bool(slot_wait), task)
                task.add_done_callback(lambda _: self._started(migration_id))
            starting = self._starting[migration_id]
            if starting.spec != spec:
                raise _exists(migration_id)
            entry = await asyncio.shield(starting.task)
        elif entry.migration.spec != spec:
            raise _exists(migration_id)
        return await entry.accepted()

    def _check_accepts(self, *, waits: bool) -> None:
        """Raise DRAINING, or OVERLOADED for one that may wait for its slot, if no new migration is accepted now."""
        if self.runner.draining:
            raise DroverError(Reason.DRAINING, f"{self._name} is stopping and starts no new migration", retry_after=5.0)
        starting = sum(starting.waits for starting in self._starting.values())
        if waits and starting + sum(entry.waits for entry in self.collection.all()) >= MOST_WAITING:
            text = f"{MOST_WAITING} migrations already wait for their slots at {self._name}, the most it accepts; nothing was done"
            raise DroverError(Reason.OVERLOADED, text, retry_after=5.0)

    def _started(self, migration_id: str) -> None:
        task = self._starting.pop(migration_id).task
        self.collection.planned.pop(migration_id, None)
        if not task.cancelled():
            task.exception()  # retrieved, as no caller may be left
        self.collection.changed.ring()

    async def _start(self, migration_id: str, spec: pb.MigrationSpec, slot_wait: float) -> Entry:
        """Query both hosts and plan, make the migration durable, and start its driver."""
        began, moment, watch = time.time(), uptime(), Stopwatch("plan")
        chosen = await self._choice.first(migration_id, spec, may_wait=bool(slot_wait))
        timing = timing_to_proto(watch.timing)
        timing.hypervisor_duration.CopyFrom(chosen.ends.guest.hypervisor_duration)
        migration = planned(migration_id, spec, chosen.plan, chosen.warnings, chosen.ends.guest)
        migration.timings.append(timing)
        migration.driver = self._name
        migration.create_uptime.CopyFrom(moment)
        migration.create_time.FromNanoseconds(int(began * 1e9))
        if slot_wait:
            migration.slot_wait.CopyFrom(duration(slot_wait))
            migration.settings.slot_wait.CopyFrom(migration.slot_wait)
        self.collection.number(migration)
        self.collection.planned[migration_id] = migration
        entry = Entry(migration, self._kept)
        driver = entry.driver = self.runner.new_driver(entry, chosen)
        if not slot_wait:
            driver.slots.begin("source")  # while the migration is being saved
        try:
            await entry.save()
        except DroverError as error:
            if error.metadata.get("written") == "no":
                await driver.slots.release()
                raise
            entry.refusal, entry.ending = error, True  # a row may be there: its driver removes it before anything else
        except asyncio.CancelledError:
            await entry.remove()  # the save goes on without its caller
            raise
        self.collection.publish(entry, migration)
        self.runner.start(entry)
        return entry

    def take_over(self, migration: pb.Migration) -> None:
        """Drive a lost driver's migration to its end, unless it is driven here. Raises DRAINING, OVERLOADED for one that waits."""
        if (entry := self.collection.find(migration.migration_id)) is not None and not entry.final:
            return
        if migration.HasField("slot_wait"):
            self._check_accepts(waits=True)
        entry = Entry(migration, self._kept)
        self.collection.publish(entry, migration)
        entry.slot_asked = entry.unbegun  # the other driver may have asked for the slot
        if entry.slot_wait:  # no record holds its wait
            entry.saving = asyncio.create_task(entry.save_if_possible(), name=f"save {migration.migration_id[:8]}")
        self.runner.start(entry)

    async def cancel(self, migration_id: str) -> pb.Migration:
        """See `MigrationService.CancelMigration`. The driver acts at once; returns once the request is durable.

        Raises MIGRATION_NOT_FOUND, JOURNAL_UNAVAILABLE (the driver acts, but a restart now would lose the request)."""
        entry = await self._started_entry(migration_id)
        if entry.final or entry.gave_up:
            return entry.migration
        if entry.cancelled is None:
            cancelled = entry.changed_to(state=pb.MIGRATION_STATE_CANCELLING)
            cancelled.cancel_time.GetCurrentTime()
            self.collection.publish(entry, cancelled)
            entry.cancel_asked.set()
        if entry.driver is not None and entry.cancelled is not None:
            entry.driver.view.cancel(entry.cancelled)
            self.runner.tell(entry)
        answer = entry.migration
        await entry.save()
        return answer

    async def _started_entry(self, migration_id: str) -> Entry:
        """Return a migration whose start is not under way any more. Raises MIGRATION_NOT_FOUND, the error of its start."""
        if (starting := self._starting.get(migration_id)) is not None:
            await asyncio.wait({starting.task})
        entry = self.collection.get(migration_id)
        if entry.ending:
            await entry.settled.wait()
            if entry.refusal is not None and not entry.final:
                raise entry.refusal
        return entry

    async def update(self, migration_id: str, given: pb.MigrationSettings, mask: FieldMask) -> pb.Migration:
        """See `MigrationService.UpdateMigration`. Returns once the change is durable, and applied to a transfer that runs.

        Raises MIGRATION_NOT_FOUND, MIGRATION_ENDED, INVALID_FIELD, BANDWIDTH_UNSUPPORTED, BANDWIDTH_INSUFFICIENT,
        JOURNAL_UNAVAILABLE; nothing has changed then. HOST_UNREACHABLE, HYPERVISOR_UNAVAILABLE: it is saved, and will be applied."""
        entry = await self._started_entry(migration_id)
        features = (await self._directory.source(entry.migration)).host.migration_features

        def change(migration: pb.Migration) -> None:
            settings = updated(migration.settings, given, mask)
            check(settings, features, f"the source {migration.source_host}")
            if entry.tuner is not None and entry.tuner.flows:
                check_downtime_kept(migration.settings, settings)
            before = migration.settings.min_bandwidth_bytes_per_second
            migration.settings.CopyFrom(settings)
            self.runner.sharing.check(migration, alone=entry.waits, before=before)

        async with entry.updating:
            self.collection.publish(entry, await entry.save_changed(change))
            self.runner.sharing.divide()
        entry.settings_changed.ring()
        if entry.tuner is not None:
            await entry.tuner.applied()
        return entry.migration

    async def resolve(self, migration_id: str, statement: handshake_pb2.Statement) -> pb.Migration:
        """See `MigrationService.ResolveMigration`. Calls the host first; if it does not answer, the statement counts once it is
        durable.

        Raises MIGRATION_NOT_FOUND, HOST_NOT_FOUND, NOT_IN_DOUBT, JOURNAL_UNAVAILABLE; nothing has changed then."""
        entry = self.collection.get(migration_id)
        migration, driver, side = entry.migration, entry.driver, entry.side(statement.dead_host)
        if not side:
            raise DroverError(
                Reason.HOST_NOT_FOUND,
                f"{statement.dead_host} takes no part in migration {migration_id}, which goes from {migration.source_host} to "
                f"{migration.destination_host}",
                metadata={"host": statement.dead_host},
            )
        if driver is None or entry.final or (entry.unbegun and not entry.asks_others):
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
        self._bus.publish(statement_event(migration_id, statement, "made"))
        driver.view.declare_dead(side, statement)
        self.runner.tell(entry)
        return entry.migration

    def active_at(self, host: str) -> Sequence[str]:
        """Return the ids of migrations from or to that host that have not ended."""
        return [entry.migration.migration_id for entry in self.collection.all() if not entry.final and entry.side(host)]

    # ---- fencing

    def _fence_if_in_doubt(self, entry: Entry) -> None:
        """Start or stop the fencing of the one host on which the outcome depends."""
        driver = entry.driver
        side = driver.view.decisive_side if driver is not None and self._fences is not None else ""
        if side == entry.fenced_side:
            return
        if entry.fencing is not None:
            entry.fencing.cancel()
        entry.fenced_side = side
        if side and driver is not None and self._fences is not None:
            fencing = functools.partial(self._fence, entry, driver, side, self._fences)
            entry.fencing = supervise(f"fence {entry.migration.migration_id[:8]}", fencing)

    async def _fence(self, entry: Entry, driver: Driver, side: str, fences: Fences) -> None:
        """Fence a host until it is dead for certain and the statement about it was accepted. Cancelled when the host answers."""
        host = entry.migration.source_host if side == "source" else entry.migration.destination_host
        while True:
            outcome = await fences.dead(host, lambda: driver.view.silent_for(side))
            statement = handshake_pb2.Statement(dead_host=host, reason=outcome, said_by="fencing command")
            try:
                await self.resolve(entry.migration.migration_id, statement)
            except DroverError as error:
                log.warning("the fencing command's statement was refused", host=host, error=error.message)
                await asyncio.sleep(fences.after_seconds)
            else:
                return


def _exists(migration_id: str) -> DroverError:
    text = f"migration {migration_id} exists with another spec; nothing was done. Choose a new UUID for a new migration"
    return DroverError(Reason.MIGRATION_EXISTS, text)
