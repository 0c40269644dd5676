"""agent.takeover: whom it can ask, and what it does where it cannot."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from structlog.testing import capture_logs

from agent.handshake.attempt import Attempt
from agent.handshake.records import Role
from agent.peers import Channels
from agent.service.handshake_service import RemotePeer
from agent.takeover import TakeOver
from tests.unit.asking import record
from tests.unit.two_agents import Agent


@pytest.fixture
async def channels() -> AsyncIterator[Channels]:
    channels = Channels()
    yield channels
    await channels.close()


async def performing(address: str) -> tuple[Agent, Attempt]:
    """A source that sends memory to an agent at that address, which its driver told it."""
    agent = Agent("h1")
    agent.keep(record(Role.SOURCE, "performing", peer_agent=address))
    await agent.engine.recover()
    return agent, agent.engine.active()[0]


@pytest.mark.parametrize("address", ["", "h2.example:7400", "10.91.0.2", "nonsense"])
async def test_an_agent_whose_address_is_none_is_not_asked(channels: Channels, address: str) -> None:
    agent, attempt = await performing(address)
    take_over = TakeOver(channels)
    take_over.engine = agent.engine
    with capture_logs() as logs:
        assert take_over.other_side(attempt) is None
        take_over(attempt)  # as from a timer: nobody would see what it raises
    assert not take_over._tasks
    assert [line["log_level"] for line in logs] == ["error"] * (3 if address else 1)
    await agent.close()


async def test_a_silent_drivers_attempt_gets_one_new_driver(channels: Channels) -> None:
    agent, attempt = await performing("127.0.0.1:1")
    take_over = TakeOver(channels)
    take_over.engine = agent.engine
    assert isinstance(take_over.other_side(attempt), RemotePeer)
    for _ in range(2):
        take_over(attempt)
    assert len(take_over._tasks) == 1
    await asyncio.sleep(0)
    await take_over.close()
    assert not take_over._tasks
    await agent.close()
