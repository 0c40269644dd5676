"""The desk of a host: hands out its slots, lets migrations wait for them, keeps places durable, and ends what is not renewed.

A slot that no record holds lives in memory only and expires after the lease. A place in a queue is a row of the journal, from before
its first answer until a record holds the transferring slot, or it is given back or expires.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Final, Literal

import msgspec
import structlog

from agent.admission.alarm import Alarm
from agent.admission.book import Book
from agent.admission.settings import Configured, Settings
from agent.admission.places import NOBODY, Caller, Places, is_over
from agent.admission.store import Place, Store
from agent.admission.values import Ask, Claim, Direction, Kind, Slot
from agent.admission.wire import busy, closed, given_back, queue_full
from agent.runtime.backoff import SYSTEM_CLOCK, Clock
from agent.runtime.bell import Bell
from agent.runtime.errors import DroverError
from agent.runtime.events import Bus, SlotChanged
from drover.agent.v1 import host_pb2

log = structlog.get_logger()

MOST_WAITING: Final = 1000
"""Most migrations that wait in one direction."""

_LIFE_BITS: Final = 32
"""Bits of the counter in an epoch or a place. The bits above hold the number of the agent's life."""


class _Numbers(Iterator[int]):
    """Numbers that rise, also over restarts."""

    def __init__(self) -> None:
        self.last = 0

    def __next__(self) -> int:
        self.last += 1
        return self.last


