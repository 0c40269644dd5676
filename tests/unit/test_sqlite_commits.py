"""agent.runtime.sqlite: transactions that wait at the same time share a commit, and nothing else."""

import asyncio
import contextlib
import sqlite3
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent.runtime.errors import DroverError
from agent.runtime.intact import commits
from agent.runtime.sqlite import Database
from tests.unit.test_sqlite import SCHEMA, crashed_copy, keys, put, unavailable


@pytest.fixture
async def db(tmp_path: Path) -> AsyncIterator[Database]:
    async with Database(tmp_path / "j.db", SCHEMA) as database:
        yield database


@contextlib.asynccontextmanager
async def held(db: Database) -> AsyncIterator[None]:
    """Keep the thread busy: what is asked in the block waits until its end."""
    entered, go = threading.Event(), threading.Event()

    def wait(_: sqlite3.Connection) -> None:
        entered.set()
        go.wait(5)

    busy = asyncio.create_task(db.read(wait))
    assert await asyncio.to_thread(entered.wait, 5)
    try:
        yield
        await asyncio.sleep(0)  # lets the tasks of the block put their transactions into the queue
    finally:
        go.set()
        await busy


async def test_transactions_that_wait_together_share_a_commit(db: Database) -> None:
    before = await db.read(commits)
    async with held(db):
        together = [asyncio.create_task(db.transaction(put(key))) for key in range(5)]
    await asyncio.gather(*together)
    assert await db.read(keys) == [0, 1, 2, 3, 4]
    assert await db.read(commits) == (before or 0) + 1


async def test_one_that_fails_takes_none_of_the_others_with_it(db: Database, tmp_path: Path) -> None:
    def fail(connection: sqlite3.Connection) -> None:
        put(2)(connection)
        raise KeyError("mine")

    async with held(db):
        together = [asyncio.create_task(db.transaction(fn)) for fn in (put(1), fail, put(3))]
        late = asyncio.create_task(db.transaction(put(4), timeout=0))
        with pytest.raises(DroverError) as caught:
            await late
    unavailable(caught.value, "DEADLINE", "no")
    outcomes = await asyncio.gather(*together, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [type(None), KeyError, type(None)]
    async with Database(crashed_copy(db, tmp_path / "copy.db"), SCHEMA) as recovered:
        assert await recovered.read(keys) == [1, 3]


async def test_all_of_a_commit_that_hangs_are_unknown(db: Database) -> None:
    go = threading.Event()

    def slow_commit(connection: sqlite3.Connection) -> None:
        connection.set_trace_callback(lambda text: go.wait(5) and None if text == "COMMIT" else None)

    async with held(db):
        together = [asyncio.create_task(db.transaction(fn, timeout=1)) for fn in (put(1), slow_commit, put(2))]
    for outcome in await asyncio.gather(*together, return_exceptions=True):
        assert isinstance(outcome, DroverError)
        unavailable(outcome, "DEADLINE", "unknown")
    go.set()
    assert await db.read(keys) == [1, 2]
