"""What admission keeps over restarts of the agent, and the interface of its store."""

import zlib
from collections.abc import Callable
from typing import Protocol, TypeVar

import msgspec

from agent.admission.values import Ask, Claim, Direction, Kind

T = TypeVar("T")


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """A place in a queue."""

    direction: Direction
    migration_id: str
    place: int
    kind: Kind
    peer: str
    importance: int
    memory: int
    since: float
    """Since when it waits, as Unix time."""
    driver: str = ""
    pending: bytes = b""
    """The migration (`drover.agent.v1.Migration`) as its driver has stored it. Empty: nobody takes it over."""
    peer_agent: str = ""
    cancelled: float = 0.0
    """When the migration was cancelled, as Unix time: the row remembers that, and is no place. 0: it waits."""

    def claim(self, now: float, wall: float, stored: int) -> Claim:
        """Return the claim, at the times `now` and `wall` of the book's clock and of the wall clock. `stored`: checksum of its
        row."""
        ask = Ask(self.migration_id, self.kind, self.peer, self.importance, self.memory)
        since = now - max(0.0, wall - self.since)
        return Claim(ask, self.place, since, driver=self.driver, stored=stored)


def encode(place: Place) -> bytes:
    return msgspec.msgpack.encode(place)


def decode(data: bytes) -> Place:
    return msgspec.msgpack.decode(data, type=Place)


def decode_briefly(data: bytes) -> tuple[Place, int]:
    """Return a place without `pending`, and the checksum of its row: a thousand of them fit in memory."""
    return msgspec.structs.replace(decode(data), pending=b""), checksum(data)


def checksum(data: bytes) -> int:
    """Return a checksum that is never zero."""
    return zlib.crc32(data) or 1


class Store(Protocol):
    """Durable storage. Each method is one transaction, and raises JOURNAL_UNAVAILABLE if it fails."""

    async def next_life(self, above: int) -> int:
        """Return a number greater than `above` and than every one that this returned before, over restarts."""
        ...

    async def put_place(self, direction: str, migration_id: str, body: bytes) -> None: ...

    async def remove_place(self, direction: str, migration_id: str) -> None: ...

    async def place(self, direction: str, migration_id: str) -> bytes | None: ...

    async def places(self, read: Callable[[bytes], T]) -> list[T]:
        """Return what `read` makes of each row. Only one row is in memory at a time."""
        ...

    async def put_settings(self, body: bytes) -> None: ...

    async def settings(self) -> bytes | None: ...