class Desk:
    """The slots of one host. `check_open` raises while the agent is stopping. `on_silent` gets each outgoing migration that waits,
    with `pending`, once its driver has been silent for `takeover_after` seconds."""

    def __init__(
        self,
        host: str,
        configured: Configured,
        store: Store,
        bus: Bus,
        *,
        lease: float,
        takeover_after: float,
        check_open: Callable[[], None] = lambda: None,
        on_silent: Callable[[Place], None] = lambda _: None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self.host = host
        self.settings = Settings()
        self.changed = Bell()
        """Rings at every change of slots, queues and settings."""
        self._configured = configured
        self._store = store
        self._bus = bus
        self._takeover_after = takeover_after
        self._check_open = check_open
        self._on_silent = on_silent
        self._clock = clock
        self._numbers = _Numbers()
        limits = {direction: self.settings.limits(direction, configured) for direction in Direction}
        # A silent driver's migration is taken over before its place is lost.
        leases = {Direction.INCOMING: lease, Direction.OUTGOING: max(lease, 2 * takeover_after)}
        self.books = {d: Book(d, limits[d], self._numbers, leases[d]) for d in Direction}
        self._bells: dict[Claim, Bell] = {}
        self._opening = asyncio.Lock()
        self._saving = asyncio.Lock()
        self._places = Places(store)
        self._alarm = Alarm(self._sweep, clock)

    # ---- lives

    def recount(self, direction: Direction, ask: Ask, *, epoch: int, cost: int, since: float) -> None:
        """Add the slot of a record of an earlier life, before `open`; the oldest first. `since`: Unix time."""
        now = self._clock.monotonic()
        slot = Slot(ask.kind, cost, epoch, now - max(0.0, time.time() - since), attached=True)
        self.books[direction].adopt(Claim(ask, epoch, slot.since, slot), now)

    async def open(self) -> None:
        """Load the places and settings of earlier lives. Done once, by the first call that needs it."""
        if self._numbers.last:
            return
        async with self._opening:
            if self._numbers.last:
                return
            settings, places = await self._store.settings(), await self._places.load()
            epochs = [claim.slot.epoch for book in self.books.values() for claim in book.claims() if claim.slot is not None]
            above = max((number >> _LIFE_BITS for number in [*epochs, *(place.place for place in places)]), default=0)
            life = await self._store.next_life(above)
            if settings is not None:
                self._hold(msgspec.msgpack.decode(settings, type=Settings))
            now, wall = self._clock.monotonic(), time.time()
            for place in places:
                self._return(self.books[place.direction], place.claim(now, wall), now)
            self._numbers.last = life << _LIFE_BITS
            self._sweep()

    def _return(self, book: Book, claim: Claim, now: float) -> None:
        known = book.find(claim.migration_id)
        if known is None:
            book.adopt(claim, now)
        elif known.has(Kind.TRANSFERRING):
            self._places.forget(book.direction, claim)
        else:
            known.ask, known.place, known.stored = claim.ask, claim.place, claim.stored

    async def close(self) -> None:
        """Stop the timer. Slots and places stay as they are in the journal."""
        self._alarm.stop()
        await self._places.close()

    def drain(self) -> None:
        """End the calls that wait: `check_open` raises from now on. Their places stay for the next life."""
        for bell in self._bells.values():
            bell.ring()

    # ---- calls

    async def acquire(self, direction: Direction, ask: Ask, *, wait: float = 0.0, caller: Caller = NOBODY) -> tuple[Claim, str]:
        """Take a slot, or wait up to `wait` seconds for it. Return the claim, which may still wait, and its driver before.

        Raises:
            DroverError: BUSY without `wait`; HOST_CLOSED, DRAINING, OVERLOADED, JOURNAL_UNAVAILABLE; CANCELLED if its place is given
                back meanwhile.
        """
        await self.open()
        book = self.books[direction]
        claim = book.find(ask.migration_id)
        before = claim.driver if claim is not None else ""
        if claim is None or not claim.has(ask.kind):
            self._check(book, claim)
        if claim is None and not wait and not caller.pending:
            claim = self._take_at_once(book, ask)
        else:
            claim = await self._queue(book, claim, ask, wait, caller)
        claim.driver = caller.driver
        self._arm_for(book, claim)
        return claim, before

    def _check(self, book: Book, claim: Claim | None) -> None:
        if claim is None or not claim.attached:
            self._check_open()
        if not book.limits.limit:
            raise closed(book.direction, self.host)

    def _take_at_once(self, book: Book, ask: Ask) -> Claim:
        now = self._clock.monotonic()
        claim = book.newcomer(ask, now)
        claim.calls = 1
        self._tell(book, book.grant(now, claim))
        claim.calls = 0
        if claim.slot is None:
            raise busy(book.standing(claim, now), self.host)
        return claim

    async def _queue(self, book: Book, known: Claim | None, ask: Ask, wait: float, caller: Caller) -> Claim:
        if known is None and book.queue_length >= MOST_WAITING:
            raise queue_full(book.direction, self.host, MOST_WAITING)
        waited = known is not None and book.is_waiting(known)
        claim = book.ask(ask, self._clock.monotonic())
        with self._calling(book, claim):
            self._serve(book)
            if not claim.has(ask.kind) and not wait and not waited:
                error = busy(book.standing(claim, self._clock.monotonic()), self.host)
                self._stop_waiting(book, claim)
                raise error
            if caller.pending or not claim.has(ask.kind):
                await self._keep(book, claim, caller, new=known is None)
            if not claim.has(ask.kind):
                await self._wait(book, claim, ask.kind, wait)
                if not claim.has(ask.kind) and not wait:
                    raise busy(book.standing(claim, self._clock.monotonic()), self.host)
        return claim

    def _stop_waiting(self, book: Book, claim: Claim) -> None:
        book.stop_waiting(claim)
        if claim.slot is None:
            self._free(book, claim)

    @contextlib.contextmanager
    def _calling(self, book: Book, claim: Claim) -> Iterator[None]:
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
            book.ended_call(claim, self._clock.monotonic(), normally=normally)
            if not claim.calls:
                self._bells.pop(claim, None)
            self._serve(book)
            self._arm_for(book, claim)

    async def _wait(self, book: Book, claim: Claim, kind: Kind, seconds: float) -> None:
        bell = self._bells.setdefault(claim, Bell())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not claim.has(kind):
                    if book.is_waiting(claim):
                        self._check(book, claim)
                    else:
                        raise given_back(book.direction, self.host) if book.limits.limit else closed(book.direction, self.host)
                    await bell.next.wait()

    async def _keep(self, book: Book, claim: Claim, caller: Caller, *, new: bool) -> None:
        """Make the place durable. Raises JOURNAL_UNAVAILABLE, and then a new one has none."""
        try:
            await self._places.keep(book.direction, claim, caller, self._clock.monotonic())
        except DroverError:
            if new and not claim.attached:
                self._free(book, claim)
            raise
        if book.find(claim.migration_id) is not claim or is_over(claim):
            self._places.forget(book.direction, claim)

    def release(self, direction: Direction, migration_id: str, *, keep_place: bool) -> None:
        """Give back a slot or a place; a slot that a record holds becomes prepared. Nothing for a migration that has neither."""
        book = self.books[direction]
        claim = book.find(migration_id)
        if claim is None:
            return
        had, kind = claim.slot is not None, claim.slot.kind if claim.slot is not None else Kind.PREPARED
        if keep_place or claim.attached:
            book.give_back(claim)
            if not keep_place:
                book.stop_waiting(claim)
                self._places.forget(book.direction, claim)
            if had:
                self._publish(
                    book, migration_id, kind if claim.slot is None else Kind.PREPARED, "changed" if claim.slot else "freed"
                )
            self._ring(claim)
            self._arm_for(book, claim)
        else:
            self._free(book, claim)
        self._serve(book)

    # ---- for records

    @contextlib.asynccontextmanager
    async def taking(self, direction: Direction, ask: Ask) -> AsyncIterator[Claim]:
        """Hold the slot of a migration while its record is made: one that it has, or one that is taken now. The block calls `attach`,
        else the slot is as before.

        Raises:
            DroverError: as `acquire` without `wait`.
        """
        await self.open()
        book = self.books[direction]
        known = book.find(ask.migration_id)
        had, waited = known is not None and known.slot is not None, known is not None and book.is_waiting(known)
        claim = known if known is not None and had else (await self.acquire(direction, ask))[0]
        claim.calls += 1
        try:
            yield claim
        finally:
            book.ended_call(claim, self._clock.monotonic(), normally=True)
            if not claim.attached and not had:
                self.release(direction, ask.migration_id, keep_place=waited)
            self._arm_for(book, claim)

    def attach(self, direction: Direction, claim: Claim) -> None:
        """Note that a record holds the slot durably; its end must call `ended`."""
        book = self.books[direction]
        book.attach(claim)
        if is_over(claim):
            self._places.forget(book.direction, claim)

    def ended(self, direction: Direction, migration_id: str, *, completed: bool) -> None:
        """Free the slot of a record. `completed`: the guest has arrived, or all of it was sent."""
        book = self.books[direction]
        claim = book.find(migration_id)
        if claim is not None and claim.attached:
            self._free(book, claim, completed=completed)
            self._serve(book)

    async def pending(self, migration_id: str) -> Place | None:
        """Return an outgoing place, with what a driver needs to take it over."""
        return await self._places.get(Direction.OUTGOING, migration_id)

    async def waiting(self) -> list[Place]:
        """Return every outgoing place that can be taken over, the oldest first."""
        return [place for place in await self._places.load() if place.direction is Direction.OUTGOING and place.pending]

    # ---- settings

    async def update(self, request: host_pb2.UpdateHostRequest) -> None:
        """Change limits, durably. Nothing that runs is ended; what waits for a closed direction is. Raises INVALID_FIELD."""
        await self.open()
        async with self._saving:
            settings = self.settings.changed(request)
            await self._store.put_settings(msgspec.msgpack.encode(settings))
            self._hold(settings)
        for book in self.books.values():
            for claim in [] if book.limits.limit else book.in_order():
                self._stop_waiting(book, claim)
                self._ring(claim)
            self._serve(book)
        self.changed.ring()

    def _hold(self, settings: Settings) -> None:
        self.settings = settings
        for direction, book in self.books.items():
            book.limits = settings.limits(direction, self._configured)

    def show(self, host: host_pb2.Host) -> None:
        """Write limits, slots in use, queues and settings into the description of the host."""
        incoming, outgoing = self.books[Direction.INCOMING], self.books[Direction.OUTGOING]
        host.incoming_limit, host.outgoing_limit = incoming.limits.limit, outgoing.limits.limit
        host.incoming_in_use, host.outgoing_in_use = incoming.transferring, outgoing.transferring
        host.incoming_queue, host.outgoing_queue = incoming.queue_length, outgoing.queue_length
        host.prepared_limit, host.unit_memory_bytes = incoming.limits.prepared, incoming.limits.unit_memory
        self.settings.show(host)

    # ---- parts

    def _serve(self, book: Book) -> None:
        """Serve all for whom there is room."""
        self._tell(book, book.grant(self._clock.monotonic()))

    def _tell(self, book: Book, granted: list[Claim]) -> None:
        for claim in granted:
            if claim.slot is not None:
                self._publish(book, claim.migration_id, claim.slot.kind, "changed" if claim.attached else "taken")
            self._ring(claim)
        if granted:
            self.changed.ring()

    def _ring(self, claim: Claim) -> None:
        if claim in self._bells:
            self._bells[claim].ring()

    def _publish(self, book: Book, migration_id: str, kind: Kind, change: Literal["taken", "changed", "freed"]) -> None:
        self._bus.publish(
            SlotChanged(
                migration_id=migration_id,
                direction=book.direction.value,
                slot_kind="prepared" if kind is Kind.PREPARED else "transferring",
                change=change,
                in_use=book.transferring,
                limit=book.limits.limit,
            )
        )

    def _free(self, book: Book, claim: Claim, *, completed: bool = False) -> None:
        slot = claim.slot
        book.free(claim, self._clock.monotonic(), completed=completed)
        if slot is not None:
            self._publish(book, claim.migration_id, slot.kind, "freed")
        self._places.forget(book.direction, claim)
        self._ring(claim)
        self.changed.ring()

    # ---- time

    def _arm_for(self, book: Book, claim: Claim) -> None:
        """Set the timer for what becomes due of a claim if its driver does not call."""
        now = self._clock.monotonic()
        self._alarm.at(book.due(claim, now))
        if book.direction is Direction.OUTGOING and self._may_be_silent(claim):
            self._alarm.at(claim.seen + self._takeover_after)

    def _sweep(self) -> None:
        """Do what the time has made due, and set the timer for the next."""
        now = self._clock.monotonic()
        for claim in self._silent(now):
            claim.silence_told = True
            self._places.start(self._tell_silent(claim.migration_id))
        for book in self.books.values():
            for claim in book.sweep(now):
                log.info("a slot or place was not renewed", migration=claim.migration_id, direction=book.direction.value)
                self._free(book, claim)
            self._serve(book)
        for book in self.books.values():
            for claim in book.claims():
                self._arm_for(book, claim)

    def _silent(self, now: float) -> list[Claim]:
        """Return the outgoing claims in the journal whose drivers have been silent for too long."""
        outgoing = self.books[Direction.OUTGOING].claims()
        return [c for c in outgoing if self._may_be_silent(c) and now >= c.seen + self._takeover_after]

    @staticmethod
    def _may_be_silent(claim: Claim) -> bool:
        return bool(claim.stored) and not claim.calls and not claim.attached and not claim.silence_told

    async def _tell_silent(self, migration_id: str) -> None:
        try:
            place = await self.pending(migration_id)
        except DroverError as error:
            log.error("a migration whose driver is silent cannot be read", migration=migration_id, error=error.message)
            return
        if place is not None and place.pending:
            self._on_silent(place)
