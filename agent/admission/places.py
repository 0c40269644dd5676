"""The rows of one direction in the journal: the places of its queue, and the migrations that were cancelled."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, Final

import msgspec
import structlog

from agent.admission.store import AdmissionRows, Place
from agent.admission.values import UNKNOWN_ROW, Claim, Direction
from agent.runtime.errors import DroverError

log = structlog.get_logger()

MOST_CANCELLED: Final = 1000
"""Most cancelled migrations that are remembered."""

CANCELLED_SECONDS: Final = 7 * 24 * 3600.0
"""For how long: a migration waits no longer than that, so that no other driver of it waits then."""

_CANCELLED: Final = "cancelled"
"""In place of the direction in the rows of cancelled migrations, which may have a place, too, for a moment."""


class Places:
    """The rows of the places. A claim knows the hash of its row."""

    def __init__(self, direction: Direction, rows: AdmissionRows, on_silent: Callable[[Place], None]) -> None:
        self._direction = direction
        self._rows = rows
        self._on_silent = on_silent
        self._tasks: set[asyncio.Task[None]] = set()
        self.cancelled: dict[str, Place] = {}
        """By migration: the row of one that was cancelled, or given up; the oldest first."""

    async def keep(self, claim: Claim, pending: bytes, now: float) -> None:
        """Make the place durable, unless memory flows already. Raises JOURNAL_UNAVAILABLE."""
        ask = msgspec.structs.asdict(claim.ask) | {"pending": pending}
        since = round(time.time() - now + claim.since)
        body = msgspec.msgpack.encode(Place(**ask, direction=self._direction, place=claim.place, since=since))
        if claim.row != hash(body) and not claim.flows:
            claim.row = UNKNOWN_ROW  # a write whose caller leaves is carried out all the same
            await self._rows.put_place(self._direction, claim.migration_id, body)
            claim.row = hash(body)

    def forget(self, claim: Claim) -> None:
        """Remove the row, after earlier writes of it."""
        if claim.row is not None:
            claim.row = None
            self._start(self._remove(claim.migration_id))

    async def _remove(self, migration_id: str) -> None:
        try:
            await self._rows.remove_place(self._direction, migration_id)
        except DroverError as error:  # the next life finds a place that nobody asks for, and lets it expire
            log.warning("a place in a queue was not removed from the journal", migration=migration_id, error=error.message)

    def tell_silent(self, migration_id: str) -> None:
        """Pass the place to `on_silent`, if another driver can go on with it."""
        self._start(self._tell_silent(migration_id))

    async def _tell_silent(self, migration_id: str) -> None:
        try:
            place = await self._rows.place(self._direction, migration_id)
        except DroverError as error:
            log.error("a migration whose driver is silent cannot be read", migration=migration_id, error=error.message)
            return
        if place is not None and place.pending:
            self._on_silent(place)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Wait for what is being read and written."""
        if self._tasks:
            await asyncio.wait(self._tasks)

    # ---- the cancelled

    async def cancel(self, migration_id: str, given_up_for: str = "") -> None:
        """Remember that the migration was cancelled, or why it was given up: at once, and durably when it returns. The first reason
        counts, and a cancellation goes before any. Raises JOURNAL_UNAVAILABLE."""
        earlier = self.cancelled.pop(migration_id, None)
        why = earlier.given_up_for if earlier is not None and given_up_for else given_up_for
        mark = Place(migration_id, direction=self._direction, cancelled=time.time(), given_up_for=why)
        self.cancelled[migration_id] = mark
        for old in list(self.cancelled)[:-MOST_CANCELLED]:
            self.cancelled.pop(old, None)  # another call may have removed it
            await self._rows.remove_place(_CANCELLED, old)
        await self._rows.put_place(_CANCELLED, migration_id, msgspec.msgpack.encode(mark))

    def cancelled_ago(self, migration_id: str) -> float | None:
        """Return how many seconds ago the migration was cancelled or given up; None: not that this host would know."""
        mark = self.cancelled.get(migration_id)
        ago = max(0.0, time.time() - mark.cancelled) if mark is not None else None
        return ago if ago is not None and ago < CANCELLED_SECONDS else None
