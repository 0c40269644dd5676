"""coordinator.store: damaged files, and the ended migrations that it keeps."""

import asyncio
import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Final

import pytest
from structlog.testing import capture_logs

import coordinator.store.migration_log
from agent.runtime.errors import DroverError, Reason
from coordinator.store import KeyValue, MemoryStore, Put, SqliteStore
from coordinator.store.migration_log import ENDED, StoredMigrations
from drover.agent.v1 import migration_pb2 as pb
from tests.unit.asking import fails
from tests.unit.test_sqlite import flip

SUFFIXES: Final = ("", "-wal", ".mark")


@dataclass(frozen=True)
class Crashed:
    """The files of a store as a crash of its coordinator left them, and its contents."""

    files: dict[str, bytes]
    items: list[KeyValue]
    revision: int


async def contents(store: SqliteStore) -> tuple[list[KeyValue], int]:
    listing = await store.list("")
    return list(listing.items), listing.revision


async def crashed(path: Path) -> Crashed:
    async with await SqliteStore.open(path) as store:
        for number in range(60):
            await store.txn([], [Put(f"{prefix}{number}", bytes([number]) * 700) for prefix in ("/hosts/", "/migrations/", ENDED)])
    async with await SqliteStore.open(path) as store:
        await store.grant(100)
        for number in range(10):
            await store.txn([], [Put(f"/hosts/{number}", b"later" * 50)])
        files = {suffix: Path(f"{path}{suffix}").read_bytes() for suffix in SUFFIXES}
        return Crashed(files, *await contents(store))


@pytest.fixture(scope="module")
def crash(tmp_path_factory: pytest.TempPathFactory) -> Crashed:
    return asyncio.run(crashed(tmp_path_factory.mktemp("store") / "s.db"))


async def damaged(path: Path, crash: Crashed, random: Random) -> str:
    """Flip bits, open the store, and compare. Return the error if it refuses; empty if it serves everything it had acknowledged."""
    for suffix, data in crash.files.items():
        Path(f"{path}{suffix}").write_bytes(data)
    for suffix in random.choice([[""], ["-wal"], ["", "-wal"]]):
        flip(Path(f"{path}{suffix}"), random.choice([1, 1, 2, 20]), random)
    with capture_logs() as logs:
        try:
            store = await SqliteStore.open(path, expendable=[ENDED])
        except DroverError as error:
            return error.message
        async with store:
            items, revision = await contents(store)
            assert await store.grant(10) == 2
    missing = [each for each in crash.items if each not in items]
    assert revision == crash.revision
    assert [each for each in items if each not in crash.items] == []
    assert all(each.key.startswith(ENDED) for each in missing)
    assert len([entry for entry in logs if entry["event"] == "sqlite.damaged_row"]) == len(missing)
    return ""


@pytest.mark.parametrize("seed", range(60))
async def test_6_27_flipped_bits_lose_nothing_without_a_word(tmp_path: Path, crash: Crashed, seed: int) -> None:
    said = await damaged(tmp_path / "s.db", crash, Random(seed))
    assert "\n" not in said
    assert not said or f"{tmp_path}/s.db cannot be used: " in said


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        (f"UPDATE kv SET value = x'00' WHERE key = CAST('{ENDED}1' AS BLOB)", False),
        ("UPDATE kv SET value = x'00' WHERE key = CAST('/migrations/1' AS BLOB)", True),
        (f"UPDATE kv SET key = CAST('{ENDED}2' AS BLOB) WHERE key = CAST('/migrations/1' AS BLOB)", True),
        ("UPDATE kv SET mod_revision = 1 WHERE key = CAST('/migrations/1' AS BLOB)", True),
        ("UPDATE counter SET value = 9 WHERE name = 'revision'", True),
        ("UPDATE lease SET ttl = 1", True),
    ],
)
async def test_6_27_only_what_has_ended_may_be_damaged(tmp_path: Path, change: str, *, refused: bool) -> None:
    path = tmp_path / "s.db"
    async with await SqliteStore.open(path) as store:
        await store.txn([], [Put(f"{prefix}1", b"data") for prefix in ("/migrations/", ENDED)])
        await store.grant(100)
    connection = sqlite3.connect(path)
    connection.execute(change)
    connection.commit()
    connection.close()
    if refused:
        error = await fails(SqliteStore.open(path, expendable=[ENDED]), Reason.JOURNAL_UNAVAILABLE)
        assert error.metadata["cause"] == "DAMAGED_ROW"
        assert error.message.endswith(f"touch {path}.accept-loss")
        Path(f"{path}.accept-loss").touch()
    async with await SqliteStore.open(path, expendable=[ENDED]) as store:
        assert (await store.get(f"{ENDED}1") is None) is not refused
        before = (await store.list("")).revision
        assert await store.txn([], [Put("/new", b"data")]) == before + 1 > 2


async def test_6_27_a_store_of_an_earlier_drover_is_read(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "s.db")
    connection.executescript(coordinator.store.sqlite._SCHEMA[0])
    connection.execute("INSERT INTO kv VALUES (CAST('/hosts/h1' AS BLOB), x'01', 2, 3, 7)")
    connection.execute("INSERT INTO lease VALUES (7, 100)")
    connection.execute("UPDATE counter SET value = 3")
    connection.execute("PRAGMA user_version = 1")
    connection.commit()
    connection.close()
    for life in range(2):
        async with await SqliteStore.open(tmp_path / "s.db") as store:
            assert await contents(store) == ([KeyValue("/hosts/h1", b"\x01", 2, 3, 7)], 3)
            assert await store.grant(10) == 8 + life


# --- migrations -------------------------------------------------------------------------------------------------------


def migration(name: str, state: pb.MigrationState.ValueType) -> bytes:
    return pb.Migration(migration_id=name, state=state).SerializeToString()


async def test_ended_migrations_are_kept_apart_and_the_oldest_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinator.store.migration_log, "KEEP", 3)
    async with await MemoryStore.open(clock=time.monotonic) as store:
        active, ended = pb.MIGRATION_STATE_ACTIVE, pb.MIGRATION_STATE_SUCCEEDED
        await store.txn([], [Put("/migrations/old", migration("old", ended))])  # as an earlier Drover kept it
        log = StoredMigrations(store)
        await log.load()
        for name in "abcd":
            await log.save(name, migration(name, active), ended=False)
        for name in "abcda":
            await log.save(name, migration(name, ended), ended=True)
            await log.save(name, migration(name, ended), ended=True)

        async def keys() -> list[Any]:
            return [item.key for item in (await store.list("")).items]

        assert await keys() == [ENDED + name for name in "acd"]
        again = StoredMigrations(store)
        assert [pb.Migration.FromString(body).migration_id for body in await again.load()] == ["c", "d", "a"]
        await again.save("e", migration("e", ended), ended=True)
        assert await keys() == [ENDED + name for name in "ade"]
