"""The agent's journal: what this host did and decided, durable before anyone can read it.

It has one row per attempt (a record of `records`) and one per migration that this agent drives itself, beside those of admission. A
row is deleted only when no decision can depend on it any more:

- A record that has not ended stays.
- A record that another host may still have to read stays, however old it is (`must_stay`).
- Of all others, which only answer late questions, the last `KEEP` of each table stay.

Each row has two checksums (`runtime.intact.seal`): `head` of its key, kind and number, `sum` of its content. A damaged row of the
last kind is emptied when the journal is opened; any other damage makes the start fail.

Rows are ordered by a number that rises with every write, also over restarts: not by a clock, which may go back, nor by what is in
memory.
"""

import itertools
import sqlite3
from pathlib import Path
from typing import Final

import msgspec
import structlog

from agent.admission import store
from agent.admission.store import AdmissionRows
from agent.handshake.host.journal_damage import ENDED, damages_in
from agent.handshake.host.records import AttemptRecord, Role, decode, encode
from agent.handshake.machines.destination import DestinationState
from agent.handshake.machines.source import SourceState
from agent.runtime.errors import DroverError
from agent.runtime.intact import seal
from agent.runtime.sqlite import Database
from agent.runtime.sqlite_errors import unusable
from agent.runtime.sqlite_file import Migration

log = structlog.get_logger(__name__)

KEEP: Final = 1000
"""How many rows of each table are kept, at least, although no decision depends on them."""

TRIM_AFTER: Final = 64
"""Attempts that end before older ones are looked for: that reads `KEEP` rows."""

_ACTIVE, _ENDED, _MUST_STAY = 0, ENDED, 2

_LEAP: Final = 1 << 32
"""How far numbers jump ahead after rows were lost: more than a journal ever loses."""

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
    lambda connection: _add_arrivals_and_checksums(connection),
    """
    CREATE TABLE lives (id INTEGER PRIMARY KEY, number INTEGER NOT NULL, sum INTEGER NOT NULL);
    INSERT INTO lives VALUES (0, 0, seal(0));
    """,
    store.SCHEMA,
)

_TRIM = """
    DELETE FROM {table} WHERE kind = ?1 AND number <= (
        SELECT number FROM {table} WHERE kind = ?1 ORDER BY number DESC LIMIT 1 OFFSET ?2
    )
"""
_PUT_ATTEMPT = """
    INSERT OR REPLACE INTO attempts (migration_id, attempt, kind, number, body, head, sum) VALUES (?, ?, ?, ?, ?, ?, ?)
"""
_PUT_MIGRATION = """
    INSERT OR REPLACE INTO migrations (migration_id, kind, number, body, head, sum)
    VALUES (?1, ?2, ?3, ?4, seal(?1, ?2, ?3), seal(?1, ?4))
"""
_PUT_ARRIVAL = "INSERT OR REPLACE INTO arrivals VALUES (?1, ?2, ?3, seal(?1, ?2, ?3))"

_Row = tuple[str, int, int, bytes, int]
_ROWS = "SELECT migration_id, attempt, number, body, sum FROM attempts"

_LOST = "nothing else is; ask the other host of that migration, and both hosts' hypervisors"
_NEWER = "install the version of Drover again that wrote it"

_NEWEST = "SELECT max(number) FROM (SELECT number FROM attempts UNION ALL SELECT number FROM migrations)"


