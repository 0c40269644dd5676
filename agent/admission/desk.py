"""The desk of a host: the queues of both directions, and its settings."""

import asyncio
import itertools
from collections.abc import Callable, Iterator
from typing import Final

from agent.admission.book import Book
from agent.admission.queue import Queue
from agent.admission.settings import Configured, Settings
from agent.admission.store import AdmissionRows, Place
from agent.admission.values import Direction
from agent.admission.wire import holder_to_proto, waiter_to_proto
from agent.runtime.backoff import SYSTEM_CLOCK, Clock
from agent.runtime.bell import Bell
from agent.runtime.events import Bus
from agent.runtime.paging import Key
from drover.agent.v1 import admission_pb2 as pb
from drover.agent.v1 import host_pb2

_LIFE_BITS: Final = 32
"""Bits of the counter in an epoch or a place. The bits above hold the number of the agent's life."""


class Desk:
    """The slots of one host. `check_open` raises while the agent is stopping. `on_silent` gets each outgoing migration that waits,
    with `pending`, once its driver has been silent for `takeover_after` seconds."""

    def __init__(
        self,
        host: str,
        configured: Configured,
        rows: AdmissionRows,
        bus: Bus,
        *,
        lease: float,
        takeover_after: float,
        check_open: Callable[[], None] = lambda: None,
        on_silent: Callable[[Place], None] = lambda _: None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self.settings = Settings()
        self.changed = Bell()
        """Rings at every change of slots, queues and settings."""
        self._configured = configured
        self._rows = rows
        self._saving = asyncio.Lock()
        # A silent driver's migration is taken over before its place is lost.
        silence = {Direction.INCOMING: (lease, float("inf")), Direction.OUTGOING: (max(lease, 2 * takeover_after), takeover_after)}
        numbers = itertools.count(1)
        self.queues = {
            direction: Queue(
                host,
                Book(direction, self.settings.limits(direction, configured), numbers, *silence[direction]),
                rows,
                bus,
                clock,
                self.changed,
                check_open,
                on_silent,
            )
            for direction in Direction
        }

    async def open(self) -> None:
        """Load the places and settings of earlier lives, before any call, and after the slots of records are counted."""
        rows = sorted(await self._rows.places(), key=lambda each: (each[0].place, each[0].cancelled))
        numbers = [slot.epoch for queue in self.queues.values() for slot, _ in queue.book.slots()]
        above = max((number >> _LIFE_BITS for number in [*numbers, *(place.place for place, _ in rows)]), default=0)
        rising = itertools.count((await self._rows.next_life(above) << _LIFE_BITS) + 1)
        self._hold(await self._rows.settings() or self.settings)
        for direction, queue in self.queues.items():
            queue.book.numbers = rising
            queue.open((place, row) for place, row in rows if place.direction is direction)

    def drain(self) -> None:
        """End the calls that wait: `check_open` raises from now on. Their places stay for the next life."""
        for queue in self.queues.values():
            for claim in queue.book.claims():
                claim.bell.ring()

    async def close(self) -> None:
        """Stop the timers. Slots and places stay as they are in the journal."""
        await asyncio.gather(*(queue.close() for queue in self.queues.values()))

    async def update(self, request: host_pb2.UpdateHostRequest) -> None:
        """Change limits, durably. Nothing that runs is ended; what waits for a closed direction is. Raises INVALID_FIELD."""
        async with self._saving:
            settings = self.settings.changed(request)
            await self._rows.put_settings(settings)
            self._hold(settings)
        self.changed.ring()

    def _hold(self, settings: Settings) -> None:
        self.settings = settings
        for direction, queue in self.queues.items():
            queue.limit(settings.limits(direction, self._configured))

    def slots(self) -> Iterator[tuple[Key, pb.SlotHolder]]:
        """Yield all slots and waiters with their keys, which stay: incoming first; of each, the slots, then the waiters by age."""
        for number, queue in enumerate(self.queues.values()):
            book, now = queue.book, queue.now
            for slot, claim in sorted(book.slots(), key=lambda each: each[0].epoch):
                yield (number, 0, slot.epoch), holder_to_proto(claim, slot, book, now)
            turn = book.forecast(now)
            for position, claim in sorted(enumerate(book.in_order(), 1), key=lambda each: each[1].place):
                yield (number, 1, claim.place), waiter_to_proto(claim, book, now, position, turn(position))

    def show(self, host: host_pb2.Host) -> None:
        """Write limits, slots in use, queues and settings into the description of the host."""
        incoming, outgoing = (self.queues[direction].book for direction in Direction)
        host.incoming_limit, host.outgoing_limit = incoming.limits.limit, outgoing.limits.limit
        host.incoming_in_use, host.outgoing_in_use = incoming.transferring, outgoing.transferring
        host.incoming_queue, host.outgoing_queue = incoming.queue_length, outgoing.queue_length
        host.prepared_limit, host.unit_memory_bytes = incoming.limits.prepared, incoming.limits.unit_memory
        self.settings.show(host)
