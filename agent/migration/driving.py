"""The driving of a migration from its first durable moment to its end: first the wait for its slot, then the handshake."""

import asyncio
import contextlib
import functools
from collections.abc import Awaitable, Callable
from typing import Final

import structlog

from agent.handshake.drive.driver import PATIENCE, Driver
from agent.handshake.drive.ends import Directory, Side
from agent.handshake.drive.pause import see_pause
from agent.handshake.drive.plan import Plan
from agent.handshake.drive.view import View
from agent.handshake.machines.destination import DestinationState
from agent.hypervisor.guest_fact import fact_of_description
from agent.migration.collection import Collection
from agent.migration.migration import Entry
from agent.migration.planning import check_same_hosts, make_plan, resume_plan, same_guest
from agent.migration.progress import describe, impossible, slot_waited_for
from agent.migration.sharing import Sharing
from agent.migration.tuning import Tuner
from agent.migration.uptime import age_of
from agent.migration.waiting import LATEST_START, PLAN_SECONDS, WAITED_FOR, unless_cancelled
from agent.migration.whereabouts import whereabouts
from agent.runtime.backoff import OTHER_HOST, RESTART, SLOT, STORE, Clock, Pauses
from agent.runtime.errors import DroverError, Reason
from agent.runtime.events import Bus
from agent.runtime.failure import Failure
from agent.runtime.supervision import supervise
from agent.runtime.wire import duration
from drover.agent.v1 import handshake_pb2

log = structlog.get_logger()

REPORT_AFTER_SECONDS: Final = 0.01
"""Delay before the news of a driver are published; those that come meanwhile go with them."""


