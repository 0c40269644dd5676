"""The places of queues in the journal."""

import asyncio
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, Final

import structlog

from agent.admission.store import Place, Store, checksum, decode, decode_briefly, encode
from agent.admission.values import MEDIUM, Claim, Direction, Kind
from agent.runtime.errors import DroverError

log = structlog.get_logger()


@dataclass(frozen=True)
class Caller:
    """Who asks for a slot, and what another driver needs to go on in its place."""

    driver: str = ""
    pending: bytes = b""
    peer_agent: str = ""


NOBODY: Final = Caller()

MOST_CANCELLED: Final = 1000
"""Most cancelled migrations that are remembered."""

CANCELLED_SECONDS: Final = 7 * 24 * 3600.0
"""For how long: a migration waits no longer than that, so that no other driver of it waits then."""

_CANCELLED: Final = "cancelled"
"""In place of the direction in the rows of cancelled migrations, which may have a place, too, for a moment."""

MAYBE: Final = -1
"""No checksum: a row may be there, or may be another one than was last written."""


class Places:
    """The rows of the places. A claim knows the checksum of its row."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._tasks: set[asyncio.Task[None]] = set()
        self._cancelled: dict[str, float] = {}
        """By migration: when it was cancelled, as Unix time; the oldest first."""

    async def load(self) -> list[tuple[Place, int]]:
        """Return all without `pending`, and the checksum of each row, the oldest first. Remember which migrations were cancelled."""
        rows = await self._store.places(decode_briefly)
        for row, _ in sorted(rows, key=lambda row: row[0].cancelled):
            if row.cancelled:
                self._cancelled.setdefault(row.migration_id, row.cancelled)
        return sorted((row for row in rows if not row[0].cancelled), key=lambda row: row[0].place)

    async def get(self, direction: Direction, migration_id: str) -> Place | None:
        body = await self._store.place(direction, migration_id)
        return decode(body) if body is not None else None

    async def keep(self, direction: Direction, claim: Claim, caller: Caller, now: float) -> None:
        """Make the place durable, unless a record holds its slot already. Raises JOURNAL_UNAVAILABLE."""
        ask = claim.ask
        place = Place(
            direction=direction,
            migration_id=ask.migration_id,
            place=claim.place,
            kind=ask.kind,
            peer=ask.peer,
            importance=ask.importance,
            memory=ask.memory,
            since=round(time.time() - now + claim.since),
            driver=caller.driver,
            pending=caller.pending,
            peer_agent=caller.peer_agent,
        )
        body = encode(place)
        if claim.stored != checksum(body) and not is_over(claim):
            claim.stored = MAYBE  # a write whose caller leaves is carried out all the same
            await self._store.put_place(direction, ask.migration_id, body)
            claim.stored = checksum(body)

    async def cancel(self, migration_id: str) -> None:
        """Remember that the migration was cancelled: at once, and durably when it returns. Raises JOURNAL_UNAVAILABLE."""
        self._cancelled.pop(migration_id, None)
        now = self._cancelled[migration_id] = time.time()
        for old in list(self._cancelled)[:-MOST_CANCELLED]:
            del self._cancelled[old]
            await self._store.remove_place(_CANCELLED, old)
        mark = Place(
            direction=Direction.OUTGOING,
            migration_id=migration_id,
            place=0,
            kind=Kind.PREPARED,
            peer="",
            importance=MEDIUM,
            memory=0,
            since=now,
            cancelled=now,
        )
        await self._store.put_place(_CANCELLED, migration_id, encode(mark))

    def cancelled_ago(self, migration_id: str) -> float | None:
        """Return how many seconds ago the migration was cancelled; None: not that this host would know."""
        cancelled = self._cancelled.get(migration_id)
        ago = max(0.0, time.time() - cancelled) if cancelled is not None else None
        return ago if ago is not None and ago < CANCELLED_SECONDS else None

    def forget(self, direction: Direction, claim: Claim) -> None:
        """Remove the row, after earlier writes of it."""
        if claim.stored:
            claim.stored = 0
            self.start(self._remove(direction, claim.migration_id))

    async def _remove(self, direction: Direction, migration_id: str) -> None:
        try:
            await self._store.remove_place(direction, migration_id)
        except DroverError as error:  # the next life finds a place that nobody asks for, and lets it expire
            log.warning("a place in a queue was not removed from the journal", migration=migration_id, error=error.message)

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Run work that `close` waits for."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        if self._tasks:
            await asyncio.wait(self._tasks)


def is_over(claim: Claim) -> bool:
    """Return whether a place is not needed any more: memory flows. Before, an attempt may end and its migration go on."""
    return claim.slot is not None and claim.slot.flows
