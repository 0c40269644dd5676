"""agent.runtime.sqlite: whole transactions, whatever happens to the caller, the disk or the file."""

import asyncio
import shutil
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from random import Random

import pytest

from agent.runtime.errors import DroverError, Reason
from agent.runtime.sqlite import Database
from agent.runtime.sqlite_file import TIDY_COMMITS, TIDY_PAGES

SCHEMA = ("CREATE TABLE item (id INTEGER PRIMARY KEY, data BLOB)",)


@pytest.fixture
async def db(tmp_path: Path) -> AsyncIterator[Database]:
    async with Database(tmp_path / "j.db", SCHEMA) as database:
        yield database


def put(key: int, data: bytes = b"x") -> Callable[[sqlite3.Connection], None]:
    def insert(connection: sqlite3.Connection) -> None:
        connection.execute("INSERT OR REPLACE INTO item VALUES (?, ?)", (key, data))

    return insert


def keys(connection: sqlite3.Connection) -> list[int]:
    return [row[0] for row in connection.execute("SELECT id FROM item ORDER BY id")]


def put_many(ids: Iterable[int], data: bytes) -> Callable[[sqlite3.Connection], None]:
    def insert(connection: sqlite3.Connection) -> None:
        connection.executemany("INSERT OR REPLACE INTO item VALUES (?, ?)", [(i, data) for i in ids])

    return insert


def size(path: Path) -> int:
    """Return the size of a file in bytes; -1 if there is none."""
    return path.stat().st_size if path.exists() else -1


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def wal_of(path: Path) -> Path:
    return path.with_name(path.name + "-wal")


def mark_of(path: Path) -> Path:
    return path.with_name(path.name + ".mark")


def flip(path: Path, count: int, random: Random) -> None:
    """Flip `count` bits at random places."""
    data = bytearray(path.read_bytes())
    for _ in range(count):
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    path.write_bytes(data)


def cut_end(path: Path, count: int) -> None:
    with path.open("r+b") as file:
        file.truncate(file.seek(0, 2) - count)


def unavailable(error: BaseException, cause: str, written: str) -> None:
    assert isinstance(error, DroverError)
    assert error.reason is Reason.JOURNAL_UNAVAILABLE
    assert error.metadata["cause"].startswith(cause)
    assert error.metadata["written"] == written
    assert error.metadata["path"] in error.message


async def test_settings(db: Database) -> None:
    names = ("journal_mode", "synchronous", "auto_vacuum", "foreign_keys")
    values = await db.read(lambda c: [c.execute(f"PRAGMA {name}").fetchone()[0] for name in names])
    assert values == ["wal", 2, 2, 1]
    assert mode(db.path) == mode(wal_of(db.path)) == 0o600


async def test_transaction_returns_and_rolls_back(db: Database) -> None:
    def put_and_list(connection: sqlite3.Connection) -> list[int]:
        put(1)(connection)
        return keys(connection)

    def fail(connection: sqlite3.Connection) -> None:
        put(2)(connection)
        raise KeyError("mine")

    assert await db.transaction(put_and_list) == [1]
    with pytest.raises(KeyError, match="mine"):
        await db.transaction(fail)
    await db.read(put(3))
    assert await db.read(keys) == [1]


async def test_sql_error_is_translated_and_nothing_written(db: Database) -> None:
    def fail(connection: sqlite3.Connection) -> None:
        put(1)(connection)
        connection.execute("SELECT nonsense")

    with pytest.raises(DroverError) as caught:
        await db.transaction(fail)
    unavailable(caught.value, "SQLITE_ERROR", "no")
    assert await db.read(keys) == []