class Runner:
    """Runs the drivers of a collection's entries. `on_told` is called after news of a driver were published."""

    def __init__(
        self, directory: Directory, collection: Collection, on_told: Callable[[Entry], None], bus: Bus, clock: Clock
    ) -> None:
        self.draining = False
        """The process is stopping: no migration is started, and one that waits for its slot stays as it is, for the next life."""
        self._directory = directory
        self._collection = collection
        self.sharing = Sharing(collection, directory, clock)
        self._on_told = on_told
        self._bus = bus
        self._clock = clock

    def start(self, entry: Entry) -> None:
        """Drive the entry, in a task of its own."""
        entry.task = supervise(f"drive {entry.migration.migration_id[:8]}", functools.partial(self._drive, entry), self._clock)

    def driver(self, entry: Entry, source: Side, destination: Side, plan: Plan | None) -> Driver:
        """Return a driver for the entry, with its cancellation and its statements."""
        update = functools.partial(self._update, entry)
        driver = Driver(entry.ref, source.handshake, destination.handshake, plan, update, self._bus, self._clock)
        driver.calls.start = functools.partial(self.sharing.start, entry)
        entry.planned_at = self._clock.monotonic()
        if entry.cancelled is not None:
            driver.view.cancel(entry.cancelled)
        for statement in entry.migration.statements:
            driver.view.declare_dead(entry.side(statement.dead_host), statement)
        return driver

    async def _drive(self, entry: Entry) -> None:
        """Drive to the end. Without a driver (after a restart, a take-over, or a cancelled one), resume from the records."""
        try:
            begins = entry.driver is not None
            if entry.driver is None and not entry.unbegun:
                await self._take_up(entry)
            if entry.unbegun or (not entry.settled.is_set() and entry.needs_slot):
                try:
                    await self._take_slot(entry, patience=0.0 if begins else PATIENCE)
                except DroverError as error:
                    if not await self._is_driven_elsewhere(entry, error):
                        forget = begins and (not entry.slot_wait or error is entry.refusal)
                        await self._end_without_slot(entry, error, forget=forget)
                        return
                    await self._note_slot(entry)
                    await self._take_up(entry)
                else:
                    await self._note_slot(entry)
                self.tell(entry)
            entry.settled.set()
            await self._run(entry)
        except asyncio.CancelledError:
            entry.driver = None  # the next one reads the records first
            raise

    async def _take_up(self, entry: Entry) -> None:
        pauses = Pauses(OTHER_HOST, self._clock)
        while True:
            try:
                entry.driver = await self._resumed(entry)
                await entry.driver.resume(pending=not entry.settled.is_set())
            except DroverError as error:
                log.warning("a migration cannot be resumed yet", migration=entry.migration.migration_id, error=error.message)
                await pauses.pause()
            else:
                return

    async def _resumed(self, entry: Entry) -> Driver:
        source, destination = await self._directory.ends(entry.migration)
        return self.driver(entry, source, destination, resume_plan(entry.migration, source, destination))

    # ---- the slot: the guest is still untouched

    async def _is_driven_elsewhere(self, entry: Entry, error: DroverError) -> bool:
        """Return whether another driver of this migration, which may wait, is past the slot that is refused: the guest may have left
        the source by it."""
        if not entry.unbegun or entry.cancel_asked.is_set() or error.reason in WAITED_FOR:
            return False
        if entry.driver is None:
            with contextlib.suppress(DroverError):
                entry.driver = await self._resumed(entry)
        return entry.driver is not None and await entry.driver.is_past_its_slot()

    async def _note_slot(self, entry: Entry) -> None:
        """Note how long the slot took. For one that may wait, save it, however long that takes: from now on the guest may be
        touched, so a later life reads both records before it does anything."""
        noted, pauses = entry.changed_to(), Pauses(STORE, self._clock)  # earlier readers keep theirs
        noted.slot_duration.CopyFrom(duration(entry.elapsed))
        entry.migration = noted
        while entry.slot_wait:
            try:
                await entry.save()
            except DroverError as error:
                log.error("a migration was not saved", migration=entry.migration.migration_id, error=error.message)
                await pauses.pause()
            else:
                return

    async def _take_slot(self, entry: Entry, patience: float) -> None:
        """Reserve the slot, with retries as long as the migration may wait for it, and for `patience` seconds unless the destination
        is busy. Raises CANCELLED at once on request, else the last error. After HOST_UNREACHABLE, CANCELLED and DEADLINE_EXCEEDED
        the slot may have been taken."""
        if entry.refusal is not None:  # its first save failed
            raise entry.refusal
        clock, pauses = self._clock.monotonic, Pauses(SLOT, self._clock)
        patient_until = clock() + patience
        if entry.recovered and entry.slot_wait:
            await Pauses(RESTART, self._clock).pause(entry.cancel_asked)
        while True:
            try:
                await unless_cancelled(entry.cancel_asked, lambda: self._reserve(entry))
            except DroverError as error:
                entry.slot_asked = entry.slot_asked or (entry.driver is not None and entry.driver.may_hold_slot)
                left = max(entry.slot_wait_left, 0.0 if error.reason is Reason.BUSY else patient_until - clock())
                if patience and not entry.unbegun and error.reason not in WAITED_FOR and await self._has_begun(entry):
                    return
                if left <= 0 or error.reason not in WAITED_FOR:
                    raise
                self._show_wait(entry, error)
            else:
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await pauses.pause(entry.cancel_asked)
            if self.draining:
                entry.parked = True
                self._collection.changed.ring()
                await asyncio.Event().wait()  # until this task is cancelled

    async def _has_begun(self, entry: Entry) -> bool:
        """Return whether a migration of an earlier life is past its slot, from the destination's record, however long reading takes.
        The guest may have left the source by this migration, and the source may have forgotten its record."""
        if entry.driver is None or entry.cancel_asked.is_set():
            return False
        await unless_cancelled(entry.cancel_asked, entry.driver.resume)
        return not entry.driver.view.untouched

    async def _reserve(self, entry: Entry) -> None:
        """Reserve the slot once, with a plan that is not old."""
        if entry.recovered and not entry.slot_wait and (age := age_of(entry.migration)[0]) > LATEST_START:
            text = f"the driver went away before it had a slot, and came back {age:.0f} s after the request, too late for a start "
            raise DroverError(Reason.DRIVER_SILENT, f"{text}that may not wait. The guest was not touched; start a new migration")
        if entry.lost_its_slot:
            await self._next_attempt(entry)
        try:
            await (await self._ready(entry)).reserve()
        except DroverError as error:
            over = error.reason is Reason.WRONG_PHASE and error.metadata.get("state") == DestinationState.GONE
            if not (over and (entry.recovered or entry.slot_asked)):
                raise
            # An earlier call took the slot, its answer was lost, and the lease has ended.
            await self._next_attempt(entry)
            await (await self._ready(entry)).reserve()

    async def _ready(self, entry: Entry) -> Driver:
        """Return a driver that can reserve the slot of the present attempt: the entry's, or one with a new plan."""
        driver = entry.driver
        old = self._clock.monotonic() - entry.planned_at > PLAN_SECONDS
        if driver is None or old or not driver.calls.can_reserve or driver.view.ref.attempt != entry.migration.attempt:
            driver = entry.driver = await self._planned_again(entry)
        return driver

    async def _next_attempt(self, entry: Entry) -> None:
        """Save the migration with its next attempt, then publish it. What changes during a save, such as by a cancel, is kept."""
        attempt = entry.migration.attempt + 1
        self._collection.publish(entry, await entry.save_changed(lambda again: setattr(again, "attempt", attempt)))

    async def _planned_again(self, entry: Entry) -> Driver:
        """Query both hosts and plan again: the guest's requirements are not stored over a restart."""
        spec = same_guest(entry.migration)
        try:
            ends = await self._directory.find(spec)
        except DroverError as error:
            if error.reason is Reason.DOMAIN_NOT_FOUND:
                self._publish_fact(entry, handshake_pb2.GuestFact())  # another migration may have moved it
            raise
        self._publish_fact(entry, fact_of_description(ends.guest.domain))
        plan, _ = make_plan(spec, ends, self._collection.network_uses(but=entry.migration.migration_id))
        check_same_hosts(entry.migration, plan)
        again = entry.changed_to(network=plan.network)
        again.network_choice.CopyFrom(plan.network_choice)
        again.options.CopyFrom(plan.options)
        self._collection.publish(entry, again)
        return self.driver(entry, ends.source, ends.destination, plan)

    def _publish_fact(self, entry: Entry, fact: handshake_pb2.GuestFact) -> None:
        """Publish what the source's hypervisor reports of the untouched guest; an empty fact: it does not know the guest."""
        seen = entry.changed_to()
        seen.source_guest.CopyFrom(fact)
        seen.runs_on = whereabouts(seen).runs_on
        self._collection.publish(entry, seen)

    def _show_wait(self, entry: Entry, error: DroverError) -> None:
        if entry.driver is not None:
            if error.metadata.get("peer") == entry.migration.destination_host:
                entry.driver.view.call_failed("destination", error)  # so far only a look for it has failed
            entry.driver.view.waiting_for = slot_waited_for(entry.migration.destination_host, error)
            self._update(entry)

    async def _end_without_slot(self, entry: Entry, error: DroverError, *, forget: bool) -> None:
        """End a migration that has no slot; `forget`: remove it unless it was cancelled. The end is saved before it is published, as
        no record holds it: a migration that was published as ended must not begin in the next life of this process."""
        driver, entry.driver = entry.driver, None
        view = driver.view if driver is not None else View(entry.ref, None, lambda: None, self._bus)
        waited = ""
        if entry.slot_wait and error.reason in WAITED_FOR:
            waited = f"{entry.migration.destination_host} gave no slot within {entry.slot_wait:g} s: "
        view.cancel(Failure(error.reason, f"{waited}{error.message}", dict(error.metadata)))
        ended = describe(entry.migration, view, entry.elapsed, ended=True, wall=entry.wall)
        forget = forget and entry.cancelled is None
        await self._settle(entry, entry.remove if forget else functools.partial(entry.save, ended))
        self._collection.publish(entry, ended)
        entry.refusal = error if forget else None
        if forget:
            await asyncio.sleep(0)  # lets its watches see its end
            self._collection.remove(entry.migration.migration_id)
        entry.settled.set()
        # A repeated start with the id of a removed one resumes its slot.
        if driver is not None and (driver.may_hold_slot or entry.slot_asked) and not forget:
            await driver.give_back()

    async def _settle(self, entry: Entry, write: Callable[[], Awaitable[None]]) -> None:
        """Save the end, however long that takes. If the log cannot be written, the waiting start fails with that error."""
        pauses = Pauses(STORE, self._clock)
        entry.ending = True
        if entry.saving is not None:
            await asyncio.wait({entry.saving})
        while True:
            try:
                await write()
            except DroverError as error:
                log.error("the end of a migration was not saved", migration=entry.migration.migration_id, error=error.message)
                entry.refusal = error
                entry.settled.set()
                await pauses.pause()
            else:
                return

    # ---- the handshake

    async def _run(self, entry: Entry) -> None:
        """Run the driver to the end, publish that, and save it if possible: a next life would learn it from the records again."""
        driver = entry.driver
        if driver is None:
            return
        entry.tuner = Tuner(
            lambda: entry.migration, entry.changed, driver, functools.partial(self._collection.publish, entry), self._clock
        )
        tuning = supervise(f"tune {entry.migration.migration_id[:8]}", entry.tuner.run, self._clock)
        try:
            await driver.run()
            await see_pause(driver)
        except Exception:
            log.critical("the driver stopped on an impossible state", migration=entry.migration.migration_id, exc_info=True)
            entry.driver, entry.gave_up = None, True
            self._on_told(entry)
            self._collection.publish(entry, impossible(entry.migration))
            return
        finally:
            entry.tuner = None
            tuning.cancel()
        self._collection.publish(entry, describe(entry.migration, driver.view, entry.elapsed, ended=True, wall=entry.wall))
        entry.driver = None
        self._on_told(entry)
        await entry.save_if_possible()

    def _update(self, entry: Entry) -> None:
        """Publish what the driver has learned, after it had time to act on that. Its end is published by `_run`."""
        if entry.telling is None:
            entry.telling = asyncio.get_running_loop().call_later(REPORT_AFTER_SECONDS, self.tell, entry)

    def tell(self, entry: Entry) -> None:
        """Publish what the entry's driver knows now."""
        entry.telling = None
        if entry.driver is not None and self._collection.find(entry.migration.migration_id) is entry:
            migration = describe(entry.migration, entry.driver.view, entry.elapsed, ended=False, wall=entry.wall)
            self._collection.publish(entry, migration)
            entry.forget_refuted()
            self._on_told(entry)
