"""The desk of a host: hands out its slots, and lets migrations wait for them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Final

from agent.admission.book import Book
from agent.admission.ledger import Ledger
from agent.admission.places import NOBODY, Caller
from agent.admission.settings import Configured
from agent.admission.store import Place, Store
from agent.admission.values import Ask, Claim, Direction, Kind, Standing
from agent.admission.wire import busy, closed, given_back, queue_full, slot_to_proto, waiter_to_proto, was_cancelled
from agent.runtime.backoff import SYSTEM_CLOCK, Clock
from agent.runtime.bell import Bell
from agent.runtime.errors import DroverError
from agent.runtime.events import Bus
from agent.runtime.paging import Key
from drover.agent.v1 import admission_pb2 as pb
from drover.agent.v1 import host_pb2

MOST_WAITING: Final = 1000
"""Most migrations that wait in one direction."""


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
        self.ledger = Ledger(configured, store, bus, clock, lease=lease, takeover_after=takeover_after, on_silent=on_silent)
        self.books = self.ledger.books
        self.changed = self.ledger.changed
        self._check_open = check_open

    def drain(self) -> None:
        """End the calls that wait: `check_open` raises from now on. Their places stay for the next life."""
        for bell in self.ledger.bells.values():
            bell.ring()

    # ---- calls

    async def acquire(self, direction: Direction, ask: Ask, *, wait: float = 0.0, caller: Caller = NOBODY) -> tuple[Claim, str]:
        """Take a slot, or wait up to `wait` seconds for it. Return the claim, which may still wait, and its driver before.

        Raises:
            DroverError: BUSY without `wait`; HOST_CLOSED, DRAINING, OVERLOADED, JOURNAL_UNAVAILABLE; CANCELLED if its place is given
                back meanwhile.
        """
        await self.ledger.open()
        book = self.books[direction]
        claim = book.find(ask.migration_id)
        before = claim.driver if claim is not None else ""
        if claim is None or not claim.has(ask.kind):
            self._check(book, claim)
            self._check_not_cancelled(book, claim, ask.migration_id)
        if claim is None and not wait and not caller.pending:
            claim = self._take_at_once(book, ask)
        else:
            claim = await self._queue(book, claim, ask, wait, caller)
        claim.driver = caller.driver
        self.ledger.arm_for(book, claim)
        return claim, before

    async def keep_place(self, direction: Direction, ask: Ask, caller: Caller) -> tuple[Claim, str]:
        """Take or renew a place in the queue that is not served. Changes no slot. Raises `DroverError` as `acquire`, except BUSY."""
        await self.ledger.open()
        book = self.books[direction]
        known = book.find(ask.migration_id)
        before = known.driver if known is not None else ""
        if known is None or not known.has(ask.kind):
            self._check(book, known)
            self._check_not_cancelled(book, known, ask.migration_id)
            self._check_queue(book, known)
        claim = book.ask(ask, self.ledger.now)
        if not claim.calls:
            claim.turn_until = float("-inf")
        await self.ledger.keep(book, claim, caller, new=known is None)
        claim.driver = caller.driver
        self.ledger.arm_for(book, claim)
        return claim, before

    def standing(self, direction: Direction, claim: Claim) -> Standing:
        """Return where a claim stands."""
        return self.books[direction].standing(claim, self.ledger.now)

    def slots(self) -> Iterator[tuple[Key, pb.SlotHolder]]:
        """Yield all slots and waiters with their keys: incoming first; of each, the slots, then the queue in its order."""
        now = self.ledger.now
        for number, (direction, book) in enumerate(self.books.items()):
            taken = [(claim.slot.epoch, claim, claim.slot) for claim in book.claims() if claim.slot is not None]
            for epoch, claim, slot in sorted(taken, key=lambda each: each[0]):
                yield (number, 0, epoch), slot_to_proto(claim, slot, direction, now, book.lease)
            for position, claim in enumerate(book.in_order(), 1):
                until = book.time_until(position, now)
                yield (number, 1, position), waiter_to_proto(claim, direction, now, position, until)

    def _check(self, book: Book, claim: Claim | None) -> None:
        if claim is None or not claim.attached:
            self._check_open()
        if not book.limits.limit:
            raise closed(book.direction, self.host)

    def _check_not_cancelled(self, book: Book, claim: Claim | None, migration_id: str) -> None:
        """Raise CANCELLED if another driver has cancelled the migration, unless it has begun."""
        ago = self.ledger.places.cancelled_ago(migration_id) if book.direction is Direction.OUTGOING else None
        if ago is not None and not (claim is not None and claim.attached):
            raise was_cancelled(migration_id, self.host, ago)

    def _take_at_once(self, book: Book, ask: Ask) -> Claim:
        now = self.ledger.now
        claim = book.newcomer(ask, now)
        claim.calls = 1
        self.ledger.tell(book, book.grant(now, claim))
        claim.calls = 0
        if claim.slot is None:
            raise busy(book.standing(claim, now), self.host)
        return claim

    async def _queue(self, book: Book, known: Claim | None, ask: Ask, wait: float, caller: Caller) -> Claim:
        self._check_queue(book, known)
        waited = known is not None and book.is_waiting(known)
        claim = book.ask(ask, self.ledger.now)
        with self._calling(book, claim):
            self.ledger.serve(book)
            if not claim.has(ask.kind) and not wait and not waited:
                error = busy(book.standing(claim, self.ledger.now), self.host)
                self.ledger.stop_waiting(book, claim)
                raise error
            if caller.pending or not claim.has(ask.kind):
                await self.ledger.keep(book, claim, caller, new=known is None)
            if not claim.has(ask.kind):
                await self._wait(book, claim, ask.kind, wait)
                if not claim.has(ask.kind) and not wait:
                    raise busy(book.standing(claim, self.ledger.now), self.host)
        return claim

    def _check_queue(self, book: Book, known: Claim | None) -> None:
        if known is None and book.queue_length >= MOST_WAITING:
            raise queue_full(book.direction, self.host, MOST_WAITING)

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
            book.ended_call(claim, self.ledger.now, normally=normally)
            if not claim.calls:
                self.ledger.bells.pop(claim, None)
            self.ledger.serve(book)
            self.ledger.arm_for(book, claim)

    async def _wait(self, book: Book, claim: Claim, kind: Kind, seconds: float) -> None:
        bell = self.ledger.bells.setdefault(claim, Bell())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not claim.has(kind):
                    if book.is_waiting(claim):
                        self._check(book, claim)
                    else:
                        raise given_back(book.direction, self.host) if book.limits.limit else closed(book.direction, self.host)
                    await bell.next.wait()

    def release(self, direction: Direction, migration_id: str, *, keep_place: bool) -> None:
        """Give back a slot or a place; a slot that a record holds becomes prepared. Nothing for a migration that has neither."""
        book = self.books[direction]
        claim = book.find(migration_id)
        if claim is None:
            return
        if claim.making:
            claim.unwanted = True
            return
        had, kind = claim.slot is not None, claim.slot.kind if claim.slot is not None else Kind.PREPARED
        if keep_place or claim.attached:
            book.give_back(claim)
            if not keep_place:
                book.stop_waiting(claim)
                self.ledger.places.forget(book.direction, claim)
            if had:
                self.ledger.publish(
                    book, migration_id, kind if claim.slot is None else Kind.PREPARED, "changed" if claim.slot else "freed"
                )
            self.ledger.ring(claim)
            self.ledger.arm_for(book, claim)
        else:
            self.ledger.free(book, claim)
        self.ledger.serve(book)

    async def cancel(self, migration_id: str) -> None:
        """Refuse an outgoing slot to every driver of the migration from now on, durably. Raises JOURNAL_UNAVAILABLE."""
        await self.ledger.open()
        await self.ledger.places.cancel(migration_id)

    # ---- for records

    @contextlib.asynccontextmanager
    async def taking(self, direction: Direction, ask: Ask) -> AsyncIterator[Claim]:
        """Hold the slot of a migration while its record is made: one that it has, or one that is taken now. The block calls
        `attach`, else the slot is as before. `ask.memory` is the guest's, as this host knows it: the slot costs that.

        Raises:
            DroverError: as `acquire` without `wait`; BUSY, and the slot is a place again, if it costs more than there is room for.
        """
        await self.ledger.open()
        book = self.books[direction]
        known = book.find(ask.migration_id)
        had, waited = known is not None and known.slot is not None, known is not None and book.is_waiting(known)
        if known is not None and had and not known.attached and not book.charge(known, ask.memory):
            error = busy(book.standing(known, self.ledger.now), self.host)
            self.release(direction, ask.migration_id, keep_place=True)
            raise error
        claim = known if known is not None and had else (await self.acquire(direction, ask))[0]
        claim.calls += 1
        claim.making += 1
        try:
            yield claim
        finally:
            claim.making -= 1
            book.ended_call(claim, self.ledger.now, normally=True)
            unwanted, claim.unwanted = claim.unwanted, False
            if not claim.attached and (unwanted or not had):
                self.release(direction, ask.migration_id, keep_place=waited)
            self.ledger.arm_for(book, claim)

    def attach(self, direction: Direction, claim: Claim) -> None:
        """Note that a record holds the slot durably; its end must call `ended`."""
        self.books[direction].attach(claim)

    def flows(self, direction: Direction, migration_id: str) -> None:
        """Note that the memory of a migration flows, by its record: its place in the queue is not needed again."""
        claim = self.books[direction].find(migration_id)
        if claim is not None and claim.slot is not None:
            claim.slot.flows = True
            self.ledger.places.forget(direction, claim)

    def force(self, direction: Direction, migration_id: str) -> Claim | None:
        """Let the slot of a record transfer, also beyond the limit: its memory flows. None: there is none."""
        book = self.books[direction]
        claim = book.find(migration_id)
        if claim is not None and not claim.has(Kind.TRANSFERRING):
            book.force(claim, self.ledger.now)
            self.ledger.tell(book, [claim])
        return claim

    def ended(self, direction: Direction, migration_id: str, *, completed: bool) -> None:
        """Free the slot of a record. `completed`: the guest has arrived, or all of it was sent."""
        book = self.books[direction]
        claim = book.find(migration_id)
        if claim is not None and claim.attached:
            self.ledger.free(book, claim, completed=completed)
            self.ledger.serve(book)

    def returned(self, direction: Direction, migration_id: str, *, silent: bool) -> None:
        """Free the slot of a record whose attempt has ended before its transfer; a migration that may wait keeps its place for its
        next attempt. `silent`: its driver does not call any more."""
        claim = self.books[direction].find(migration_id)
        if claim is None or claim.slot is None or not claim.stored:
            self.ended(direction, migration_id, completed=False)
            return
        claim.slot.attached = False
        claim.seen = claim.seen if silent else self.ledger.now
        self.release(direction, migration_id, keep_place=True)

    # ---- settings

    async def update(self, request: host_pb2.UpdateHostRequest) -> None:
        """Change limits, durably. Nothing that runs is ended; what waits for a closed direction is. Raises INVALID_FIELD."""
        await self.ledger.open()
        await self.ledger.change(lambda settings: settings.changed(request))

    def show(self, host: host_pb2.Host) -> None:
        """Write limits, slots in use, queues and settings into the description of the host."""
        incoming, outgoing = self.books[Direction.INCOMING], self.books[Direction.OUTGOING]
        host.incoming_limit, host.outgoing_limit = incoming.limits.limit, outgoing.limits.limit
        host.incoming_in_use, host.outgoing_in_use = incoming.transferring, outgoing.transferring
        host.incoming_queue, host.outgoing_queue = incoming.queue_length, outgoing.queue_length
        host.prepared_limit, host.unit_memory_bytes = incoming.limits.prepared, incoming.limits.unit_memory
        self.ledger.settings.show(host)
