"""The slots of a migration whose guest is still untouched: they are taken at once, or waited for, at the named host or at any."""

import asyncio
import contextlib
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from agent.handshake.drive.driver import Driver
from agent.handshake.drive.ends import Chosen, Directory
from agent.handshake.drive.slots import PREPARED
from agent.handshake.machines.destination import DestinationState
from agent.migration.attempts import joins, next_attempt, put_plan
from agent.migration.choice import NOT_THIS_HOST, Chooser
from agent.migration.collection import Collection
from agent.migration.migration import Entry
from agent.migration.planning import as_chosen, check_same_hosts, same_guest
from agent.migration.sharing import Sharing
from agent.migration.uptime import age_of
from agent.migration.waiting import (
    AWAY,
    LATEST_START,
    PASSING,
    PLAN_SECONDS,
    check_not_cordoned,
    fact_of_untouched,
    is_waited_for,
    tell_changes,
    unless_cancelled,
    while_it_may_wait,
)
from agent.migration.waits import error_waited_for, out_of_time
from agent.migration.whereabouts import whereabouts
from agent.runtime.alongside import alongside, outlasting, unless
from agent.runtime.backoff import SLOT, Clock, Pauses
from agent.runtime.errors import DroverError, Reason
from drover.agent.v1 import handshake_pb2
from drover.agent.v1 import migration_pb2 as pb

AWAY_SECONDS: Final = 10.0
"""How long a migration to any host does not try a host again that was away: it may give a slot, and then not take the guest."""

ADVICE_SECONDS: Final = 10.0
"""How long the hosts are shown that could take the guest in place of the one at which it waits: to find them costs calls."""


class _PlanAgain(Exception):  # noqa: N818 - no error
    """The wait goes on with another driver: its plan was old, or its destination has changed."""


