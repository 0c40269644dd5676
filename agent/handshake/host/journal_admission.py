"""The rows of admission in the agent's journal: places in queues, and the host's settings."""

import sqlite3
from collections.abc import Callable
from typing import Final, TypeVar, cast

from agent.runtime.sqlite import Database

T = TypeVar("T")

SCHEMA: Final = """
    CREATE TABLE places (
        direction TEXT NOT NULL, migration_id TEXT NOT NULL, body BLOB NOT NULL, sum INTEGER NOT NULL,
        PRIMARY KEY (direction, migration_id)
    ) WITHOUT ROWID;
    CREATE TABLE settings (id INTEGER PRIMARY KEY, body BLOB NOT NULL, sum INTEGER NOT NULL);
"""


class AdmissionRows:
    """A `agent.admission.store.Store`. Every method is one transaction, and raises JOURNAL_UNAVAILABLE if it fails."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def next_life(self, above: int) -> int:
        def write(connection: sqlite3.Connection) -> int:
            number = int(max(above, *connection.execute("SELECT number FROM lives").fetchone())) + 1
            connection.execute("UPDATE lives SET number = ?1, sum = seal(?1)", (number,))
            return number

        return await self._db.transaction(write)

    async def put_place(self, direction: str, migration_id: str, body: bytes) -> None:
        row = (direction, migration_id, body)
        await self._db.transaction(
            lambda connection: (
                connection.execute("INSERT OR REPLACE INTO places VALUES (?1, ?2, ?3, seal(?1, ?2, ?3))", row).rowcount
            )
        )

    async def remove_place(self, direction: str, migration_id: str) -> None:
        key = (direction, migration_id)
        await self._db.transaction(
            lambda connection: connection.execute("DELETE FROM places WHERE direction = ? AND migration_id = ?", key).rowcount
        )

    async def place(self, direction: str, migration_id: str) -> bytes | None:
        found = await self._read("SELECT body FROM places WHERE direction = ? AND migration_id = ?", direction, migration_id)
        return found[0] if found else None

    async def places(self, read: Callable[[bytes], T]) -> list[T]:
        return await self._db.read(lambda connection: [read(body) for (body,) in connection.execute("SELECT body FROM places")])

    async def put_settings(self, body: bytes) -> None:
        await self._db.transaction(
            lambda connection: connection.execute("INSERT OR REPLACE INTO settings VALUES (0, ?1, seal(?1))", (body,)).rowcount
        )

    async def settings(self) -> bytes | None:
        found = await self._read("SELECT body FROM settings")
        return found[0] if found else None

    async def _read(self, query: str, *parameters: str) -> list[bytes]:
        rows = await self._db.read(lambda connection: connection.execute(query, parameters).fetchall())
        return [cast(bytes, row[0]) for row in rows]
