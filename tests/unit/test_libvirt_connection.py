"""Threads, connections and event streams of the libvirt driver, with connections that hang."""

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest

libvirt = pytest.importorskip("libvirt", reason="libvirt-python is not installed")

from agent.hypervisor.base import DomainEvent, HypervisorUnavailable  # noqa: E402 - after the skip
from agent.hypervisor.events import BACKLOG, Fanout  # noqa: E402
from agent.hypervisor.libvirt import connection, threads  # noqa: E402
from tests.unit.asking import until  # noqa: E402


class FakeConnection:
    def __init__(self) -> None:
        self.closed = threading.Event()

    def isAlive(self) -> bool:  # noqa: N802 - libvirt's name
        return not self.closed.is_set()

    def close(self) -> None:
        self.closed.set()


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[FakeConnection]:
    """The connections that were opened, in order."""
    made: list[FakeConnection] = []

    def connect(uri: str) -> connection.Link:
        made.append(FakeConnection())
        return connection.Link(made[-1])

    monkeypatch.setattr(connection, "connect", connect)
    return made


async def closing(one: FakeConnection) -> bool:
    return await asyncio.to_thread(one.closed.wait, 5)


async def test_threads_never_wait_for_each_other() -> None:
    gate = threading.Event()
    stuck = [threads.submit(gate.wait) for _ in range(20)]
    assert threads.submit(lambda: 1).result(5) == 1
    gate.set()
    assert all(future.result(5) for future in stuck)
    with pytest.raises(ZeroDivisionError):
        threads.submit(lambda: 1 // 0).result(5)


async def test_a_cancelled_waiter_does_not_break_its_thread() -> None:
    entered, gate = threading.Event(), threading.Event()

    def work() -> int:
        entered.set()
        gate.wait()
        return 7

    future = threads.submit(work)
    assert await asyncio.to_thread(entered.wait, 5)
    waiting = asyncio.wrap_future(future)
    waiting.cancel()
    await asyncio.sleep(0)
    gate.set()
    assert await asyncio.to_thread(future.result, 5) == 7


async def test_a_stuck_call_abandons_its_connection(opened: list[FakeConnection]) -> None:
    session = connection.Session(connection.Pool("", call_timeout=0.5))
    gate = threading.Event()
    with pytest.raises(HypervisorUnavailable):
        await session.call(lambda _: gate.wait())
    assert await session.call(lambda found: found) is opened[1]
    assert not opened[0].closed.is_set()  # a call still runs on it
    gate.set()
    assert await closing(opened[0])
    await session.close()
    assert opened[1].closed.is_set()


async def test_closing_waits_for_the_last_call(opened: list[FakeConnection]) -> None:
    session = connection.Session(connection.Pool("", call_timeout=5))
    gate, running = threading.Event(), threading.Event()

    def perform(_: Any) -> int:
        running.set()
        gate.wait()
        return 7

    task = asyncio.create_task(session.call(perform, bounded=False))
    await asyncio.to_thread(running.wait, 5)
    await session.close()
    assert not opened[0].closed.is_set()
    gate.set()
    assert await task == 7
    assert await closing(opened[0])


async def test_a_cancelled_await_leaves_the_call_running(opened: list[FakeConnection]) -> None:
    session = connection.Session(connection.Pool("", call_timeout=5))
    entered, gate, done = threading.Event(), threading.Event(), threading.Event()

    def perform(_: Any) -> None:
        entered.set()
        gate.wait()
        done.set()

    task = asyncio.create_task(session.call(perform, bounded=False))
    assert await asyncio.to_thread(entered.wait, 5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    gate.set()
    assert await asyncio.to_thread(done.wait, 5)
    await session.close()


async def test_pool_gives_each_call_a_connection_and_keeps_few(opened: list[FakeConnection]) -> None:
    pool = connection.Pool("", call_timeout=5)
    gate = threading.Event()
    entered = threading.Barrier(11)

    def stay(_: Any) -> bool:
        entered.wait(5)
        return gate.wait()

    busy = [asyncio.create_task(pool.call(stay)) for _ in range(10)]
    await asyncio.to_thread(entered.wait, 5)
    assert await pool.call(lambda _: 1) == 1
    assert len(opened) == 11
    gate.set()
    await asyncio.gather(*busy)
    assert await pool.call(lambda _: 1) == 1
    assert len(opened) == 11  # reused
    await pool.close()
    for one in opened:
        assert await closing(one)


async def test_pool_does_not_reuse_a_dead_connection(opened: list[FakeConnection]) -> None:
    pool = connection.Pool("", call_timeout=5)
    await pool.call(lambda _: 1)
    await asyncio.sleep(0)
    opened[0].close()
    assert await pool.call(lambda found: found) is opened[1]
    await pool.close()


async def test_a_hanging_libvirtd_takes_few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, under_way = threading.Event(), []

    def connect(uri: str) -> connection.Link:
        under_way.append(uri)
        gate.wait()
        return connection.Link(FakeConnection())

    monkeypatch.setattr(connection, "connect", connect)
    monkeypatch.setattr(connection, "OPENINGS", 3)
    pool = connection.Pool("", call_timeout=0.1)
    for _ in range(6):
        with pytest.raises(HypervisorUnavailable):
            await pool.call(lambda _: 1)
    await until(lambda: len(under_way) == 3)
    gate.set()
    pool.call_timeout = 5
    async with asyncio.timeout(5):
        while pool._openings.locked():  # noqa: ASYNC110 - a thread has to return
            await asyncio.sleep(0.01)
    assert await pool.call(lambda _: 1) == 1


async def test_a_call_without_a_thread_never_runs_and_frees_its_slot(
    opened: list[FakeConnection], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "CONNECTIONS", 1)
    pool = connection.Pool("", call_timeout=5)
    session = connection.Session(pool)
    await session.open()
    await pool.call(lambda _: 1)
    ran: list[int] = []

    def no_thread(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as short:
        short.setattr(threads, "_idle", SimpleNamespace(acquire=lambda blocking: False, release=lambda: None))
        short.setattr(threading.Thread, "start", no_thread)
        with pytest.raises(HypervisorUnavailable, match="could not start a thread"):
            await pool.call(lambda _: ran.append(1))
        opened[1].close()  # so that the next call has to open one
        with pytest.raises(HypervisorUnavailable, match="could not start a thread"):
            await pool.call(lambda _: ran.append(2))
        with pytest.raises(HypervisorUnavailable, match="could not start a thread"):
            await session.call(lambda _: ran.append(3))
        await session.close()
    assert await pool.call(lambda _: 1) == 1
    assert ran == []


async def test_a_slow_consumer_loses_the_oldest_events() -> None:
    fanout = Fanout()
    stream, other = fanout.stream(), fanout.stream()
    for number in range(BACKLOG + 10):
        fanout.put(DomainEvent(str(number), "resumed"))
    assert (await anext(stream)).uuid == "10"
    assert (await anext(other)).uuid == "10"
    fanout.close()
    assert len([event async for event in stream]) == BACKLOG - 1
