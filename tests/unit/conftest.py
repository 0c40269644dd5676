"""Fixtures that several unit tests share."""

from collections.abc import AsyncIterator

import pytest

from tests.unit.fake_directory import Driving
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
