"""The store of a coordinator that runs alone: one durable SQLite file."""

import os
import sqlite3
import time
from collections.abc import Callable, Sequence
from typing import Final, Self, TypeVar

from agent.runtime.intact import Damage, as_bytes, seal
from agent.runtime.sqlite import Database
from coordinator.store.base import KeyValue
from coordinator.store.embedded import EmbeddedStore
from coordinator.store.rows import FIRST_REVISION, Rows

T = TypeVar("T")

# Keys are BLOBs of UTF-8, so that they sort and match prefixes by bytes, as in etcd.
_SCHEMA: Final = (
    f"""
    CREATE TABLE kv (
        key BLOB PRIMARY KEY NOT NULL, value BLOB NOT NULL,
        create_revision INTEGER NOT NULL, mod_revision INTEGER NOT NULL, lease_id INTEGER NOT NULL
    );
    CREATE INDEX kv_lease ON kv (lease_id, key) WHERE lease_id != 0;
    CREATE TABLE lease (id INTEGER PRIMARY KEY AUTOINCREMENT, ttl INTEGER NOT NULL);
    CREATE TABLE counter (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
    INSERT INTO counter VALUES ('revision', {FIRST_REVISION});
    """,
    # Checksums: `head` covers the row's key and numbers, `sum` its content. SQLite's own counter of lease ids has none.
    """
    ALTER TABLE kv ADD COLUMN head INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE kv ADD COLUMN sum INTEGER NOT NULL DEFAULT 0;
    UPDATE kv SET head = seal(key, create_revision, mod_revision, lease_id), sum = seal(key, value);
    ALTER TABLE lease ADD COLUMN sum INTEGER NOT NULL DEFAULT 0;
    UPDATE lease SET sum = seal(id, ttl);
    INSERT INTO counter VALUES ('lease', (SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'lease'));
    ALTER TABLE counter ADD COLUMN sum INTEGER NOT NULL DEFAULT 0;
    UPDATE counter SET sum = seal(name, value);
    """,
)

_RAISE_COUNTER: Final = "UPDATE counter SET value = ?1, sum = seal(name, ?1) WHERE CAST(name AS BLOB) = ?2"
"""Repairs a damaged counter: raises it beyond every number that may have been used, as none may be used twice."""

_COLUMNS: Final = "key, value, create_revision, mod_revision, lease_id"