async def test_cancelled_waiter_leaves_at_once_and_the_transaction_completes(db: Database) -> None:
    entered, go = threading.Event(), threading.Event()

    def slow(connection: sqlite3.Connection) -> None:
        put(1)(connection)
        entered.set()
        go.wait(5)
        put(2)(connection)

    task = asyncio.create_task(db.transaction(slow))
    queued = asyncio.create_task(db.transaction(put(3)))
    assert await asyncio.to_thread(entered.wait, 5)
    for each in (task, queued):
        each.cancel()
    _, pending = await asyncio.wait({task, queued}, timeout=1)
    assert not pending
    assert task.cancelled()
    assert queued.cancelled()
    go.set()
    assert await db.read(keys) == [1, 2, 3]


async def test_deadline_before_the_commit_means_not_written(db: Database) -> None:
    go = threading.Event()
    slow = asyncio.create_task(db.transaction(lambda c: (put(1)(c), go.wait(5)), timeout=0.05))
    queued = asyncio.create_task(db.transaction(put(2), timeout=0.05))
    for task in (slow, queued):
        with pytest.raises(DroverError) as caught:
            await task
        unavailable(caught.value, "DEADLINE", "no")
    go.set()
    assert await db.read(keys) == []


async def test_deadline_within_the_commit_means_unknown(db: Database) -> None:
    committing, go = threading.Event(), threading.Event()

    def hook() -> int:
        committing.set()
        go.wait(5)
        return 0

    def slow_commit(connection: sqlite3.Connection) -> None:
        put(1)(connection)
        # A trace callback sees the COMMIT before it happens: a disk that hangs.
        connection.set_trace_callback(lambda text: hook() and None if text == "COMMIT" else None)

    with pytest.raises(DroverError) as caught:
        await db.transaction(slow_commit, timeout=1)
    unavailable(caught.value, "DEADLINE", "unknown")
    assert committing.is_set()
    go.set()
    assert await db.read(keys) == [1]


async def test_full_disk_and_recovery(db: Database) -> None:
    await db.transaction(put(1))
    pages = await db.read(lambda c: c.execute("PRAGMA page_count").fetchone()[0])
    await db.read(lambda c: c.execute(f"PRAGMA max_page_count={pages}").fetchone())
    with pytest.raises(DroverError) as caught:
        await db.transaction(put_many(range(2, 9), bytes(4096)))
    unavailable(caught.value, "SQLITE_FULL", "no")
    assert "free space" in caught.value.message
    assert await db.read(keys) == [1]
    await db.read(lambda c: c.execute("PRAGMA max_page_count=100000").fetchone())
    await db.transaction(put(2))
    assert await db.read(keys) == [1, 2]


async def test_read_only(db: Database) -> None:
    await db.read(lambda c: c.execute("PRAGMA query_only=1").fetchall())
    with pytest.raises(DroverError, match="writable") as caught:
        await db.transaction(put(1))
    unavailable(caught.value, "SQLITE_READONLY", "no")


async def test_reopen_keeps_data_and_migrates(tmp_path: Path) -> None:
    path = tmp_path / "j.db"
    async with Database(path, SCHEMA) as db:
        await db.transaction(put(1))
    assert size(wal_of(path)) == -1
    newer = (*SCHEMA, "ALTER TABLE item ADD COLUMN note TEXT; -- the end of a script may be a comment")
    async with Database(path, newer) as db:
        assert await db.read(lambda c: c.execute("SELECT id, note FROM item").fetchall()) == [(1, None)]
    with pytest.raises(DroverError, match="newer Drover") as caught:
        await Database(path, SCHEMA).open()
    unavailable(caught.value, "NEWER_SCHEMA", "no")


async def test_failed_migration_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "j.db"
    async with Database(path, SCHEMA):
        pass
    with pytest.raises(DroverError):
        await Database(path, (*SCHEMA, "CREATE TABLE other (id); SELECT nonsense")).open()
    async with Database(path, SCHEMA) as db:
        assert await db.read(lambda c: [row[0] for row in c.execute("SELECT name FROM sqlite_master WHERE name = 'other'")]) == []


def crashed_copy(db: Database, target: Path) -> Path:
    """Copy the files as a power cut would leave them, without the memory map beside them."""
    shutil.copy(db.path, target)
    shutil.copy(f"{db.path}-wal", f"{target}-wal")
    shutil.copy(mark_of(db.path), mark_of(target))
    return target


