"""What shows that a database still holds all that it promised: checksums of its rows, and a mark beside it.

SQLite notices damage to its own structure, but not to what is in a row. It takes a write-ahead log with a damaged frame for one that
was cut short by a crash, and an empty file for a new database: both lose what was acknowledged without a word. The mark is
outside of the database, so it tells how many transactions there must be.
"""

import contextlib
import os
import sqlite3
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


def seal(*columns: str | bytes | int) -> int:
    """A checksum of a row's columns and of their types, as stored beside them; a function of SQL, too."""
    total = 0
    for column in columns:
        data = column if isinstance(column, bytes) else as_bytes(column)
        total = zlib.crc32(data, zlib.crc32(b"%s %d:" % (type(column).__name__.encode(), len(data)), total))
    return total


def as_bytes(column: object) -> bytes:
    """Of a column that was read with `as_text`."""
    return column if isinstance(column, bytes) else str(column).encode(errors="surrogateescape")


def as_text(data: bytes) -> str:
    """Reads damaged text, too."""
    return data.decode(errors="surrogateescape")


@dataclass(frozen=True)
class Loss:
    """Something that mattered is not there any more."""

    cause: str
    what: str


@dataclass(frozen=True)
class Damage:
    """A row whose checksum does not hold."""

    row: str
    """For a message: "the record of attempt 1 of migration X"."""
    matters: bool
    """Something may still be decided by it, so nothing can go on as if it had never been there."""
    mend: str
    """SQL that removes it, or leaves only the fact that it was there."""
    parameters: Sequence[str | bytes | int]


class DamagedMark(Exception):  # noqa: N818 - what was found
    """The file is there and says nothing."""


class Mark:
    """The file that says how many transactions were acknowledged.

    It is written after each commit, and synced now and then and at the end. So it never says more than what was committed, whatever
    dies; after a loss of power it may say less, which makes it blind only for a loss of those very transactions.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = -1

    def read(self) -> int | None:
        """The count; None where there is no file. Raises `DamagedMark`, `OSError`."""
        try:
            text = self.path.read_bytes()
        except FileNotFoundError:
            return None
        digits = text[:20]
        if text != _line(digits) or not digits.isdigit():
            raise DamagedMark
        return int(digits)

    def open(self, count: int) -> None:
        """Make it say so, durably, and be ready to `write`."""
        if self._said() is None:
            self._make(count)
        self._fd = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC)
        self.write(count)
        self.sync()

    def _said(self) -> int | None:
        try:
            return self.read()
        except DamagedMark:
            return None

    def _make(self, count: int) -> None:
        """A new file, whole from the first moment on."""
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
        """Survives the death of the process; a loss of power only after `sync`."""
        os.pwrite(self._fd, _line(b"%020d" % count), 0)

    def sync(self) -> None:
        """What was written survives a loss of power."""
        if self._fd >= 0:
            os.fdatasync(self._fd)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _line(digits: bytes) -> bytes:
    return b"%s %08x\n" % (digits, zlib.crc32(digits))


def look(path: Path, mark: Mark) -> tuple[Sequence[str], Loss | None]:
    """The faults in the structure of a database that is not open, and whether it holds less than its mark says.

    Changes nothing, to the byte: opened for writing, SQLite would fold what it can read of the WAL into the database and delete
    the rest. Raises `sqlite3.Error`, `OSError`.
    """
    count: int | None = None
    if path.exists():
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))  # the system's own words for what is no file, or not ours
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
        return Loss("DAMAGED_MARK", f"its mark {mark.path} is damaged, so nothing tells whether it is complete")
    if promised is None and count:
        return Loss("DAMAGED_MARK", f"its mark {mark.path} is missing, so nothing tells whether it is complete")
    if promised and (count or 0) < promised:
        what = f"it holds {count or 'none'} of the {promised} transactions that were acknowledged, so decisions are missing"
        return Loss("LOST_WRITES", what)
    return None


def add_functions(connection: sqlite3.Connection) -> None:
    """What Drover's SQL needs: `seal`."""
    connection.create_function("seal", -1, seal, deterministic=True)


def make_commits(connection: sqlite3.Connection) -> None:
    """The table that counts the transactions."""
    connection.execute("CREATE TABLE IF NOT EXISTS drover_commits (count INTEGER NOT NULL, sum INTEGER NOT NULL)")
    connection.execute("INSERT INTO drover_commits SELECT 0, seal(0) WHERE NOT EXISTS (SELECT 1 FROM drover_commits)")


def set_commits(connection: sqlite3.Connection, count: int) -> None:
    """Count one more, in the transaction that is open."""
    connection.execute("UPDATE drover_commits SET count = ?, sum = ?", (count, seal(count)))


def commits(connection: sqlite3.Connection) -> int | None:
    """How many transactions the database holds; None for one of an earlier Drover, or a new one. Damaged: as if it held none."""
    if connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'drover_commits'").fetchone() is None:
        return None
    row = connection.execute("SELECT count, sum FROM drover_commits").fetchone()
    return int(row[0]) if row is not None and seal(row[0]) == row[1] else 0
