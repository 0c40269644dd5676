"""The queue of one direction of a host: hands out its slots, and lets migrations wait for them.

A slot that no record holds lives in memory only and expires after the lease. A place in the queue is a row of the journal, from
before its first answer until memory flows, or it is given back or expires.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Final, Literal

import structlog
from msgspec.structs import replace

from agent.admission.alarm import Alarm
from agent.admission.book import Book
from agent.admission.places import Places
from agent.admission.store import AdmissionRows, Place
from agent.admission.values import Ask, Claim, Kind, Limits, Slot
from agent.admission.wire import busy, closed, given_back, queue_full, slot_changed, was_cancelled
from agent.runtime.backoff import Clock
from agent.runtime.bell import Bell
from agent.runtime.errors import DroverError
from agent.runtime.events import Bus
from drover.agent.v1.migration_pb2 import Wait

log = structlog.get_logger()

MOST_WAITING: Final = 1000
"""Most migrations that wait in one direction."""


class Queue:
    """The slots of one direction, and those who wait for them. `changed` rings at every change of slots; `check_open` raises while
    the agent is stopping; `on_silent` gets each place with `pending` whose driver has been silent for too long."""

    def __init__(
        self,
        host: str,
        book: Book,
        rows: AdmissionRows,
        bus: Bus,
        clock: Clock,
        changed: Bell,
        check_open: Callable[[], None],
        on_silent: Callable[[Place], None],
    ) -> None:
        self.book = book
        self.places = Places(book.direction, rows, on_silent)
        self._host = host
        self._bus = bus
        self._clock = clock
        self._changed = changed
        self._check_open = check_open
        self._alarm = Alarm(self._sweep, clock)

    @property
    def now(self) -> float:
        return self._clock.monotonic()

    # ---- lives

    def open(self, rows: Iterable[tuple[Place, int]]) -> None:
        """Add the places of earlier lives, each with the hash of its row; the oldest first."""
        for place, row in rows:
            known = self.book.find(place.migration_id)
            claim = place.claim(self.now, time.time(), row)
            if place.cancelled:
                self.places.cancelled[place.migration_id] = place
            elif known is None:
                self.book.adopt(claim, self.now)
                self._arm(claim)
            elif known.flows:
                self.places.forget(claim)
            else:
                known.ask, known.place, known.row = claim.ask, claim.place, claim.row

    async def close(self) -> None:
        """Stop the timer, and wait for what is being written. Slots and places stay as they are in the journal."""
        self._alarm.stop()
        await self.places.close()

    # ---- calls

    async def acquire(self, ask: Ask, *, wait: float = 0.0) -> Claim:
        """Take a slot, or wait up to `wait` seconds for it. Return the claim, which may still wait.

        Raises:
            DroverError: BUSY without `wait`; HOST_CLOSED, DRAINING, OVERLOADED, JOURNAL_UNAVAILABLE; GIVEN_UP if its driver gave
                it up; CANCELLED, also if its place is given back meanwhile.
        """
        known = self._admit(ask, waits=bool(wait or ask.pending))
        claim = self.book.ask(ask, self.now, waits=wait > 0)
        with self._calling(claim):
            self._serve(claim)
            if not claim.has(ask.kind) and not wait:
                raise busy(self.standing(claim))
            if ask.pending or not claim.has(ask.kind):
                await self._keep(claim, ask.pending, new=known is None)
            if not claim.has(ask.kind):
                await self._wait(claim, ask.kind, wait)
        return claim

    async def keep_place(self, ask: Ask) -> Claim:
        """Take or renew a place in the queue that is not served. Changes no slot. Raises `DroverError` as `acquire`, except BUSY."""
        known = self._admit(ask, waits=True)
        claim = self.book.ask(ask, self.now)
        if not claim.calls:
            claim.turn_until = float("-inf")
        try:
            await self._keep(claim, ask.pending, new=known is None)
        finally:  # also where its caller leaves meanwhile
            self._arm(claim)
        return claim

    def standing(self, claim: Claim) -> Wait:
        """Return where a claim stands."""
        standing = self.book.standing(claim, self.now)
        standing.host = self._host
        return standing

    def _admit(self, ask: Ask, *, waits: bool) -> Claim | None:
        """Return the claim of a migration, if it has one. Raises if it can be given nothing now. `waits`: it may join the queue."""
        claim = self.book.find(ask.migration_id)
        if claim is None or not claim.has(ask.kind):
            self._check(ask.migration_id, claim)
            if claim is None and waits and self.book.queue_length >= MOST_WAITING:
                raise queue_full(self.book.direction, self._host, MOST_WAITING)
        return claim

    def _check(self, migration_id: str, claim: Claim | None) -> None:
        """Raise if nothing is handed out now: DRAINING, HOST_CLOSED; CANCELLED or GIVEN_UP, unless the migration has begun."""
        begun = claim is not None and claim.attached
        if not begun:
            self._check_open()
        if not self.book.limits.limit:
            raise closed(self.book.direction, self._host)
        if not begun:
            self.check_not_cancelled(migration_id)

    def check_not_cancelled(self, migration_id: str) -> None:
        """Raise CANCELLED for a migration that was cancelled here, GIVEN_UP for one that its driver gave up."""
        if (ago := self.places.cancelled_ago(migration_id)) is not None:
            raise was_cancelled(migration_id, self._host, ago, self.places.cancelled[migration_id].given_up_for)

    @contextlib.contextmanager
    def _calling(self, claim: Claim) -> Iterator[None]:
        """Count a call of the claim as under way. If it is cancelled, its caller has gone away and holds up nobody."""
        claim.calls += 1
        normally = False
        try:
            yield
            normally = True
        except DroverError:
            normally = True
            raise
        finally:
            self.book.ended_call(claim, self.now, normally=normally)
            self._serve()
            self._arm(claim)

    async def _wait(self, claim: Claim, kind: Kind, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not claim.has(kind):
                    self._check(claim.migration_id, claim)
                    if not self.book.is_waiting(claim):
                        raise given_back(self.book.direction, self._host)
                    await claim.bell.next.wait()

    def release(self, migration_id: str, *, keep_place: bool) -> None:
        """Give back a slot or a place; a slot that a record holds becomes prepared. Nothing for a migration that has neither."""
        claim = self.book.find(migration_id)
        if claim is None:
            return
        if claim.making:
            claim.unwanted = True
            return
        if keep_place or claim.attached:
            slot = claim.slot
            self.book.give_back(claim)
            if not keep_place:
                self.book.leave_queue(claim)
                self.places.forget(claim)
            self._tell(claim, slot, "changed" if claim.slot is not None else "freed")
            self._arm(claim)
        else:
            self._free(claim)
        self._serve()

    # ---- for records

    @contextlib.contextmanager
    def taking(self, ask: Ask) -> Iterator[Slot]:
        """Hold the slot of a migration while its record is made: one that it has, or one that is taken now. The block sets
        `attached`, else the slot is as before. `ask.memory` is the guest's, as this host knows it: the slot costs that.

        Raises:
            DroverError: as `acquire` without `wait`; BUSY, and the slot is a place again, if it costs more than there is room for.
        """
        claim = self.book.find(ask.migration_id) or self.book.newcomer(ask, self.now)
        had, waited = claim.slot is not None, self.book.is_waiting(claim)
        if not (claim.attached or self.book.charge(claim, ask.memory)):
            error = busy(self.standing(claim))
            self.release(ask.migration_id, keep_place=True)
            raise error
        claim.making += 1
        try:
            with self._calling(claim):
                if not had:
                    self._serve_now(claim)
                assert claim.slot is not None
                yield claim.slot
        finally:
            claim.making -= 1
            unwanted, claim.unwanted = claim.unwanted, False
            if claim.slot is not None and not claim.attached and (unwanted or not had):
                self.release(ask.migration_id, keep_place=waited)

    def transfer(self, ask: Ask, *, force: bool) -> Claim:
        """Let the slot of a record transfer, if it is its turn now, or by `force`, beyond the limit. Raises BUSY, HOST_CLOSED; a
        place in the queue is as before."""
        claim = self.book.find(ask.migration_id) or self.book.newcomer(ask, self.now)
        if not claim.has(Kind.TRANSFERRING):
            claim = self.book.ask(replace(claim.ask, kind=Kind.TRANSFERRING), self.now, waits=False)
            with self._calling(claim):
                if force:
                    self.book.give(claim, Kind.TRANSFERRING, self.now)
                    self._tell(claim, claim.slot)
                else:
                    self._serve_now(claim)
        return claim

    def _serve_now(self, claim: Claim) -> None:
        self._check(claim.migration_id, claim)
        self._serve(claim)
        if not claim.has(claim.ask.kind):
            raise busy(self.standing(claim))

    def flows(self, migration_id: str) -> None:
        """Note that the memory of a migration flows, by its record: its place in the queue is not needed again."""
        claim = self.book.find(migration_id)
        if claim is not None and claim.slot is not None:
            claim.slot.flows = True
            self.places.forget(claim)

    def ended(self, migration_id: str, *, completed: bool, returned: bool, silent: bool) -> None:
        """Free the slot of a record. `completed`: the guest has arrived, or all of it was sent. `returned`: its attempt has ended
        before that; a migration that may wait keeps its place for its next one. `silent`: its driver does not call any more."""
        claim = self.book.find(migration_id)
        if claim is None or claim.slot is None or not claim.attached:
            return
        if returned and claim.row is not None:
            claim.slot.attached = False
            claim.seen = claim.seen if silent else self.now
            self.release(migration_id, keep_place=True)
        else:
            self._free(claim, completed=completed)
            self._serve()

    # ---- changes

    def limit(self, limits: Limits) -> None:
        """Change the limits. Nothing that runs is ended; what waits for a closed direction is."""
        self.book.limits = limits
        for claim in [] if limits.limit else self.book.in_order():
            self.book.leave_queue(claim)
            if claim.slot is None:
                self._free(claim)
            else:
                self._tell(claim)
        self._serve()

    def _serve(self, other: Claim | None = None) -> None:
        for claim in self.book.grant(self.now, other):
            self._tell(claim, claim.slot, "changed" if claim.attached else "taken")

    def _free(self, claim: Claim, *, completed: bool = False) -> None:
        slot = claim.slot
        self.book.free(claim, self.now, completed=completed)
        self.places.forget(claim)
        self._tell(claim, slot, "freed")

    def _tell(self, claim: Claim, slot: Slot | None = None, change: Literal["taken", "changed", "freed"] = "changed") -> None:
        """Tell those that wait for it, and all the others, of a change of a claim and of its slot."""
        if slot is not None:
            self._bus.publish(slot_changed(claim, slot, self.book, change))
        claim.bell.ring()
        self._changed.ring()

    async def _keep(self, claim: Claim, pending: bytes, *, new: bool) -> None:
        """Make the place durable. Raises JOURNAL_UNAVAILABLE, and then a new one has none."""
        try:
            await self.places.keep(claim, pending, self.now)
        except DroverError:
            if new and not claim.attached:
                self._free(claim)
            raise
        if self.book.find(claim.migration_id) is None or claim.flows:
            self.places.forget(claim)

    # ---- time

    def _arm(self, *claims: Claim) -> None:
        """Set the timer for what becomes due of claims if their drivers do not call."""
        now = self.now
        self._alarm.at(min((self.book.due(claim, now) for claim in claims), default=float("inf")))

    def _sweep(self) -> None:
        """Do what the time has made due, and set the timer for the next."""
        for claim in self.book.silent(self.now):
            self.places.tell_silent(claim.migration_id)
        for claim in self.book.sweep(self.now):
            log.info("a slot or place was not renewed", migration=claim.migration_id, direction=self.book.direction.value)
            self._free(claim)
        self._serve()
        self._arm(*self.book.claims())
