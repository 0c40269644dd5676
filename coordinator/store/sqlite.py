"""The coordinator's own store: one SQLite file, durable, for a coordinator that runs alone."""

import os
import sqlite3
import time
from collections.abc import Callable
from typing import Final, Self, TypeVar

from agent.sqlite import Database
from coordinator.store.base import KeyValue
from coordinator.store.embedded import EmbeddedStore
from coordinator.store.rows import FIRST_REVISION, Rows

T = TypeVar("T")

# Keys are BLOBs of UTF-8: their order and their prefixes are then those of the bytes, as in etcd.
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
)

_COLUMNS: Final = "key, value, create_revision, mod_revision, lease_id"


class SqliteRows:
    """`Rows` in tables, within the transaction of the connection."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def revision(self) -> int:
        return int(self._connection.execute("SELECT value FROM counter WHERE name = 'revision'").fetchone()[0])

    def set_revision(self, revision: int) -> None:
        self._connection.execute("UPDATE counter SET value = ? WHERE name = 'revision'", (revision,))

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
            f"INSERT INTO kv ({_COLUMNS}) VALUES (?, ?, ?, ?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value, "
            "create_revision = excluded.create_revision, mod_revision = excluded.mod_revision, lease_id = excluded.lease_id",
            (row.key.encode(), row.value, row.create_revision, row.mod_revision, row.lease_id),
        )

    def delete(self, key: str) -> None:
        self._connection.execute("DELETE FROM kv WHERE key = ?", (key.encode(),))

    def add_lease(self, ttl: int) -> int:
        return int(self._connection.execute("INSERT INTO lease (ttl) VALUES (?)", (ttl,)).lastrowid or 0)

    def has_lease(self, lease_id: int) -> bool:
        return self._connection.execute("SELECT 1 FROM lease WHERE id = ?", (lease_id,)).fetchone() is not None

    def remove_lease(self, lease_id: int) -> None:
        self._connection.execute("DELETE FROM lease WHERE id = ?", (lease_id,))

    def leases(self) -> dict[int, int]:
        return dict(self._connection.execute("SELECT id, ttl FROM lease"))

    def keys_of_lease(self, lease_id: int) -> list[str]:
        # "lease_id != 0" is said again so that the index can be used.
        found = self._connection.execute("SELECT key FROM kv WHERE lease_id = ? AND lease_id != 0 ORDER BY key", (lease_id,))
        return [row[0].decode() for row in found]


class SqliteStore(EmbeddedStore):
    """A `Store` in the file `path`. Data, revision and leases survive a restart; the history of the watches does not, so a
    watch from before it is told to list again."""

    def __init__(self, path: str | os.PathLike[str], clock: Callable[[], float]) -> None:
        super().__init__(clock)
        self._database = Database(path, _SCHEMA)

    @classmethod
    async def open(cls, path: str | os.PathLike[str], *, clock: Callable[[], float] = time.monotonic) -> Self:
        """The store of that file, made if there is none. Close it when done, or use it with ``async with``."""
        store = cls(path, clock)
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