class SqliteRows:
    """`Rows` in tables, within the transaction of the connection."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def revision(self) -> int:
        return self._counter("revision")

    def set_revision(self, revision: int) -> None:
        self._set_counter("revision", revision)

    def _counter(self, name: str) -> int:
        return int(self._connection.execute("SELECT value FROM counter WHERE name = ?", (name,)).fetchone()[0])

    def _set_counter(self, name: str, value: int) -> None:
        self._connection.execute("UPDATE counter SET value = ?2, sum = seal(?1, ?2) WHERE name = ?1", (name, value))

    def get(self, key: str) -> KeyValue | None:
        row = self._connection.execute(f"SELECT {_COLUMNS} FROM kv WHERE key = ?", (key.encode(),)).fetchone()
        return _key_value(row) if row is not None else None

    def range(self, prefix: str, after: str, limit: int) -> list[KeyValue]:
        begin, end = prefix.encode(), prefix.encode() + b"\xff"  # no UTF-8 text has a byte 0xff
        found = self._connection.execute(
            f"SELECT {_COLUMNS} FROM kv WHERE key >= ? AND key < ? AND key > ? ORDER BY key LIMIT ?",
            (begin, end, after.encode(), limit),
        )
        return [_key_value(row) for row in found]

    def put(self, row: KeyValue) -> None:
        self._connection.execute(
            f"INSERT OR REPLACE INTO kv ({_COLUMNS}, head, sum) VALUES (?1, ?2, ?3, ?4, ?5, seal(?1, ?3, ?4, ?5), seal(?1, ?2))",
            (row.key.encode(), row.value, row.create_revision, row.mod_revision, row.lease_id),
        )

    def delete(self, key: str) -> None:
        self._connection.execute("DELETE FROM kv WHERE key = ?", (key.encode(),))

    def add_lease(self, ttl: int) -> int:
        lease_id = self._counter("lease") + 1
        self._set_counter("lease", lease_id)
        self._connection.execute("INSERT INTO lease (id, ttl, sum) VALUES (?1, ?2, seal(?1, ?2))", (lease_id, ttl))
        return lease_id

    def has_lease(self, lease_id: int) -> bool:
        return self._connection.execute("SELECT 1 FROM lease WHERE id = ?", (lease_id,)).fetchone() is not None

    def remove_lease(self, lease_id: int) -> None:
        self._connection.execute("DELETE FROM lease WHERE id = ?", (lease_id,))

    def leases(self) -> dict[int, int]:
        return dict(self._connection.execute("SELECT id, ttl FROM lease"))

    def keys_of_lease(self, lease_id: int) -> list[str]:
        # SQLite uses the partial index only if its condition "lease_id != 0" is repeated here.
        found = self._connection.execute("SELECT key FROM kv WHERE lease_id = ? AND lease_id != 0 ORDER BY key", (lease_id,))
        return [row[0].decode() for row in found]


class SqliteStore(EmbeddedStore):
    """A `Store` in the file `path`. Data, revision and leases survive a restart; the history of the watches does not, so a watch
    from before the restart raises WATCH_TOO_SLOW. `expendable`: prefixes of keys on which no decision depends any more. If the value
    of such a key is damaged, `open` logs and removes it; any other damage makes `open` raise.
    """

    def __init__(self, path: str | os.PathLike[str], clock: Callable[[], float], expendable: Sequence[str]) -> None:
        super().__init__(clock)
        prefixes = tuple(prefix.encode() for prefix in expendable)
        self._database = Database(path, _SCHEMA, check=lambda connection: _damages(connection, prefixes))

    @classmethod
    async def open(
        cls, path: str | os.PathLike[str], *, clock: Callable[[], float] = time.monotonic, expendable: Sequence[str] = ()
    ) -> Self:
        """Open the store of that file, or create it. Close it, or use it with ``async with``."""
        store = cls(path, clock, expendable)
        await store._database.open()
        try:
            await store._start()
        except BaseException:
            await store._database.close()
            raise
        return store

    async def close(self) -> None:
        await super().close()
        await self._database.close()

    async def _run_write(self, job: Callable[[Rows], T]) -> T:
        return await self._database.transaction(lambda connection: job(SqliteRows(connection)))

    async def _run_read(self, job: Callable[[Rows], T]) -> T:
        return await self._database.read(lambda connection: job(SqliteRows(connection)))


def _key_value(row: tuple[bytes, bytes, int, int, int]) -> KeyValue:
    return KeyValue(row[0].decode(), *row[1:])


def _damages(connection: sqlite3.Connection, expendable: tuple[bytes, ...]) -> list[Damage]:
    """Return every row whose checksums do not match."""
    damages = []
    for key, value, *numbers, head, total in connection.execute(f"SELECT {_COLUMNS}, head, sum FROM kv"):
        sound = seal(key, *numbers) == head
        if not sound or seal(key, value) != total:
            which = f"the key {as_bytes(key).decode(errors='replace')}"
            matters = not sound or not key.startswith(expendable)
            damages.append(Damage(which, matters, "DELETE FROM kv WHERE key IS ?", (key,)))
    for lease_id, ttl, total in connection.execute("SELECT id, ttl, sum FROM lease"):
        if seal(lease_id, ttl) != total:
            damages.append(Damage(f"lease {lease_id}", True, "DELETE FROM lease WHERE id IS ?", (lease_id,)))
    for name, value, total in connection.execute("SELECT name, value, sum FROM counter"):
        if seal(name, value) != total:
            damages.append(Damage(f"the counter {name}", True, _RAISE_COUNTER, (1 << 48, as_bytes(name))))
    return damages