@pytest.mark.parametrize("cut", [1, 4096, 4100])
async def test_wal_cut_short_loses_only_the_last_transaction(db: Database, tmp_path: Path, cut: int) -> None:
    """Its commit had not returned when the crash came, so the mark does not count it."""
    await db.transaction(put(1))
    before = mark_of(db.path).read_bytes()
    await db.transaction(put(2))
    copy = crashed_copy(db, tmp_path / "copy.db")
    mark_of(copy).write_bytes(before)
    cut_end(wal_of(copy), cut)
    async with Database(copy, SCHEMA) as recovered:
        assert await recovered.read(keys) == [1]
        await recovered.transaction(put(3))
    async with Database(copy, SCHEMA) as again:
        assert await again.read(keys) == [1, 3]


def files(path: Path) -> dict[str, bytes]:
    """Return the contents of a database's files."""
    kept = [path, wal_of(path), mark_of(path)]
    return {each.name: each.read_bytes() for each in kept if size(each) > 0}


@pytest.mark.parametrize("damage", ["cut", "bits", "no wal", "empty", "gone", "older copy", "mark"])
async def test_6_27_a_journal_that_lost_what_it_promised_is_refused_until_that_is_accepted(
    db: Database, tmp_path: Path, damage: str
) -> None:
    older = crashed_copy(db, tmp_path / "older.db")
    for key in range(10):
        await db.transaction(put(key, bytes(3000)))
    copy = crashed_copy(db, tmp_path / "copy.db")
    match damage:
        case "cut":
            cut_end(wal_of(copy), 1)
        case "bits":
            flip(wal_of(copy), 20, Random(1))
        case "no wal":
            wal_of(copy).unlink()
        case "empty":
            copy.write_bytes(b"")
        case "gone":
            copy.unlink()
            wal_of(copy).unlink()
        case "older copy":
            shutil.copy(older, copy)
            shutil.copy(wal_of(older), wal_of(copy))
        case "mark":
            mark_of(copy).write_bytes(b"?" * 30)
    before = files(copy)
    for _ in range(2):  # for ever, not only once
        with pytest.raises(DroverError) as caught:
            await Database(copy, SCHEMA).open()
        unavailable(caught.value, "DAMAGED_MARK" if damage == "mark" else "LOST_WRITES", "no")
        assert "\n" not in caught.value.message
        assert files(copy) == before
    accept = caught.value.message.rpartition("touch ")[2]
    Path(accept).touch()
    async with Database(copy, SCHEMA) as accepted:
        assert accepted.lost
        assert set(await accepted.read(keys)) <= set(range(10))
        await accepted.transaction(put(20))
    assert not Path(accept).exists()
    async with Database(copy, SCHEMA) as again:
        assert not again.lost
        assert 20 in await again.read(keys)


async def test_6_27_what_was_committed_and_not_acknowledged_is_no_loss(db: Database, tmp_path: Path) -> None:
    """The mark was not written, or a loss of power took it back."""
    before = mark_of(db.path).read_bytes()
    await db.transaction(put(1))
    copy = crashed_copy(db, tmp_path / "copy.db")
    mark_of(copy).write_bytes(before)
    async with Database(copy, SCHEMA) as recovered:
        assert await recovered.read(keys) == [1]
    mark_of(copy).unlink()
    with pytest.raises(DroverError, match="DAMAGED_MARK"):
        await Database(copy, SCHEMA).open()


async def test_6_27_a_loss_that_was_accepted_for_nothing_accepts_no_later_one(tmp_path: Path) -> None:
    path = tmp_path / "j.db"
    (tmp_path / "j.db.accept-loss").touch()
    async with Database(path, SCHEMA) as db:
        assert not db.lost
        await db.transaction(put(1))
    path.unlink()
    with pytest.raises(DroverError, match="LOST_WRITES"):
        await Database(path, SCHEMA).open()


