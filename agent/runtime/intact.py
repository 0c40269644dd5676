"""Detection of damaged or missing data in a database: a checksum in each row, and a mark file beside the database.

SQLite detects damage to its own structure, but not to the content of a row. It takes a write-ahead log with a damaged frame for one
that a crash cut short, and an empty file for a new database: both silently lose acknowledged transactions. The mark file is
independent of the database and holds the number of transactions that it must contain."""

import contextlib
import os
import sqlite3
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


def seal(*columns: str | bytes | int) -> int:
    """Return the checksum of a row's columns and their types, which the row stores. Also a function of SQL."""
    total = 0
    for column in columns:
        data = column if isinstance(column, bytes) else as_bytes(column)
        total = zlib.crc32(data, zlib.crc32(b"%s %d:" % (type(column).__name__.encode(), len(data)), total))
    return total


def as_bytes(column: object) -> bytes:
    """Return the bytes of a column that was read with `as_text`."""
    return column if isinstance(column, bytes) else str(column).encode(errors="surrogateescape")


def as_text(data: bytes) -> str:
    """Decode a column, even if its text is damaged."""
    return data.decode(errors="surrogateescape")


@dataclass(frozen=True)
class Loss:
    """Missing data that mattered."""

    cause: str
    what: str


@dataclass(frozen=True)
class Damage:
    """A row whose checksum is wrong."""

    row: str
    """For a message: "the record of attempt 1 of migration X"."""
    matters: bool
    """A decision may still depend on it, so the database must not be used without it."""
    mend: str
    """SQL that removes the row, or leaves only the fact that it existed."""
    parameters: Sequence[str | bytes | int]


class DamagedMark(Exception):  # noqa: N818 - a finding
    """The mark file exists, but its content is invalid."""


class Mark:
    """The file with the number of acknowledged transactions.

    It is written after each commit, and synced about once a second and at the end. So it never holds more than was committed,
    whatever dies; after a loss of power it may hold less, and then only a loss of those last transactions goes unnoticed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = -1

    def read(self) -> int | None:
        """Return the count; None if there is no file. Raises `DamagedMark`, `OSError`."""
        try:
            text = self.path.read_bytes()
        except FileNotFoundError:
            return None
        digits = text[:20]
        if text != _line(digits) or not digits.isdigit():
            raise DamagedMark
        return int(digits)

    def open(self, count: int) -> None:
        """Set the count durably, and prepare for `write`."""
        if self._read_or_none() is None:
            self._make(count)
        self._fd = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC)
        self.write(count)
        self.sync()

    def _read_or_none(self) -> int | None:
        try:
            return self.read()
        except DamagedMark:
            return None

    def _make(self, count: int) -> None:
        """Create the file atomically."""
        new = self.path.with_name(f"{self.path.name}.new")
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, _line(b"%020d" % count))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        new.replace(self.path)
        folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def write(self, count: int) -> None:
        """Write the count. It survives the death of the process, but a loss of power only after `sync`."""
        os.pwrite(self._fd, _line(b"%020d" % count), 0)

    def sync(self) -> None:
        if self._fd >= 0:
            os.fdatasync(self._fd)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _line(digits: bytes) -> bytes:
    return b"%s %08x\n" % (digits, zlib.crc32(digits))


def look(path: Path, mark: Mark) -> tuple[Sequence[str], Loss | None]:
    """Return the faults in the structure of a closed database, and the loss if it holds less than its mark says.

    Changes no byte: opened for writing, SQLite would fold what it can read of the WAL into the database and delete it. Raises
    `sqlite3.Error`, `OSError`."""
    count: int | None = None
    if path.exists():
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))  # raises the system's error if it is not a file, or not accessible
    if path.exists() and path.stat().st_size:
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            faults = [row[0] for row in connection.execute("PRAGMA integrity_check(3)")]
            if faults != ["ok"]:
                return faults, None
            count = commits(connection)
    return (), _loss(count, mark)


def _loss(count: int | None, mark: Mark) -> Loss | None:
    try:
        promised = mark.read()
    except DamagedMark:
        return Loss("DAMAGED_MARK", f"its mark {mark.path} is damaged, so it is unknown whether it is complete")
    if promised is None and count:
        return Loss("DAMAGED_MARK", f"its mark {mark.path} is missing, so it is unknown whether it is complete")
    if promised and (count or 0) < promised:
        what = f"it holds {count or 'none'} of the {promised} transactions that were acknowledged, so decisions are missing"
        return Loss("LOST_WRITES", what)
    return None


def add_functions(connection: sqlite3.Connection) -> None:
    """Register `seal` as a function of SQL."""
    connection.create_function("seal", -1, seal, deterministic=True)


def make_commits(connection: sqlite3.Connection) -> None:
    """Create the table that counts the transactions, if it is missing."""
    connection.execute("CREATE TABLE IF NOT EXISTS drover_commits (count INTEGER NOT NULL, sum INTEGER NOT NULL)")
    connection.execute("INSERT INTO drover_commits SELECT 0, seal(0) WHERE NOT EXISTS (SELECT 1 FROM drover_commits)")


def set_commits(connection: sqlite3.Connection, count: int) -> None:
    """Set the number of transactions, in the open one."""
    connection.execute("UPDATE drover_commits SET count = ?, sum = ?", (count, seal(count)))


def commits(connection: sqlite3.Connection) -> int | None:
    """Return the number of transactions; None in a new database or one of an earlier Drover, 0 if the number is damaged."""
    if connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'drover_commits'").fetchone() is None:
        return None
    row = connection.execute("SELECT count, sum FROM drover_commits").fetchone()
    return int(row[0]) if row is not None and seal(row[0]) == row[1] else 0