class Journal:
    """The journal of one agent. Every method is one transaction, and raises JOURNAL_UNAVAILABLE if it fails."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._db = Database(path, _SCHEMA, check=damages_in)
        self._numbers = itertools.count(1)
        """Numbers of rows, rising over restarts."""
        self._ends = itertools.count()  # the first end looks for older ones: no life need last for many
        self._ids: set[str] = set()
        """Ids of all migrations with a record here, and perhaps some more. Saves the query for the others: the usual case."""

    async def open(self) -> None:
        await self._db.open()
        newest = await self._db.read(lambda connection: connection.execute(_NEWEST).fetchone()[0])
        rows = await self._db.read(lambda connection: connection.execute("SELECT migration_id FROM attempts").fetchall())
        self._ids.update(row[0] for row in rows)
        lost = _LEAP if self._db.lost else 0  # lost rows may have had greater numbers
        self._numbers = itertools.count((newest or 0) + 1 + lost)

    async def close(self) -> None:
        await self._db.close()

    @property
    def admission(self) -> AdmissionRows:
        """The rows of admission."""
        return AdmissionRows(self._db)

    async def next_life(self, above: int) -> int:
        """Return a number greater than `above` and than every one that this returned before, over restarts."""
        return await self.admission.next_life(above)

    async def put_attempt(self, record: AttemptRecord) -> None:
        kind, number, body = _kind_of(record), next(self._numbers), encode(record)
        trims = kind == _ENDED and next(self._ends) % TRIM_AFTER == 0

        def write(connection: sqlite3.Connection) -> None:
            self._ids.add(record.migration_id)
            _put_arrival(connection, record)
            _put_attempt(connection, record, kind, number, body)
            if trims:
                trimmed = connection.execute(f"{_TRIM} RETURNING migration_id".format(table="attempts"), (_ENDED, KEEP)).fetchall()
                for (migration_id,) in trimmed:
                    if connection.execute("SELECT 1 FROM attempts WHERE migration_id = ?", (migration_id,)).fetchone() is None:
                        self._ids.discard(migration_id)

        self._ids.add(record.migration_id)
        await self._db.transaction(write)

    async def get_attempt(self, migration_id: str, attempt: int = 0) -> AttemptRecord | None:
        """Return the record, or None; attempt 0 means the newest. Also raises JOURNAL_UNAVAILABLE for a damaged record."""
        if migration_id not in self._ids:
            return None

        def read(connection: sqlite3.Connection) -> _Row | None:
            found: _Row | None = connection.execute(
                f"{_ROWS} WHERE migration_id = ? AND (? = 0 OR attempt = ?) ORDER BY attempt DESC LIMIT 1",
                (migration_id, attempt, attempt),
            ).fetchone()
            return found

        row = await self._db.read(read)
        return self._record(row) if row is not None else None

    def _record(self, row: _Row) -> AttemptRecord:
        migration_id, attempt, _, body, total = row
        which = f"the record of attempt {attempt} of migration {migration_id}"
        if not body or seal(migration_id, attempt, body) != total:
            raise unusable(self.path, "DAMAGED_ROW", f"{which} was damaged on the disk and is lost", "no", _LOST)
        try:
            return decode(body)
        except msgspec.MsgspecError as error:
            raise unusable(self.path, "UNREADABLE", f"{which} cannot be read: {error}", "no", _NEWER) from error

    def _records(self, rows: list[_Row]) -> list[tuple[int, AttemptRecord]]:
        """Return the records with their numbers. Skips those that cannot be read, so that they do not hide the others."""
        records = []
        for row in rows:
            try:
                records.append((row[2], self._record(row)))
            except DroverError as error:
                log.error("journal.unreadable", error=error.message)
        return records

    async def _read(self, rest: str, *parameters: int | None) -> list[_Row]:
        return await self._db.read(lambda connection: connection.execute(f"{_ROWS} {rest}", parameters).fetchall())

    async def active(self) -> list[AttemptRecord]:
        """Return every record that has not ended, the newest first. Also raises for one that cannot be read."""
        return [self._record(row) for row in await self._read("WHERE kind = ? ORDER BY number DESC", _ACTIVE)]

    async def unsettled(self) -> list[AttemptRecord]:
        """Return every commit of this host whose source is not known to have ended, the oldest first."""
        records = self._records(await self._read("WHERE kind = ? ORDER BY number", _MUST_STAY))
        return [record for _, record in records if record.role is Role.DESTINATION and not record.settled]

    async def aftercare(self) -> list[AttemptRecord]:
        """Return the record of every ended attempt whose aftercare is not done yet, the oldest first."""
        records = self._records(await self._read("WHERE kind = ? ORDER BY number", _MUST_STAY))
        return [record for _, record in records if record.aftercare]

    async def page_of_attempts(self, *, active_only: bool, before: int | None, limit: int) -> list[tuple[int, AttemptRecord]]:
        """Return at most `limit` records with the numbers of their rows, the newest first, all written before the row `before`."""
        last = _ACTIVE if active_only else _MUST_STAY
        rest = "WHERE kind <= ? AND (?2 IS NULL OR number < ?2) ORDER BY number DESC LIMIT ?"
        return self._records(await self._read(rest, last, before, limit))

    async def arrival(self, domain_uuid: str) -> tuple[str, int] | None:
        """Return the attempt by which the guest came, if it is here and that attempt's source is not known to have ended."""

        def read(connection: sqlite3.Connection) -> tuple[str, int] | None:
            found = connection.execute("SELECT migration_id, attempt FROM arrivals WHERE domain_uuid = ?", (domain_uuid,)).fetchone()
            return None if found is None else (found[0], found[1])

        return await self._db.read(read)

    async def brought(self, record: AttemptRecord) -> bool:
        """Return whether the guest, if it is here, came by this attempt: no later one brought it again or took it away."""
        return await self.arrival(record.domain_uuid) == record.key

    async def save(self, migration_id: str, body: bytes, *, ended: bool) -> None:
        """Keeps a migration that this agent drives (`agent.migration.migration.MigrationLog`)."""
        kind, number = _ENDED if ended else _ACTIVE, next(self._numbers)

        def write(connection: sqlite3.Connection) -> None:
            connection.execute(_PUT_MIGRATION, (migration_id, kind, number, body))
            if ended:
                connection.execute(_TRIM.format(table="migrations"), (_ENDED, KEEP))

        await self._db.transaction(write)

    async def load(self) -> list[bytes]:
        """Return every migration that is kept, the oldest first."""

        def read(connection: sqlite3.Connection) -> list[bytes]:
            rows = connection.execute("SELECT body FROM migrations WHERE length(body) > 0 ORDER BY number")
            return [row[0] for row in rows]

        return await self._db.read(read)

    async def remove(self, migration_id: str) -> None:
        """Forget a migration that this agent drives."""
        await self._db.transaction(
            lambda connection: connection.execute("DELETE FROM migrations WHERE migration_id = ?", (migration_id,)).rowcount
        )


