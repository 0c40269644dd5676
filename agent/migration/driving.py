"""The driving of a migration from its first durable moment to its end: first the wait for its slot, then the handshake."""

import asyncio
import functools
from collections.abc import Awaitable, Callable
from typing import Final

import structlog

from agent.handshake.drive.driver import PATIENCE, Driver
from agent.handshake.drive.ends import Chosen, Directory, Side
from agent.handshake.drive.pause import see_pause
from agent.handshake.drive.plan import Plan
from agent.handshake.drive.slots import TRANSFERRING, slot_request
from agent.handshake.drive.view import View
from agent.migration.attempts import begun_or_given_up, follow, is_kept, later_attempt, until_answered
from agent.migration.choice import Chooser
from agent.migration.collection import Collection
from agent.migration.links import links_of, watch_links
from agent.migration.migration import Entry
from agent.migration.planning import resume_plan
from agent.migration.progress import describe, impossible
from agent.migration.sharing import Sharing
from agent.migration.slots import SlotTaker
from agent.migration.tuning import Tuner
from agent.migration.waiting import end_prepared_wait, is_waited_for, look_at_guest, tell_changes
from agent.runtime.alongside import alongside
from agent.runtime.backoff import OTHER_HOST, SLOT, Clock, Pauses
from agent.runtime.errors import DroverError, Reason
from agent.runtime.events import Bus
from agent.runtime.failure import Failure
from agent.runtime.supervision import supervise
from agent.runtime.wire import duration
from drover.agent.v1 import admission_pb2, handshake_pb2
from drover.agent.v1 import migration_pb2 as pb

log = structlog.get_logger()

REPORT_AFTER_SECONDS: Final = 0.01
"""Delay before the news of a driver are published; those that come meanwhile go with them."""


