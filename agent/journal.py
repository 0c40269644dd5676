"""The agent's journal: what this host did and decided, durable before it is told to anyone.

One row per attempt (a record of `agent.handshake.records`) and one per migration that this agent drives itself. What has ended
is kept for questions that come late: the last `KEEP` rows of each, and the last `KEEP_COMMITS` guests that came here. Rows are
counted in the order in which they were written, not by a clock, which may go back.
"""

import itertools
import sqlite3
from pathlib import Path
from typing import Final

from agent.handshake.destination import DestinationState
from agent.handshake.records import AttemptRecord, Role, decode, encode
from agent.sqlite import Database

KEEP: Final = 1000
"""Ended rows that are kept, of each kind."""
KEEP_COMMITS: Final = 20_000
"""Records that say that a guest runs here; about 1 KiB each. A source that was away for long asks for its guest's, and to have
none means that the guest never came."""

_ACTIVE, _ENDED, _COMMIT = range(3)
_KEPT: Final = {_ENDED: KEEP, _COMMIT: KEEP_COMMITS}

_SCHEMA: Final = (
    """
    CREATE TABLE attempts (
        migration_id TEXT NOT NULL, attempt INTEGER NOT NULL, kind INTEGER NOT NULL, number INTEGER NOT NULL,
        body BLOB NOT NULL, PRIMARY KEY (migration_id, attempt)
    ) WITHOUT ROWID;
    CREATE INDEX attempts_kind ON attempts (kind, number);
    CREATE TABLE migrations (
        migration_id TEXT PRIMARY KEY, kind INTEGER NOT NULL, number INTEGER NOT NULL, body BLOB NOT NULL
    ) WITHOUT ROWID;
    CREATE INDEX migrations_kind ON migrations (kind, number);
    """,
)

_TRIM = """
    DELETE FROM {table} WHERE kind = ?1 AND number <= (
        SELECT number FROM {table} WHERE kind = ?1 ORDER BY number DESC LIMIT 1 OFFSET ?2
    )
"""
_NEWEST = "SELECT max(number) FROM (SELECT number FROM attempts UNION ALL SELECT number FROM migrations)"


class Journal:
    """Every method is one transaction and raises `JOURNAL_UNAVAILABLE` where it cannot be carried out."""

    def __init__(self, path: Path) -> None:
        self._db = Database(path, _SCHEMA)
        self._numbers = itertools.count(1)
        """Of rows, rising over restarts."""

    async def open(self) -> None:
        await self._db.open()
        newest = await self._db.read(lambda connection: connection.execute(_NEWEST).fetchone()[0])
        self._numbers = itertools.count((newest or 0) + 1)

    async def close(self) -> None:
        await self._db.close()

    async def put_attempt(self, record: AttemptRecord) -> None:
        kind, number, body = _kind_of(record), next(self._numbers), encode(record)

        def write(connection: sqlite3.Connection) -> None:
            connection.execute("INSERT OR REPLACE INTO attempts VALUES (?, ?, ?, ?, ?)", (*record.key, kind, number, body))
            if kind in _KEPT:
                connection.execute(_TRIM.format(table="attempts"), (kind, _KEPT[kind]))

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
                "SELECT body FROM attempts WHERE kind <= ? ORDER BY number DESC LIMIT ?",
                (_ACTIVE if active_only else _COMMIT, -1 if limit is None else limit),
            )
            return [row[0] for row in rows]

        return [decode(body) for body in await self._db.read(read)]

    async def save(self, migration_id: str, body: bytes, *, ended: bool) -> None:
        """Keeps a migration that this agent drives (`agent.migrations.MigrationLog`)."""
        kind, number = _ENDED if ended else _ACTIVE, next(self._numbers)

        def write(connection: sqlite3.Connection) -> None:
            connection.execute("INSERT OR REPLACE INTO migrations VALUES (?, ?, ?, ?)", (migration_id, kind, number, body))
            if ended:
                connection.execute(_TRIM.format(table="migrations"), (_ENDED, KEEP))

        await self._db.transaction(write)

    async def load(self) -> list[bytes]:
        """Every migration that is kept, the oldest first."""

        def read(connection: sqlite3.Connection) -> list[bytes]:
            return [row[0] for row in connection.execute("SELECT body FROM migrations ORDER BY number")]

        return await self._db.read(read)


def _kind_of(record: AttemptRecord) -> int:
    if not record.final:
        return _ACTIVE
    return _COMMIT if record.role is Role.DESTINATION and record.state == DestinationState.RUNNING else _ENDED
