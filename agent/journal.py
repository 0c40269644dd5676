"""The agent's journal: what this host did and decided, durable before it is told to anyone.

One row per attempt (a record of `agent.handshake.records`) and one per migration that this agent drives itself. What has ended
is kept for questions that come late, at most `KEEP` rows of each.
"""

import sqlite3
from pathlib import Path
from typing import Final

from agent.handshake.records import AttemptRecord, decode, encode
from agent.sqlite import Database

KEEP: Final = 1000
"""Ended rows that are kept, of each kind."""

_SCHEMA: Final = (
    """
    CREATE TABLE attempts (
        migration_id TEXT NOT NULL, attempt INTEGER NOT NULL, ended INTEGER NOT NULL, updated REAL NOT NULL,
        body BLOB NOT NULL, PRIMARY KEY (migration_id, attempt)
    ) WITHOUT ROWID;
    CREATE INDEX attempts_ended ON attempts (ended, updated);
    CREATE TABLE migrations (
        migration_id TEXT PRIMARY KEY, ended INTEGER NOT NULL, updated REAL NOT NULL, body BLOB NOT NULL
    ) WITHOUT ROWID;
    CREATE INDEX migrations_ended ON migrations (ended, updated);
    """,
)

_TRIM = """
    DELETE FROM {table} WHERE ended = 1 AND updated < (
        SELECT updated FROM {table} WHERE ended = 1 ORDER BY updated DESC LIMIT 1 OFFSET ?
    )
"""


class Journal:
    """Every method is one transaction and raises `JOURNAL_UNAVAILABLE` where it cannot be carried out."""

    def __init__(self, path: Path) -> None:
        self._db = Database(path, _SCHEMA)

    async def open(self) -> None:
        await self._db.open()

    async def close(self) -> None:
        await self._db.close()

    async def put_attempt(self, record: AttemptRecord) -> None:
        body = encode(record)

        def write(connection: sqlite3.Connection) -> None:
            connection.execute(
                "INSERT OR REPLACE INTO attempts VALUES (?, ?, ?, ?, ?)",
                (*record.key, record.final, record.updated, body),
            )
            if record.final:
                connection.execute(_TRIM.format(table="attempts"), (KEEP,))

        await self._db.transaction(write)

    async def get_attempt(self, migration_id: str, attempt: int = 0) -> AttemptRecord | None:
        """The record; attempt 0 means the newest."""

        def read(connection: sqlite3.Connection) -> bytes | None:
            row = connection.execute(
                "SELECT body FROM attempts WHERE migration_id = ? AND (? = 0 OR attempt = ?) ORDER BY attempt DESC LIMIT 1",
                (migration_id, attempt, attempt),
            ).fetchone()
            return row[0] if row else None

        body = await self._db.read(read)
        return decode(body) if body is not None else None

    async def attempts(self, *, active_only: bool = False, limit: int | None = KEEP) -> list[AttemptRecord]:
        """The newest first, at most `limit` of them (None: all)."""

        def read(connection: sqlite3.Connection) -> list[bytes]:
            rows = connection.execute(
                "SELECT body FROM attempts WHERE ended <= ? ORDER BY updated DESC LIMIT ?",
                (0 if active_only else 1, -1 if limit is None else limit),
            )
            return [row[0] for row in rows]

        return [decode(body) for body in await self._db.read(read)]

    async def save(self, migration_id: str, body: bytes, *, ended: bool, updated: float) -> None:
        """Keeps a migration that this agent drives (`agent.migrations.MigrationLog`)."""

        def write(connection: sqlite3.Connection) -> None:
            connection.execute("INSERT OR REPLACE INTO migrations VALUES (?, ?, ?, ?)", (migration_id, ended, updated, body))
            if ended:
                connection.execute(_TRIM.format(table="migrations"), (KEEP,))

        await self._db.transaction(write)

    async def load(self) -> list[bytes]:
        """Every migration that is kept, the oldest first."""

        def read(connection: sqlite3.Connection) -> list[bytes]:
            return [row[0] for row in connection.execute("SELECT body FROM migrations ORDER BY updated")]

        return await self._db.read(read)
