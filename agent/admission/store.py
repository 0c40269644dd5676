"""What admission keeps over restarts of the agent: places in queues, and the host's settings."""

import sqlite3
from typing import Any, Final

import msgspec

from agent.admission.settings import Settings
from agent.admission.values import Ask, Claim, Direction
from agent.runtime.sqlite import Database

SCHEMA: Final = """
    CREATE TABLE places (
        direction TEXT NOT NULL, migration_id TEXT NOT NULL, body BLOB NOT NULL, sum INTEGER NOT NULL,
        PRIMARY KEY (direction, migration_id)
    ) WITHOUT ROWID;
    CREATE TABLE settings (id INTEGER PRIMARY KEY, body BLOB NOT NULL, sum INTEGER NOT NULL);
"""


class Place(Ask, frozen=True, kw_only=True):
    """A place in a queue: what waits, and where."""

    direction: Direction
    place: int = 0
    since: float = 0.0
    """Since when it waits, as Unix time."""
    cancelled: float = 0.0
    """When the migration was cancelled, or given up, as Unix time: the row remembers that, and is no place. 0: it waits."""
    given_up_for: str = ""
    """Why it was given up; empty: it was cancelled on request."""

    def claim(self, now: float, wall: float, row: int) -> Claim:
        """Return the claim, at the times `now` and `wall` of the book's clock and of the wall clock. `row`: the hash of its row."""
        ask = Ask(**{name: getattr(self, name) for name in Ask.__struct_fields__})
        return Claim(ask, self.place, now - max(0.0, wall - self.since), row=row)


class AdmissionRows:
    """The rows of admission in the agent's journal. Every method is one transaction, and raises JOURNAL_UNAVAILABLE if it fails."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def next_life(self, above: int) -> int:
        """Return a number greater than `above` and than every one that this returned before, over restarts."""

        def write(connection: sqlite3.Connection) -> int:
            number = int(max(above, *connection.execute("SELECT number FROM lives").fetchone())) + 1
            connection.execute("UPDATE lives SET number = ?1, sum = seal(?1)", (number,))
            return number

        return await self._db.transaction(write)

    async def put_place(self, direction: str, migration_id: str, body: bytes) -> None:
        await self._write("INSERT OR REPLACE INTO places VALUES (?1, ?2, ?3, seal(?1, ?2, ?3))", direction, migration_id, body)

    async def remove_place(self, direction: str, migration_id: str) -> None:
        await self._write("DELETE FROM places WHERE direction = ?1 AND migration_id = ?2", direction, migration_id)

    async def place(self, direction: str, migration_id: str) -> Place | None:
        query = "SELECT body FROM places WHERE direction = ?1 AND migration_id = ?2"
        found = await self._db.read(lambda connection: connection.execute(query, (direction, migration_id)).fetchone())
        return msgspec.msgpack.decode(found[0], type=Place) if found is not None else None

    async def places(self) -> list[tuple[Place, int]]:
        """Return all without `pending`, and the hash of each row: a thousand of them fit in memory."""

        def read(connection: sqlite3.Connection) -> list[tuple[Place, int]]:
            bodies = (body for (body,) in connection.execute("SELECT body FROM places"))
            return [(msgspec.structs.replace(msgspec.msgpack.decode(body, type=Place), pending=b""), hash(body)) for body in bodies]

        return await self._db.read(read)

    async def put_settings(self, settings: Settings) -> None:
        await self._write("INSERT OR REPLACE INTO settings VALUES (0, ?1, seal(?1))", msgspec.msgpack.encode(settings))

    async def settings(self) -> Settings | None:
        found = await self._db.read(lambda connection: connection.execute("SELECT body FROM settings").fetchone())
        return msgspec.msgpack.decode(found[0], type=Settings) if found is not None else None

    async def _write(self, query: str, *parameters: Any) -> None:
        await self._db.transaction(lambda connection: connection.execute(query, parameters).rowcount)
