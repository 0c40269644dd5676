"""Fixtures that several unit tests share."""

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.handshake.drive import calls
from agent.runtime.events import Bus
from coordinator.hosts.hosts import HostRegistry
from coordinator.store import MemoryStore
from tests.unit.fake_agents import Clock, FakeAgent
from tests.unit.fake_directory import Driving
from tests.unit.running_drover import Drover, serving
from tests.unit.two_agents import Pair, pair_of_agents


@pytest.fixture(autouse=True)
def short_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the polls, so that a host that has stopped answering is noticed soon."""
    monkeypatch.setattr(calls, "LONG_POLL", 0.1)


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    async with pair_of_agents() as pair:
        yield pair


@pytest.fixture
async def driving(pair: Pair) -> AsyncIterator[Driving]:
    driving = Driving(pair)
    yield driving
    await driving.close()


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    directory = tmp_path_factory.mktemp("fake")
    with serving(directory):
        yield directory


@pytest.fixture
def drover(servers: Path) -> Drover:
    return Drover(f"unix:{servers}/coordinator.sock")


@pytest.fixture
def agent(servers: Path) -> Drover:
    return Drover(f"unix:{servers}/agent.sock")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def store() -> AsyncIterator[MemoryStore]:
    async with await MemoryStore.open() as opened:
        yield opened


@pytest.fixture
def bus() -> Bus:
    return Bus()


@pytest.fixture
async def registry(store: MemoryStore, bus: Bus, clock: Clock) -> AsyncIterator[HostRegistry]:
    made = HostRegistry(store, bus, 5.0, clock, wall=lambda: clock.now)
    await made.open()
    yield made
    await made.close()


@pytest.fixture
async def agents(tmp_path: Path) -> AsyncIterator[Callable[..., Any]]:
    started: list[FakeAgent] = []

    async def start(name: str, uuid: str = "", directory: str = "") -> FakeAgent:
        agent = FakeAgent(tmp_path / directory, name, uuid)
        started.append(agent)
        await agent.start()
        return agent

    yield start
    for agent in started:
        await agent.stop()
