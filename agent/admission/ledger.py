"""Both books of a host: kept durable, told to others, and swept when something becomes due.

A slot that no record holds lives in memory only and expires after the lease. A place in a queue is a row of the journal, from before
its first answer until memory flows, or it is given back or expires.
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Final, Literal

import msgspec
import structlog

from agent.admission.alarm import Alarm
from agent.admission.book import Book
from agent.admission.places import Caller, Places, is_over
from agent.admission.settings import Configured, Settings
from agent.admission.store import Place, Store
from agent.admission.values import Ask, Claim, Direction, Kind, Slot
from agent.runtime.backoff import Clock
from agent.runtime.bell import Bell
from agent.runtime.errors import DroverError
from agent.runtime.events import Bus, SlotChanged

log = structlog.get_logger()

_LIFE_BITS: Final = 32
"""Bits of the counter in an epoch or a place. The bits above hold the number of the agent's life."""


class _Numbers(Iterator[int]):
    """Numbers that rise, also over restarts."""

    def __init__(self) -> None:
        self.last = 0

    def __next__(self) -> int:
        self.last += 1
        return self.last


class Ledger:
    """The slots, queues and settings of one host. `on_silent` gets each outgoing place with `pending` whose driver has been silent
    for `takeover_after` seconds."""

    def __init__(
        self,
        configured: Configured,
        store: Store,
        bus: Bus,
        clock: Clock,
        *,
        lease: float,
        takeover_after: float,
        on_silent: Callable[[Place], None],
    ) -> None:
        self.settings = Settings()
        self.changed = Bell()
        """Rings at every change of slots, queues and settings."""
        self._configured = configured
        self._store = store
        self._bus = bus
        self._clock = clock
        self._takeover_after = takeover_after
        self._on_silent = on_silent
        self._numbers = _Numbers()
        limits = {direction: self.settings.limits(direction, configured) for direction in Direction}
        # A silent driver's migration is taken over before its place is lost.
        leases = {Direction.INCOMING: lease, Direction.OUTGOING: max(lease, 2 * takeover_after)}
        self.books = {d: Book(d, limits[d], self._numbers, leases[d]) for d in Direction}
        self.bells: dict[Claim, Bell] = {}
        """Of the claims that calls wait for: rung when they change."""
        self._opening = asyncio.Lock()
        self._saving = asyncio.Lock()
        self.places = Places(store)
        self._alarm = Alarm(self._sweep, clock)

    @property
    def now(self) -> float:
        return self._clock.monotonic()

    # ---- lives

    def recount(self, direction: Direction, ask: Ask, *, epoch: int, cost: int, since: float, flows: bool = False) -> None:
        """Add the slot of a record of an earlier life, before `open`; the oldest first. `since`: Unix time."""
        now = self.now
        slot = Slot(ask.kind, cost, epoch, now - max(0.0, time.time() - since), attached=True, flows=flows)
        self.books[direction].adopt(Claim(ask, epoch, slot.since, slot), now)

    async def open(self) -> None:
        """Load the places and settings of earlier lives. Done once, by the first call that needs it."""
        if self._numbers.last:
            return
        async with self._opening:
            if self._numbers.last:
                return
            settings, places = await self._store.settings(), await self.places.load()
            epochs = [claim.slot.epoch for book in self.books.values() for claim in book.claims() if claim.slot is not None]
            above = max((number >> _LIFE_BITS for number in [*epochs, *(place.place for place, _ in places)]), default=0)
            life = await self._store.next_life(above)
            if settings is not None:
                self._hold(msgspec.msgpack.decode(settings, type=Settings))
            now, wall = self.now, time.time()
            for place, stored in places:
                self._return(self.books[place.direction], place.claim(now, wall, stored), now)
            self._numbers.last = life << _LIFE_BITS
            self._sweep()

    def _return(self, book: Book, claim: Claim, now: float) -> None:
        known = book.find(claim.migration_id)
        if known is None:
            book.adopt(claim, now)
        elif is_over(known):
            self.places.forget(book.direction, claim)
        else:
            known.ask, known.place, known.stored = claim.ask, claim.place, claim.stored

    async def close(self) -> None:
        """Stop the timer. Slots and places stay as they are in the journal."""
        self._alarm.stop()
        await self.places.close()

    # ---- changes

    async def change(self, alter: Callable[[Settings], Settings]) -> None:
        """Change the settings, durably. Nothing that runs is ended; what waits for a closed direction is."""
        async with self._saving:
            settings = alter(self.settings)
            await self._store.put_settings(msgspec.msgpack.encode(settings))
            self._hold(settings)
        for book in self.books.values():
            for claim in [] if book.limits.limit else book.in_order():
                self.stop_waiting(book, claim)
                self.ring(claim)
            self.serve(book)
        self.changed.ring()

    def _hold(self, settings: Settings) -> None:
        self.settings = settings
        for direction, book in self.books.items():
            book.limits = settings.limits(direction, self._configured)

    async def keep(self, book: Book, claim: Claim, caller: Caller, *, new: bool) -> None:
        """Make the place durable. Raises JOURNAL_UNAVAILABLE, and then a new one has none."""
        try:
            await self.places.keep(book.direction, claim, caller, self.now)
        except DroverError:
            if new and not claim.attached:
                self.free(book, claim)
            raise
        if book.find(claim.migration_id) is None or is_over(claim):
            self.places.forget(book.direction, claim)

    def stop_waiting(self, book: Book, claim: Claim) -> None:
        book.stop_waiting(claim)
        if claim.slot is None:
            self.free(book, claim)

    def serve(self, book: Book) -> None:
        """Serve all for whom there is room."""
        self.tell(book, book.grant(self.now))

    def tell(self, book: Book, granted: list[Claim]) -> None:
        for claim in granted:
            if claim.slot is not None:
                self.publish(book, claim.migration_id, claim.slot.kind, "changed" if claim.attached else "taken")
            self.ring(claim)
        if granted:
            self.changed.ring()

    def ring(self, claim: Claim) -> None:
        if claim in self.bells:
            self.bells[claim].ring()

    def publish(self, book: Book, migration_id: str, kind: Kind, change: Literal["taken", "changed", "freed"]) -> None:
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

    def free(self, book: Book, claim: Claim, *, completed: bool = False) -> None:
        slot = claim.slot
        book.free(claim, self.now, completed=completed)
        if slot is not None:
            self.publish(book, claim.migration_id, slot.kind, "freed")
        self.places.forget(book.direction, claim)
        self.ring(claim)
        self.changed.ring()

    # ---- time

    def arm_for(self, book: Book, claim: Claim) -> None:
        """Set the timer for what becomes due of a claim if its driver does not call."""
        now = self.now
        self._alarm.at(book.due(claim, now))
        if book.direction is Direction.OUTGOING and self._may_be_silent(claim):
            self._alarm.at(claim.seen + self._takeover_after)

    def _sweep(self) -> None:
        """Do what the time has made due, and set the timer for the next."""
        now = self.now
        for claim in self._silent(now):
            claim.silence_told = True
            self.places.start(self._tell_silent(claim.migration_id))
        for book in self.books.values():
            for claim in book.sweep(now):
                log.info("a slot or place was not renewed", migration=claim.migration_id, direction=book.direction.value)
                self.free(book, claim)
            self.serve(book)
        for book in self.books.values():
            for claim in book.claims():
                self.arm_for(book, claim)

    def _silent(self, now: float) -> list[Claim]:
        """Return the outgoing claims in the journal whose drivers have been silent for too long."""
        outgoing = self.books[Direction.OUTGOING].claims()
        return [c for c in outgoing if self._may_be_silent(c) and now >= c.seen + self._takeover_after]

    @staticmethod
    def _may_be_silent(claim: Claim) -> bool:
        return bool(claim.stored) and not claim.calls and not claim.attached and not claim.silence_told

    async def _tell_silent(self, migration_id: str) -> None:
        try:
            place = await self.places.get(Direction.OUTGOING, migration_id)
        except DroverError as error:
            log.error("a migration whose driver is silent cannot be read", migration=migration_id, error=error.message)
            return
        if place is not None and place.pending:
            self._on_silent(place)
