"""What tells an agent that the driver of an attempt lives (issue 6, line 8): its own calls, and nobody else's that are refused."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from agent.handshake.host import signs
from agent.runtime.errors import Reason
from drover.agent.v1 import handshake_pb2 as pb
from tests.unit.asking import begin, confirm, fails
from tests.unit.two_agents import Pair, pair_of_agents


@pytest.fixture
async def brief() -> AsyncIterator[Pair]:
    """Leases and patience of 300 ms: a busy machine makes a few calls within one."""
    async with pair_of_agents(lease=0.3, takeover=0.3) as pair:
        yield pair


@pytest.mark.parametrize("call", ["other content", "out of place"])
async def test_6_08_refused_calls_of_anybody_keep_no_silent_driver_unnoticed(brief: Pair, call: str) -> None:
    source = brief.source
    await source.engine.begin(begin(request_id="driver-1"))
    for _ in range(2000):
        if source.journalled == "kept":
            break
        if call == "other content":
            await fails(source.engine.begin(begin(destination_host="h9", request_id="another-1")), Reason.MIGRATION_EXISTS)
        else:
            await fails(source.engine.confirm(confirm(pb.DECISION_RUNNING)), Reason.WRONG_PHASE, Reason.UNDECIDED)
        await asyncio.sleep(0.01)
    assert source.journalled == "kept"


async def test_6_08_calls_of_anybody_that_are_still_under_way_keep_no_silent_driver_unnoticed(
    brief: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signs, "MAX_WAIT", 0.3)
    source = brief.source
    await source.engine.begin(begin(request_id="driver-1"))
    (begun,) = source.engine.active()
    async with begun.called("confirm", "another-1"):
        await source.reaches("kept")


async def test_6_08_a_call_of_the_driver_that_is_still_under_way_is_a_sign_of_life(
    brief: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signs, "MAX_WAIT", 0.0)
    source = brief.source
    await source.engine.begin(begin(request_id="driver-1"))
    (begun,) = source.engine.active()
    async with begun.called("confirm", "driver-2"):
        await asyncio.sleep(0.6)  # twice the patience: what is shown is that nothing happens
        assert source.journalled == "begun"