class Runner:
    """Runs the drivers of a collection's entries. `on_told` is called after news of a driver were published."""

    def __init__(
        self,
        name: str,
        directory: Directory,
        collection: Collection,
        choice: Chooser,
        on_told: Callable[[Entry], None],
        bus: Bus,
        clock: Clock,
    ) -> None:
        """`name`: the driver's."""
        self.draining = False
        """The process is stopping: no migration is started, and one that waits for its slot stays as it is, for the next life."""
        self._name = name
        self._directory = directory
        self._collection = collection
        self.sharing = Sharing(collection, directory, clock)
        links = functools.partial(watch_links, collection, directory, clock)
        self.background: dict[str, Callable[[], Awaitable[None]]] = {"share bandwidth": self.sharing.run, "watch links": links}
        """What runs for ever beside the drivers."""
        self._slots = SlotTaker(
            directory, collection, self.sharing, choice, self.new_driver, self._update, lambda: self.draining, clock
        )
        self._on_told = on_told
        self._bus = bus
        self._clock = clock

    def start(self, entry: Entry) -> None:
        """Drive the entry, in a task of its own."""
        entry.task = supervise(f"drive {entry.migration.migration_id[:8]}", functools.partial(self._drive, entry), self._clock)

    def new_driver(self, entry: Entry, chosen: Chosen) -> Driver:
        """Return a driver that begins the entry's attempt."""
        entry.planned_links = links_of(chosen.ends.source.host), links_of(chosen.ends.destination.host)
        return self._driver(entry, chosen.ends.source, chosen.ends.destination, chosen.plan)

    def _driver(self, entry: Entry, source: Side, destination: Side, plan: Plan) -> Driver:
        """Return a driver for the entry, with its cancellation and its statements."""
        request = functools.partial(self._request, entry, plan)
        update = functools.partial(self._update, entry)
        ends = source.handshake, destination.handshake
        driver = Driver(entry.ref, *ends, plan, update, self._bus, self._clock, request)
        driver.calls.start = functools.partial(self.sharing.start, entry)
        driver.slots.may_wait = entry.may_wait
        if entry.any_host:
            driver.slots.may_have("destination")  # its choice has taken it
        entry.planned_at = self._clock.monotonic() if plan.network else float("-inf")  # without one it is planned again first
        if entry.cancelled is not None:
            driver.view.cancel(entry.cancelled)
        for statement in entry.migration.statements:
            driver.view.declare_dead(entry.side(statement.dead_host), statement)
        return driver

    def _request(self, entry: Entry, plan: Plan, side: str) -> admission_pb2.AcquireSlotRequest:
        """Return the request for a slot. That of a source has the migration, for its agent to go on with if this driver dies."""
        request = slot_request(entry.migration.migration_id, side, plan)
        request.importance, request.driver = entry.migration.settings.importance, self._name
        if side == "source" and entry.slot_wait and not entry.final:
            request.pending.CopyFrom(entry.as_stored())
            request.peer_agent = plan.destination_agent
        return request

    async def _drive(self, entry: Entry) -> None:
        """Drive to the end. Without a driver (after a restart, a take-over, or a cancelled one), resume from the records."""
        try:
            begins, pauses = entry.driver is not None, Pauses(SLOT, self._clock)
            while await self._drive_attempt(entry, begins=begins):
                begins = False
                await pauses.pause(entry.cancel_asked)
        except asyncio.CancelledError:
            entry.driver = None  # the next one reads the records first
            raise

    async def _drive_attempt(self, entry: Entry, *, begins: bool) -> bool:
        """Drive an attempt to its end. Return whether the migration goes on with the next one. `begins`: it was started just now."""
        if entry.driver is None and not entry.unbegun:
            await self._take_up(entry)
        if entry.unbegun or (not entry.settled.is_set() and entry.needs_slot):
            try:
                await self._slots.take(entry, patience=0.0 if begins else PATIENCE)
            except DroverError as error:
                if not await self._has_begun(entry, error):
                    forget = begins and (not entry.slot_wait or error is entry.refusal)
                    await self._end_without_slot(entry, error, forget=forget)
                    return False
                await self._note_slot(entry)
                await self._take_up(entry)
            else:
                await self._note_slot(entry)
            self.tell(entry)
        entry.settled.set()
        return await self._run(entry)

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
        return self._driver(entry, source, destination, resume_plan(entry.migration, source, destination))

    # ---- the slot: the guest is still untouched

    async def _has_begun(self, entry: Entry, error: DroverError) -> bool:
        """Return whether the migration has begun all the same, by another driver or in an earlier life; the entry then becomes that
        attempt. Else the guest is untouched, and no driver can begin any more. Hosts that may know are asked until they answer."""
        untouched = not entry.recovered or entry.cancel_asked.is_set() or is_waited_for(error)
        if error is entry.refusal or (untouched and not entry.slot_wait):
            return False
        # Else the source's agent may have taken it over: also from a driver that has heard of no other one, as it stood still.
        entry.asks_others = True
        record = await until_answered(functools.partial(self._ask_others, entry, error), self._clock)
        entry.asks_others = False
        if record is not None:
            followed = entry.changed_to()
            follow(followed, record)
            self._collection.publish(entry, followed)  # `_note_slot` saves it
            entry.follows = True
        return record is not None

    async def _ask_others(self, entry: Entry, refusal: DroverError) -> handshake_pb2.Record | None:
        """See `begun_or_given_up`. None also for hosts that this process knows no more."""
        driver = entry.driver
        if driver is None or driver.view.ref.attempt != entry.migration.attempt:
            try:
                driver = entry.driver = await self._resumed(entry)
            except DroverError as error:
                if error.reason is Reason.HOST_NOT_FOUND:
                    return None
                raise
            driver.slots.may_have("destination")
        if refusal.reason is Reason.MIGRATION_EXISTS:  # the id may be of another migration, which is left as it is
            return await driver.begun_elsewhere()
        ended_by_itself = refusal.reason in (Reason.CANCELLED, Reason.GIVEN_UP) or is_waited_for(refusal)
        why = "" if entry.cancelled or refusal.reason is Reason.CANCELLED else refusal.message
        return await begun_or_given_up(driver, why, both=not ended_by_itself)  # such as for a guest that has left the source

    async def _note_slot(self, entry: Entry) -> None:
        """Note how long the slot took. For one that may wait, save it, however long that takes: from now on the guest may be
        touched, so a later life reads both records before it does anything."""
        noted = entry.changed_to()  # earlier readers keep theirs
        noted.slot_duration.CopyFrom(duration(entry.elapsed))
        entry.migration = noted
        if entry.slot_wait:
            await entry.until_saved(entry.save, self._clock)

    async def _end_without_slot(self, entry: Entry, error: DroverError, *, forget: bool) -> None:
        """End a migration that has no slot; `forget`: remove it unless it was cancelled. The end is saved before it is published, as
        no record holds it: a migration that was published as ended must not begin in the next life of this process."""
        driver, entry.driver = entry.driver, None
        view = driver.view if driver is not None else View(entry.ref, None, lambda: None, self._bus)
        waited = ""
        if entry.slot_wait and is_waited_for(error):
            waited = f"{entry.migration.destination_host} gave no slot within {entry.slot_wait_set:g} s: "
        await look_at_guest(entry, view, self._directory)
        view.cancel(Failure(error.reason, f"{waited}{error.message}", dict(error.metadata)))
        ended = describe(entry.migration, view, entry.elapsed, ended=True, wall=entry.wall)
        forget = forget and entry.cancelled is None
        await self._settle(entry, entry.remove if forget else functools.partial(entry.save, ended))
        self._collection.publish(entry, ended)
        entry.refusal = error if forget else None
        if forget:
            await asyncio.sleep(0)  # lets its watches see its end
            self._collection.remove(entry.migration.migration_id)
        answered = error.reason in (Reason.BUSY, Reason.HOST_CLOSED)  # by both hosts, so that this takes no time
        if driver is not None and answered:
            await driver.slots.release()
        entry.settled.set()
        if driver is not None and not answered:
            await driver.slots.release()
        # A repeated start with the id of a removed one resumes its slot.
        if driver is not None and (driver.may_hold_slot or entry.slot_asked) and not forget:
            await driver.give_back()

    async def _settle(self, entry: Entry, write: Callable[[], Awaitable[None]]) -> None:
        """Save the end, however long that takes. If the log cannot be written, the waiting start fails with that error."""

        def failed(error: DroverError) -> None:
            entry.refusal = error
            entry.settled.set()

        entry.ending = True
        if entry.saving is not None:
            await asyncio.wait({entry.saving})
        await entry.until_saved(write, self._clock, failed)

    # ---- the handshake

    async def _run(self, entry: Entry) -> bool:
        """Run the driver to the end, publish that, and save it if possible: a next life would learn it from the records again.
        Return whether the migration goes on with its next attempt."""
        driver = entry.driver
        if driver is None:
            return False
        entry.tuner = Tuner(
            lambda: entry.migration, entry.changed, driver, functools.partial(self._collection.publish, entry), self._clock
        )
        if entry.tuner.flows:  # an earlier life has begun the transfer: it gets a share before limits are applied
            self.sharing.divide()
        tuning = supervise(f"tune {entry.migration.migration_id[:8]}", entry.tuner.run, self._clock)
        try:
            async with alongside(end_prepared_wait(entry, driver)), alongside(tell_changes(entry, driver, TRANSFERRING)):
                await driver.run()
            await see_pause(driver)
        except Exception:
            log.critical("the driver stopped on an impossible state", migration=entry.migration.migration_id, exc_info=True)
            entry.driver, entry.gave_up = None, True
            self._on_told(entry)
            self._collection.publish(entry, impossible(entry.migration))
            return False
        finally:
            entry.tuner = None
            tuning.cancel()
        await look_at_guest(entry, driver.view, self._directory)
        ended = describe(entry.migration, driver.view, entry.elapsed, ended=True, wall=entry.wall)
        kept = is_kept(driver.view)
        if entry.slot_wait and (changed := await later_attempt(entry, driver, ended, self._clock)) is not None:
            self.sharing.dismiss(entry)
            entry.driver = None
            if not changed.HasField("slot_duration"):
                entry.settled.clear()
            self._collection.publish(entry, changed)
            return True
        if ended.state != pb.MIGRATION_STATE_SUCCEEDED and "source" not in driver.view.silent_since:
            await driver.slots.release("source")  # where Begin was refused, no record has held it, and so none has freed it
        self._collection.publish(entry, ended)
        entry.driver = None
        self._on_told(entry)
        await entry.save_if_possible()
        if (kept or entry.follows) and entry.may_wait:
            await driver.slots.leave(cancelled=entry.cancelled is not None)
        return False

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