@dataclass(frozen=True)
class SlotTaker:
    """Takes the slots of a collection's entries."""

    directory: Directory
    collection: Collection
    sharing: Sharing
    choice: Chooser
    make_driver: Callable[[Entry, Chosen], Driver]
    update: Callable[[Entry], None]
    """Publishes what an entry's driver knows."""
    draining: Callable[[], bool]
    """Whether the process stops, so that nothing new begins."""
    clock: Clock

    async def take(self, entry: Entry, patience: float) -> None:
        """Take both slots, and reserve the destination's: with retries as long as the migration may wait, and for `patience` seconds
        unless a host is busy. Raises CANCELLED at once on request, else the last error. After HOST_UNREACHABLE, CANCELLED and
        DEADLINE_EXCEEDED the slots may have been taken."""
        if entry.refusal is not None:  # its first save failed
            raise entry.refusal
        clock, pauses, last = self.clock.monotonic, Pauses(SLOT, self.clock), None
        patient_until = clock() + patience
        while True:
            links_changed = entry.links_changed.next
            try:
                await unless_cancelled(entry, lambda: while_it_may_wait(entry, lambda: self._once(entry)))
            except _PlanAgain:
                continue
            except TimeoutError:
                raise self._out_of_time(entry, last) from None
            except DroverError as error:
                last = error
                self._note_silence(entry, error)
                self.sharing.dismiss(entry)
                entry.slot_asked = entry.slot_asked or (entry.driver is not None and entry.driver.may_hold_slot)
                left = max(entry.slot_wait_left, 0.0 if error.reason is Reason.BUSY else patient_until - clock())
                try:
                    if await unless_cancelled(entry, functools.partial(self._goes_on, entry, error)):
                        continue
                except DroverError as not_saved:
                    last = not_saved
                if left <= 0 or not is_waited_for(last):
                    raise await self._with_alternatives(entry, last) from None
                self._show_wait(entry, last)
            else:
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await pauses.pause(entry.cancel_asked, links_changed)
            await self._park_if_draining(entry)

    async def _once(self, entry: Entry) -> None:
        """Take the slots once, with a plan that is not old."""
        if entry.recovered and not entry.slot_wait and (age := age_of(entry.migration)[0]) > LATEST_START:
            text = f"the driver went away before it had a slot, and came back {age:.0f} s after the request, too late for a start "
            raise DroverError(Reason.DRIVER_SILENT, f"{text}that may not wait. The guest was not touched; start a new migration")
        if entry.lost_its_slot:
            await next_attempt(self.collection, entry)
        try:
            await self._reserve(entry)
        except DroverError as error:
            over = error.reason is Reason.WRONG_PHASE and error.metadata.get("state") == DestinationState.GONE
            if not (over and (entry.recovered or entry.slot_asked)):
                raise
            # An earlier call took the slot, its answer was lost, and the lease has ended.
            await next_attempt(self.collection, entry)
            await self._reserve(entry)

    async def _reserve(self, entry: Entry) -> None:
        links_changed = entry.links_changed.next
        driver = await self._ready(entry)
        if not entry.slot_wait:
            self.sharing.admit(entry)
            await driver.reserve_at_once()
            return
        self.sharing.check(entry.migration)
        check_not_cordoned(entry, driver, self.directory)
        if entry.recovered:
            await self._check_not_driven_elsewhere(driver)
        wait = functools.partial(driver.slots.acquire, PREPARED, functools.partial(self._meanwhile, entry, driver))
        async with alongside(tell_changes(entry, driver, PREPARED)):
            await unless(links_changed, _PlanAgain(), wait)
        await self._park_if_draining(entry)
        if math.isinf(entry.planned_at):  # the networks were changed while a call waited
            raise _PlanAgain
        check_not_cordoned(entry, driver, self.directory)
        try:
            self.sharing.admit(entry)
            await driver.reserve()
        except DroverError as error:
            if error.reason in (Reason.BANDWIDTH_INSUFFICIENT, Reason.BUSY):  # such as a guest that costs more than was known
                await driver.slots.release(keep_place=True)
            raise

    async def _meanwhile(self, entry: Entry, driver: Driver) -> None:
        """Do what is to be done now and then while it waits. Raises `_PlanAgain`."""
        await self._park_if_draining(entry)
        if driver.slots.other_driver:
            await self._check_not_driven_elsewhere(driver)
        if self._is_old(entry):
            raise _PlanAgain
        if entry.any_host and not driver.slots.other_driver:
            without = {entry.migration.destination_host, *self._unsuitable(entry)}
            chosen = await self.choice.free(entry.migration.migration_id, same_guest(entry.migration), without)
            if chosen is not None:
                await self._move(entry, chosen)
                raise _PlanAgain
        elif self.clock.monotonic() >= entry.advised_until:
            entry.advised_until = self.clock.monotonic() + ADVICE_SECONDS
            driver.view.alternatives = await self._alternatives(entry)

    @staticmethod
    async def _check_not_driven_elsewhere(driver: Driver) -> None:
        """Raise WRONG_PHASE if another driver is past the slots: there is nothing to wait for."""
        begun = None
        with contextlib.suppress(DroverError):  # it is asked until it answers before the wait ends
            begun = await driver.begun_elsewhere()
        if begun is not None:
            raise DroverError(Reason.WRONG_PHASE, "another driver has the slots of this migration, and goes on with it")

    async def _park_if_draining(self, entry: Entry) -> None:
        """Wait until this task is cancelled if the process stops: the next life goes on."""
        if self.draining():
            entry.parked = True
            self.collection.changed.ring()
            await asyncio.Event().wait()

    # ---- plans

    def _is_old(self, entry: Entry) -> bool:
        return self.clock.monotonic() - entry.planned_at > PLAN_SECONDS

    async def _ready(self, entry: Entry) -> Driver:
        """Return a driver that can reserve the slot of the present attempt: the entry's, or one with a new plan."""
        driver = entry.driver
        if (
            driver is None
            or self._is_old(entry)
            or not driver.calls.can_reserve
            or driver.view.ref.attempt != entry.migration.attempt
        ):
            before, driver = driver, await self._planned_again(entry)
            if before is not None:
                driver.slots.replaces(before.slots)
            entry.driver = driver
        return driver

    async def _planned_again(self, entry: Entry) -> Driver:
        """Query both hosts and plan again: the guest's requirements are not stored over a restart."""
        spec = same_guest(entry.migration)
        try:
            ends = await self.directory.find(spec)
        except DroverError as error:
            if error.reason is Reason.DOMAIN_NOT_FOUND:
                self._publish_fact(entry, fact_of_untouched(None))  # another migration may have moved it
            raise
        self._publish_fact(entry, fact_of_untouched(ends.guest.domain))
        chosen = self.choice.plan(entry.migration.migration_id, spec, as_chosen(ends, entry.migration))
        check_same_hosts(entry.migration, chosen.plan)
        again = entry.changed_to()
        put_plan(again, chosen.plan)
        self.collection.publish(entry, again)
        return self.make_driver(entry, replace(chosen, ends=ends))  # by which `links` sees changes

    def _publish_fact(self, entry: Entry, fact: handshake_pb2.GuestFact) -> None:
        """Publish what the source's hypervisor reports of the untouched guest."""
        seen = entry.changed_to()
        seen.source_guest.CopyFrom(fact)
        seen.runs_on = whereabouts(seen).runs_on
        self.collection.publish(entry, seen)

    # ---- another attempt

    async def _goes_on(self, entry: Entry, error: DroverError) -> bool:
        """Return whether it goes on at once after an error: with another host, or with the attempt of another driver."""
        if await self._goes_elsewhere(entry, error) or await joins(self.collection, entry, error):
            return True
        if entry.driver is not None and error.metadata.get("wait") in PASSING:
            await entry.driver.slots.stand_aside()  # nobody shall wait for one that cannot use its slot, nor take it over
        return False

    async def _goes_elsewhere(self, entry: Entry, error: DroverError) -> bool:
        """After an error of the destination of a migration to any host: choose another one. Return whether there is one."""
        driver = entry.driver
        if not entry.any_host or driver is None or driver.slots.at == "source" or not driver.view.untouched:
            return False
        if error.reason not in NOT_THIS_HOST or (error.reason is Reason.BUSY and entry.slot_wait):
            return False
        here = entry.migration.destination_host
        if error.reason is not Reason.HOST_CLOSED:  # the choice asks each host whether it is open
            entry.unsuitable[here] = self.clock.monotonic() + (AWAY_SECONDS if error.reason in AWAY else math.inf)
        spec, may_wait, without = same_guest(entry.migration), bool(entry.slot_wait), {here, *self._unsuitable(entry)}
        try:
            chosen = await self.choice.choose(entry.migration.migration_id, spec, may_wait=may_wait, without=without)
        except DroverError:
            return False
        await self._move(entry, chosen)
        return True

    def _unsuitable(self, entry: Entry) -> set[str]:
        return {host for host, until in entry.unsuitable.items() if until > self.clock.monotonic()}

    async def _move(self, entry: Entry, chosen: Chosen) -> None:
        """Make `chosen` the destination, as the next attempt: the old one may have a slot of the present attempt, of which no answer
        came. Nothing but slots was asked so far."""
        before = entry.driver
        try:
            await next_attempt(self.collection, entry, chosen.plan)
        except BaseException:  # also where it is cancelled, or its time is over
            await outlasting(self.choice.give_back(entry.migration.migration_id, chosen.ends))
            raise
        entry.driver = self.make_driver(entry, chosen)
        if before is not None:
            entry.slot_asked = False
            await outlasting(self._leave(before))

    @staticmethod
    async def _leave(driver: Driver) -> None:
        """Give back what the destination of a driver may hold."""
        await driver.slots.release("destination")
        if driver.may_hold_slot:
            await driver.give_back()

    # ---- what it waits for

    @staticmethod
    def _note_silence(entry: Entry, error: DroverError) -> None:
        """Tell the view of a call for a slot that has failed."""
        if entry.driver is None or not entry.driver.slots.at:
            return
        if is_waited_for(error):
            entry.driver.view.call_failed(entry.driver.slots.at, error)
        else:  # it is not tried again
            entry.driver.view.answered(entry.driver.slots.at)

    def _show_wait(self, entry: Entry, error: DroverError) -> None:
        reason = PASSING.get(error.metadata.get("wait", ""), pb.WAIT_REASON_UNSPECIFIED)
        text = error_waited_for(entry.migration.destination_host, error)
        if entry.driver is not None:
            view = entry.driver.view
            if error.metadata.get("peer") == entry.migration.destination_host:
                view.call_failed("destination", error)  # so far only a look for it has failed
            view.waiting_for, view.held_up = text, reason
            if reason:
                view.wait = None  # it is in no queue now
            self.update(entry)
        elif reason:
            self.collection.publish(entry, entry.changed_to(wait_reason=reason, waiting_for=text[:1000]))

    @staticmethod
    def _out_of_time(entry: Entry, last: DroverError | None) -> DroverError:
        """Return the last reason of the wait."""
        wait = entry.driver.view.wait if entry.driver is not None else None
        if wait is not None:
            return out_of_time(wait)
        return last or DroverError(Reason.BUSY, "its time was over before a host had answered. Nothing was done to the guest")

    async def _with_alternatives(self, entry: Entry, error: DroverError) -> DroverError:
        """Return the error with the hosts that could take the guest now, if its destination cannot."""
        if error.reason not in (Reason.BUSY, Reason.HOST_CLOSED) or entry.any_host:
            return error
        hosts = await self._alternatives(entry)
        error.metadata = {**error.metadata, "alternatives": ",".join(hosts)} if hosts else error.metadata
        return error

    async def _alternatives(self, entry: Entry) -> tuple[str, ...]:
        return await self.choice.alternatives(same_guest(entry.migration), entry.migration.destination_host)
