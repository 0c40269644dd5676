"""agent.runtime.supervision: background work restarts after an unexpected error."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

import agent.main
from agent.config import AgentConfig
from agent.handshake.host.engine import Engine
from agent.runtime.backoff import BACKGROUND
from agent.runtime.supervision import supervise
from agent.service.host import AgentHost
from coordinator.hosts.hosts import HostRegistry
from coordinator.store import MemoryStore
from drover.agent.v1 import migration_pb2 as pb
from tests.unit.asking import ID, PATIENCE
from tests.unit.asking import until as so
from tests.unit.clocks import FakeClock
from tests.unit.fake_agents import UNREACHABLE, UP, Clock, register, until
from tests.unit.fake_directory import Driving
from tests.unit.test_migrations import flowing


async def test_7_pauses_grow_and_work_that_lasted_begins_with_the_first_again() -> None:
    clock, lasts = FakeClock(), iter([0.0] * 9 + [BACKGROUND.cap + 1, 0.0])

    async def work() -> None:
        clock.now += next(lasts)
        raise RuntimeError("a bug")

    with capture_logs():
        task = supervise("the work", work, clock)
        await so(lambda: len(clock.slept) > 10)
        task.cancel()
    ceilings = [BACKGROUND.ceiling(failures) for failures in (*range(1, 10), 1, 2)]
    assert all(pause <= ceiling for pause, ceiling in zip(clock.slept, ceilings, strict=False))
    assert max(clock.slept[:9]) > 1.0


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), asyncio.CancelledError()], ids=["error", "broken off"])
async def test_work_that_ends_as_nobody_foresaw_begins_again_and_is_told(error: BaseException) -> None:
    """A closed gRPC channel raises CancelledError, too."""
    runs: list[int] = []

    async def work() -> None:
        runs.append(1)
        if len(runs) < 3:
            raise error

    with capture_logs() as logs:
        async with asyncio.timeout(PATIENCE):
            await supervise("the work", work, FakeClock())
    assert len(runs) == 3
    assert [(entry["work"], entry["exc_info"], entry["log_level"]) for entry in logs] == [("the work", True, "error")] * 2


async def test_a_cancellation_ends_it() -> None:
    began = asyncio.Event()

    async def work() -> None:
        began.set()
        await asyncio.Event().wait()

    task = supervise("the work", work)
    await began.wait()
    task.cancel()
    await asyncio.wait({task}, timeout=PATIENCE)
    assert task.cancelled()


async def test_a_migration_goes_on_after_an_error_that_nobody_foresaw_at_its_resumption(driving: Driving) -> None:
    await flowing(driving)
    driving.directory.fails = [RuntimeError("a bug"), KeyError("another")]
    with capture_logs() as logs:
        await driving.restart()
        driving.pair.wire.all_sent.set()
        ended = await driving.ended(ID)
    assert ended.state == pb.MIGRATION_STATE_SUCCEEDED
    told = [entry for entry in logs if entry.get("work") == f"drive {ID[:8]}"]
    assert [entry["exc_info"] for entry in told] == [True, True]


async def test_what_an_agent_does_in_the_background_is_supervised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = dict.fromkeys(("settle", "keep current", "keep registered"), 0)

    def breaks(name: str) -> Any:
        async def work(*_: object) -> None:
            runs[name] += 1
            raise RuntimeError(name)

        return work

    monkeypatch.setattr(Engine, "settle", breaks("settle"))
    monkeypatch.setattr(AgentHost, "keep_current", breaks("keep current"))
    monkeypatch.setattr(agent.main, "keep_registered", breaks("keep registered"))
    config = AgentConfig(
        name="h1",
        listen=(f"unix:{tmp_path}/a.sock",),
        state_dir=str(tmp_path / "state"),
        hypervisor="sim",
        coordinator=f"unix:{tmp_path}/none.sock",
    )
    async with agent.main.agent(config, asyncio.Event()):
        await so(lambda: all(count > 1 for count in runs.values()))


async def test_a_host_whose_watch_breaks_in_an_unforeseen_way_is_watched_again(
    registry: HostRegistry, store: MemoryStore, agents: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = await agents("alpha")
    await register(registry, agent)
    agent.change(incoming_in_use=1)
    await until(store, "alpha", lambda known: known.host.incoming_in_use == 1)
    broken = [RuntimeError("a bug")]

    async def sleep(seconds: float) -> None:
        if broken:
            raise broken.pop()

    monkeypatch.setattr(clock, "sleep", sleep)
    await agent.stop()
    await until(store, "alpha", lambda known: known.state == UNREACHABLE)
    await agent.start()
    await until(store, "alpha", lambda known: known.state == UP)
    assert not broken
