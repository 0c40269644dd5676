"""Fixtures that several unit tests share."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.unit.fake_directory import Driving
from tests.unit.running_drover import Drover, serving
from tests.unit.two_agents import Pair, pair_of_agents, quicker


@pytest.fixture
async def pair(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Pair]:
    quicker(monkeypatch)
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
