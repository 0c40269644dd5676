"""The agent's journal: what this host did and decided, durable before it is told to anyone.

One row per attempt (a record of `agent.handshake.records`) and one per migration that this agent drives itself. A row is deleted
only when nobody's decision can depend on it any more:

- A record that has not ended stays.
- A record that another host may still have to read stays, however old it is (`must_stay`).
- Of all others, which answer late questions only, the last `KEEP` of each table stay.

Rows are ordered by a number that rises with every write, over restarts. No order comes from a clock, which may go back, or from
what happens to be in memory.
"""

import itertools
import sqlite3
from pathlib import Path
from typing import Final

from agent.handshake.destination import DestinationState
from agent.handshake.records import AttemptRecord, Role, decode, encode
from agent.handshake.source import SourceState
from agent.sqlite import Database, Migration

KEEP: Final = 1000
"""Rows of each table that are kept although nobody's decision depends on them."""

_ACTIVE, _ENDED, _MUST_STAY = range(3)

_SCHEMA: Final[tuple[Migration, ...]] = (
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
    lambda connection: _add_arrivals(connection),
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
        self.path = path
        self._db = Database(path, _SCHEMA)
        self._numbers = itertools.count(1)
        """Of rows and epochs, rising over restarts."""

    async def open(self) -> None:
        await self._db.open()
        newest = await self._db.read(lambda connection: connection.execute(_NEWEST).fetchone()[0])
        self._numbers = itertools.count((newest or 0) + 1)

    async def close(self) -> None:
        await self._db.close()

    def next_epoch(self) -> int:
        """A number greater than every epoch that was given before, in earlier lives of this agent too: the row that makes this one
        durable gets a greater number still, and the row with the greatest number is never deleted.
        """
        return next(self._numbers)

    async def put_attempt(self, record: AttemptRecord) -> None:
        kind, number, body = _kind_of(record), next(self._numbers), encode(record)

        def write(connection: sqlite3.Connection) -> None:
            _put_arrival(connection, record)
            connection.execute("INSERT OR REPLACE INTO attempts VALUES (?, ?, ?, ?, ?)", (*record.key, kind, number, body))
            if kind == _ENDED:
                connection.execute(_TRIM.format(table="attempts"), (_ENDED, KEEP))

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
                (_ACTIVE if active_only else _MUST_STAY, -1 if limit is None else limit),
            )
            return [row[0] for row in rows]

        return [decode(body) for body in await self._db.read(read)]

    async def unsettled(self) -> list[AttemptRecord]:
        """Every commit of this host whose source is not known to have ended, the oldest first."""

        def read(connection: sqlite3.Connection) -> list[bytes]:
            return [row[0] for row in connection.execute("SELECT body FROM attempts WHERE kind = ? ORDER BY number", (_MUST_STAY,))]

        records = [decode(body) for body in await self._db.read(read)]
        return [record for record in records if record.role is Role.DESTINATION]

    async def brought(self, record: AttemptRecord) -> bool:
        """Whether the guest, where it is here, is here by this attempt: no later one brought it again or took it away."""

        def read(connection: sqlite3.Connection) -> bool:
            found = connection.execute("SELECT migration_id, attempt FROM arrivals WHERE domain_uuid = ?", (record.domain_uuid,))
            return bool(found.fetchone() == record.key)

        return await self._db.read(read)

    async def page_of_attempts(self, *, active_only: bool, before: int | None, limit: int) -> list[tuple[int, AttemptRecord]]:
        """At most `limit` records with the numbers of their rows, the newest first, all written before the row `before`."""

        def read(connection: sqlite3.Connection) -> list[tuple[int, bytes]]:
            return connection.execute(
                "SELECT number, body FROM attempts WHERE kind <= ? AND (?2 IS NULL OR number < ?2) ORDER BY number DESC LIMIT ?",
                (_ACTIVE if active_only else _MUST_STAY, before, limit),
            ).fetchall()

        return [(number, decode(body)) for number, body in await self._db.read(read)]

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


def must_stay(record: AttemptRecord) -> bool:
    """Whether another host's decision may depend on a record that has ended.

    A commit, until its source has ended: a source that was away for long asks for it, and to have none means that the guest never
    came. A guest that its source kept by an operator's statement: the other host, once it is back, must learn that it lost it.
    """
    if record.role is Role.DESTINATION:
        return record.state == DestinationState.RUNNING and not record.settled
    return record.state == SourceState.KEPT and record.operator_word is not None


def _kind_of(record: AttemptRecord) -> int:
    if not record.final:
        return _ACTIVE
    return _MUST_STAY if must_stay(record) else _ENDED


def _may_run(record: AttemptRecord) -> bool:
    """A copy of the guest runs here by this attempt, or may have started although a statement gives it up."""
    if record.state == DestinationState.RUNNING:
        return not record.settled
    return record.state == DestinationState.ABANDONING and record.operator_word is not None


def _put_arrival(connection: sqlite3.Connection, record: AttemptRecord) -> None:
    """Keep which unsettled commit each guest's presence comes from, in the transaction that writes the record."""
    if record.role is Role.SOURCE:
        if record.state == SourceState.REMOVED:
            connection.execute("DELETE FROM arrivals WHERE domain_uuid = ?", (record.domain_uuid,))
    elif _may_run(record):
        known = connection.execute("SELECT kind FROM attempts WHERE migration_id = ? AND attempt = ?", record.key).fetchone()
        if known is None or known[0] == _ACTIVE:  # else it is only written again, and the guest may have left since
            connection.execute("INSERT OR REPLACE INTO arrivals VALUES (?, ?, ?)", (record.domain_uuid, *record.key))
    elif record.final:
        connection.execute("DELETE FROM arrivals WHERE migration_id = ? AND attempt = ?", record.key)


def _add_arrivals(connection: sqlite3.Connection) -> None:
    connection.execute(
        "CREATE TABLE arrivals (domain_uuid TEXT PRIMARY KEY, migration_id TEXT NOT NULL, attempt INTEGER NOT NULL) WITHOUT ROWID"
    )
    for (body,) in connection.execute("SELECT body FROM attempts ORDER BY number").fetchall():
        record = decode(body)
        # As if it had been active just before.
        connection.execute("UPDATE attempts SET kind = ? WHERE migration_id = ? AND attempt = ?", (_ACTIVE, *record.key))
        _put_arrival(connection, record)
        connection.execute("UPDATE attempts SET kind = ? WHERE migration_id = ? AND attempt = ?", (_kind_of(record), *record.key))