def must_stay(record: AttemptRecord) -> bool:
    """Return whether an ended record must stay: another host's decision may depend on it, or its aftercare is not done.

    A commit stays until its source has ended: a source that returns late asks for it, and no record means that the guest never
    came. A source's KEPT by an operator's statement stays: the other host, once it is back, must learn that it lost the guest.
    """
    if record.aftercare:
        return True
    if record.role is Role.DESTINATION:
        return record.state == DestinationState.RUNNING and not record.settled
    return record.state == SourceState.KEPT and record.statement is not None


def _kind_of(record: AttemptRecord) -> int:
    if not record.final:
        return _ACTIVE
    return _MUST_STAY if must_stay(record) else _ENDED


def _may_run(record: AttemptRecord) -> bool:
    """Return whether a copy of the guest runs here by this attempt, or may have started although a statement gives it up."""
    if record.state == DestinationState.RUNNING:
        return not record.settled
    return record.state == DestinationState.ABANDONING and record.statement is not None


def _put_attempt(connection: sqlite3.Connection, record: AttemptRecord, kind: int, number: int, body: bytes) -> None:
    # The seals are not left to SQL: each call back from SQLite waits for the interpreter's lock.
    seals = seal(*record.key, kind, number), seal(*record.key, body)
    connection.execute(_PUT_ATTEMPT, (*record.key, kind, number, body, *seals))


def _put_arrival(connection: sqlite3.Connection, record: AttemptRecord) -> None:
    """Record by which unsettled commit each guest is here, in the transaction that writes the attempt's record."""
    if record.role is Role.SOURCE:
        if record.state == SourceState.REMOVED:
            connection.execute("DELETE FROM arrivals WHERE domain_uuid = ?", (record.domain_uuid,))
    elif _may_run(record):
        known = connection.execute("SELECT kind FROM attempts WHERE migration_id = ? AND attempt = ?", record.key).fetchone()
        if known is None or known[0] == _ACTIVE:  # else the record is only rewritten, and the guest may have left since
            connection.execute(_PUT_ARRIVAL, (record.domain_uuid, *record.key))
    elif record.final:
        connection.execute("DELETE FROM arrivals WHERE migration_id = ? AND attempt = ?", record.key)


def _add_arrivals_and_checksums(connection: sqlite3.Connection) -> None:
    connection.execute("PRAGMA secure_delete = ON")
    connection.execute(
        """
        CREATE TABLE arrivals (
            domain_uuid TEXT PRIMARY KEY, migration_id TEXT NOT NULL, attempt INTEGER NOT NULL, sum INTEGER NOT NULL
        ) WITHOUT ROWID
        """
    )
    for table in ("attempts", "migrations"):
        connection.execute(f"ALTER TABLE {table} ADD COLUMN head INTEGER NOT NULL DEFAULT 0")
        connection.execute(f"ALTER TABLE {table} ADD COLUMN sum INTEGER NOT NULL DEFAULT 0")
    for number, body in connection.execute("SELECT number, body FROM attempts ORDER BY number").fetchall():
        try:
            record = decode(body)
        except msgspec.MsgspecError as error:
            raise sqlite3.DatabaseError(f"a record of an earlier Drover cannot be read: {error}") from error
        _put_attempt(connection, record, _ACTIVE, number, body)  # as if it had been active just before
        _put_arrival(connection, record)
        # Earlier versions wrote cookies and XML, which contain passwords: rewrite without them (`secure_delete` clears the pages).
        _put_attempt(connection, record, _kind_of(record), number, encode(record))
    for row in connection.execute("SELECT migration_id, kind, number, body FROM migrations").fetchall():
        connection.execute(_PUT_MIGRATION, row)
