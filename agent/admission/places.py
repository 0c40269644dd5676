"""The places of queues in the journal."""

import asyncio
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, Final

import structlog

from agent.admission.store import Place, Store, checksum, decode, encode
from agent.admission.values import Claim, Direction, Kind
from agent.runtime.errors import DroverError

log = structlog.get_logger()


@dataclass(frozen=True)
class Caller:
    """Who asks for a slot, and what another driver needs to go on in its place."""

    driver: str = ""
    pending: bytes = b""
    peer_agent: str = ""


NOBODY: Final = Caller()

MAYBE: Final = -1
"""No checksum: a row may be there, or may be another one than was last written."""


class Places:
    """The rows of the places. A claim knows the checksum of its row."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._tasks: set[asyncio.Task[None]] = set()

    async def load(self) -> list[Place]:
        """Return all, the oldest first."""
        return sorted((decode(body) for body in await self._store.places()), key=lambda place: place.place)

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
    """Return whether a place is not needed any more: a record holds the slot that allows everything."""
    return claim.attached and claim.has(Kind.TRANSFERRING)
