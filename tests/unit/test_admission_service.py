"""agent.service.admission_service: slots over gRPC, as other agents and coordinators ask for them (issue 8, points 1 and 2)."""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent.runtime.errors import Reason
from agent.runtime.wire import duration
from agent.service.admission_service import SERVICE, admission_servicer
from agent.service.channel import open_channel
from agent.service.remote_peer import RemotePeer
from agent.service.server import start_server
from drover.agent.v1 import admission_pb2 as pb
from drover.agent.v1 import admission_pb2_grpc
from tests.unit.asking import fails, until
from tests.unit.test_slots_of_records import INCOMING, TRANSFERRING, acquire, waiting
from tests.unit.two_agents import Agent, pair_of_agents

FIRST, SECOND, THIRD = (str(uuid.UUID(int=number)) for number in (1, 2, 3))


@pytest.fixture
async def agent() -> AsyncIterator[Agent]:
    """A host with one slot."""
    async with pair_of_agents(slots=1) as pair:
        yield pair.destination


@pytest.fixture
async def peer(agent: Agent, tmp_path: Path) -> AsyncIterator[RemotePeer]:
    address, servicer = f"unix:{tmp_path}/agent.sock", admission_servicer(agent.engine)
    server = await start_server(
        [address], lambda added: admission_pb2_grpc.add_AdmissionServiceServicer_to_server(servicer, added), [SERVICE], agent.bus
    )
    channel = open_channel(address)
    yield RemotePeer(lambda: channel, "h2")
    await channel.close()
    await server.stop(0)


async def test_8_1_a_slot_is_taken_listed_and_given_back(agent: Agent, peer: RemotePeer) -> None:
    taken = (await peer.acquire_slot(acquire(FIRST))).slot
    assert (taken.migration_id, taken.kind, taken.cost, taken.HasField("expire_time")) == (FIRST, TRANSFERRING, 1, True)
    (listed,) = (await peer.list_slots(pb.ListSlotsRequest())).slots
    assert (listed.migration_id, listed.epoch, agent.in_use) == (FIRST, taken.epoch, 1)
    await peer.release_slot(pb.ReleaseSlotRequest(migration_id=FIRST, direction=INCOMING))
    assert (agent.in_use, list((await peer.list_slots(pb.ListSlotsRequest())).slots)) == (0, [])
    assert (await peer.acquire_slot(acquire(FIRST))).slot.epoch > taken.epoch


async def test_8_2_a_refusal_crosses_the_wire_with_its_figures(peer: RemotePeer) -> None:
    await peer.acquire_slot(acquire(FIRST))
    busy = await fails(peer.acquire_slot(acquire(SECOND)), Reason.BUSY)
    told = {name: busy.metadata[name] for name in ("limit", "limit_value", "in_use", "holders", "position", "queue_length")}
    figures = {"limit_value": "1", "in_use": "1", "position": "1", "queue_length": "1"}
    assert told == {"limit": "incoming_limit", "holders": FIRST, **figures}
    assert busy.retry_after is not None
    await fails(peer.acquire_slot(pb.AcquireSlotRequest(migration_id=SECOND)), Reason.INVALID_FIELD)


async def test_8_2_a_call_waits_for_its_turn_and_says_for_what(agent: Agent, peer: RemotePeer) -> None:
    await peer.acquire_slot(acquire(FIRST))
    wait = (await peer.acquire_slot(acquire(SECOND, wait=0.01))).wait
    assert (wait.host, wait.limit_value, list(wait.holders), wait.position) == ("h2", 1, [FIRST], 1)
    second = asyncio.create_task(peer.acquire_slot(acquire(SECOND, wait=20)))
    await until(lambda: waiting(agent, SECOND))
    await peer.release_slot(pb.ReleaseSlotRequest(migration_id=FIRST, direction=INCOMING))
    assert (await second).slot.migration_id == SECOND


async def test_8_2_a_caller_that_goes_away_is_passed_by(agent: Agent, peer: RemotePeer) -> None:
    await peer.acquire_slot(acquire(FIRST))
    gone = asyncio.create_task(peer.acquire_slot(acquire(SECOND, wait=20)))
    await until(lambda: waiting(agent, SECOND))
    gone.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await gone
    await until(lambda: not waiting(agent, SECOND))
    third = asyncio.create_task(peer.acquire_slot(acquire(THIRD, wait=20)))
    await until(lambda: waiting(agent, THIRD))
    await peer.release_slot(pb.ReleaseSlotRequest(migration_id=FIRST, direction=INCOMING))
    assert (await third).slot.migration_id == THIRD


async def test_8_2_a_wait_below_zero_is_refused(peer: RemotePeer) -> None:
    request = acquire(FIRST)
    request.wait.CopyFrom(duration(-1))
    await fails(peer.acquire_slot(request), Reason.INVALID_FIELD)