async def test_crash_keeps_everything_committed(db: Database, tmp_path: Path) -> None:
    for i in range(20):
        await db.transaction(put(i))
    async with Database(crashed_copy(db, tmp_path / "copy.db"), SCHEMA) as recovered:
        assert await recovered.read(keys) == list(range(20))


def spoil(path: Path, damage: str) -> None:
    with path.open("r+b") as file:
        end = file.seek(0, 2)
        if damage == "half":
            file.truncate(end // 2)
        elif damage == "garbage":
            file.seek(0)
            file.write(b"this is no database" * 10)
        else:
            file.seek(end // 2 // 4096 * 4096)
            file.write(b"\xff" * 4096)


@pytest.mark.parametrize("damage", ["half", "garbage", "middle"])
async def test_corrupted_file_is_a_clear_error(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "j.db"
    async with Database(path, SCHEMA) as db:
        await db.transaction(put_many(range(50), b"data" * 500))
    spoil(path, damage)
    with pytest.raises(DroverError, match="from a backup") as caught:
        await Database(path, SCHEMA).open()
    assert caught.value.metadata["cause"] in ("SQLITE_CORRUPT", "SQLITE_NOTADB")
    assert caught.value.metadata["path"] == str(path)


async def test_missing_directory_and_directory_in_the_way(tmp_path: Path) -> None:
    with pytest.raises(DroverError, match="directory exists") as caught:
        await Database(tmp_path / "none" / "j.db", SCHEMA).open()
    unavailable(caught.value, "SQLITE_CANTOPEN", "no")
    (tmp_path / "dir.db").mkdir()
    with pytest.raises(DroverError) as caught:
        await Database(tmp_path / "dir.db", SCHEMA).open()
    unavailable(caught.value, "SQLITE_CANTOPEN", "no")


async def test_one_process_at_a_time(db: Database) -> None:
    other = Database(db.path, SCHEMA)
    with pytest.raises(DroverError, match="in use by another process") as caught:
        await other.open()
    unavailable(caught.value, "SQLITE_BUSY", "no")
    await db.transaction(put(1))  # the refused one took nothing away
    await db.close()
    async with Database(db.path, SCHEMA) as now:
        assert await now.read(keys) == [1]


async def test_foreign_lock_is_busy(db: Database) -> None:
    foreign = sqlite3.connect(db.path, isolation_level=None)
    foreign.execute("BEGIN IMMEDIATE")
    with pytest.raises(DroverError) as caught:
        await db.transaction(put(1), timeout=0.05)
    unavailable(caught.value, "DEADLINE", "no")
    foreign.execute("ROLLBACK")
    foreign.close()
    assert await db.read(keys) == []


async def test_closed(tmp_path: Path) -> None:
    db = Database(tmp_path / "j.db", SCHEMA)
    await db.open()
    last = asyncio.create_task(db.transaction(put(1)))
    await asyncio.sleep(0)  # let the task put its transaction into the queue
    await db.close()
    await db.close()
    await last
    with pytest.raises(DroverError) as caught:
        await db.transaction(put(2))
    unavailable(caught.value, "CLOSED", "no")


async def test_growth_is_bounded(db: Database) -> None:
    wal = wal_of(db.path)
    await db.transaction(put_many(range(100), bytes(20_000)))
    for i in range(100):
        await db.transaction(put(i, bytes(60_000)))
    assert size(wal) < 5_000_000
    await db.transaction(lambda c: c.execute("DELETE FROM item").rowcount)
    freed = await db.read(lambda c: c.execute("PRAGMA freelist_count").fetchone()[0]) - TIDY_PAGES + 1
    for i in range(TIDY_COMMITS):
        await db.transaction(put(i % 3))
    assert await db.read(lambda c: c.execute("PRAGMA freelist_count").fetchone()[0]) < freed
    await db.close()
    assert size(db.path) < 4_000_000
    assert size(wal) == -1
