"""agent.handshake.host.slots: what two drivers of one migration ask at the same time never parts the record and the book."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from agent.admission.values import Direction, Kind
from drover.agent.v1 import admission_pb2 as pb
from tests.unit.asking import ID, reserve, until
from tests.unit.test_slots_of_records import INCOMING, PREPARED, TRANSFERRING, acquire, listed
from tests.unit.two_agents import Agent, Pair, pair_of_agents

RELEASE = pb.ReleaseSlotRequest(migration_id=ID, direction=INCOMING, keep_place=True)


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    async with pair_of_agents(slots=1) as pair:
        yield pair


def agree(agent: Agent, *, transferring: bool) -> None:
    """Assert that the record and the book say the same."""
    claim = agent.engine.desk.books[Direction.INCOMING].find(ID)
    assert claim is not None
    assert claim.attached
    assert (agent.durable.transferring, claim.has(Kind.TRANSFERRING), agent.in_use) == (transferring,) * 2 + (int(transferring),)


async def test_8_1_a_slot_that_is_given_back_while_it_is_raised_ends_as_a_prepared_one_in_both(pair: Pair) -> None:
    agent = pair.destination
    await agent.engine.reserve_slot(reserve())
    await agent.engine.release_slot(RELEASE)
    agree(agent, transferring=False)
    agent.journal.held = asyncio.Event()
    raises = asyncio.ensure_future(agent.engine.acquire_slot(acquire(kind=TRANSFERRING)))
    await agent.journal.waiting.wait()
    gives_back = asyncio.ensure_future(agent.engine.release_slot(RELEASE))
    await asyncio.sleep(0)
    agent.journal.held.set()
    await asyncio.gather(raises, gives_back)
    agree(agent, transferring=False)
    assert (await agent.engine.acquire_slot(acquire("other"))).slot.kind == TRANSFERRING


@pytest.mark.parametrize("acquired", [True, False])
async def test_8_1_a_slot_cannot_be_given_back_while_its_record_is_made(pair: Pair, *, acquired: bool) -> None:
    agent = pair.destination
    if acquired:
        await agent.engine.acquire_slot(acquire(kind=PREPARED))
    agent.journal.held = asyncio.Event()
    reserves = asyncio.ensure_future(agent.engine.reserve_slot(reserve()))
    await agent.journal.waiting.wait()
    await agent.engine.release_slot(pb.ReleaseSlotRequest(migration_id=ID, direction=INCOMING))
    agent.journal.held.set()
    assert (await reserves).record.slot.transferring
    agree(agent, transferring=True)


async def test_8_1_a_slot_that_was_given_back_while_its_record_was_not_made_is_free(pair: Pair) -> None:
    agent = pair.destination
    await agent.engine.acquire_slot(acquire())
    agent.journal.held, agent.journal.fails = asyncio.Event(), [OSError("no space")]
    reserves = asyncio.ensure_future(agent.engine.reserve_slot(reserve()))
    await agent.journal.waiting.wait()
    await agent.engine.release_slot(pb.ReleaseSlotRequest(migration_id=ID, direction=INCOMING))
    agent.journal.held.set()
    with pytest.raises(OSError, match="no space"):
        await reserves
    await until(lambda: not agent.in_use)
    assert await listed(agent) == []
