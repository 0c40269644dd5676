"""agent.handshake.host.slots: what two drivers of one migration ask at the same time never parts the record and the book."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from agent.admission.values import Direction, Kind
from agent.runtime.errors import Reason
from drover.agent.v1 import admission_pb2 as pb
from drover.agent.v1 import handshake_pb2
from tests.unit.asking import CANCELLED, ID, begin, fails, finish, finished, perform, prepare, reserve, until
from tests.unit.test_slots_of_records import INCOMING, OUTGOING, PREPARED, TRANSFERRING, acquire, listed
from tests.unit.two_agents import Agent, Pair, pair_of_agents

RELEASE = pb.ReleaseSlotRequest(migration_id=ID, direction=INCOMING, keep_place=True)


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    async with pair_of_agents(slots=1) as pair:
        yield pair


def agree(agent: Agent, *, transferring: bool, direction: Direction = Direction.INCOMING) -> None:
    """Assert that the record and the book say the same."""
    book = agent.engine.desk.queues[direction].book
    claim = book.find(ID)
    assert claim is not None
    assert claim.attached
    assert (agent.durable.transferring, claim.has(Kind.TRANSFERRING)) == (transferring, transferring)
    assert book.transferring == int(transferring)


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


async def test_8_1_a_migration_that_is_given_up_as_its_record_is_made_keeps_both_together(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent, noted = pair.source, asyncio.Event()
    places = agent.engine.desk.queues[Direction.OUTGOING].places
    cancel = places.cancel

    async def slow(migration_id: str, given_up_for: str) -> None:
        await cancel(migration_id, given_up_for)
        await noted.wait()

    monkeypatch.setattr(places, "cancel", slow)
    reserved = await pair.destination.engine.reserve_slot(reserve())
    agent.journal.held = asyncio.Event()
    begins = asyncio.ensure_future(agent.engine.begin(begin(probe=reserved.probe)))
    await agent.journal.waiting.wait()
    gives_up = asyncio.ensure_future(
        agent.engine.release_slot(pb.ReleaseSlotRequest(migration_id=ID, direction=OUTGOING, cancelled=True))
    )
    await until(lambda: ID in places.cancelled)
    agent.journal.held.set()
    await begins
    noted.set()
    await gives_up
    agree(agent, transferring=False, direction=Direction.OUTGOING)


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


async def test_8_1_a_slot_that_is_given_back_as_the_transfer_begins_does_not_keep_the_guest_paused(pair: Pair) -> None:
    """Only a source that says itself that it sends lets a slot be taken beyond the limit."""
    source, destination = pair.source.engine, pair.destination.engine
    reserved = await destination.reserve_slot(reserve())
    await source.begin(begin(probe=reserved.probe))
    prepared = await destination.prepare(prepare(epoch=reserved.record.slot.epoch))
    await destination.release_slot(RELEASE)
    await destination.acquire_slot(acquire("other"))
    await fails(destination.finish(finish()), Reason.BUSY)
    await destination.release_slot(pb.ReleaseSlotRequest(migration_id="other", direction=INCOMING))
    await destination.acquire_slot(acquire(kind=TRANSFERRING))
    pair.wire.all_sent.clear()
    await source.perform(perform(uri=prepared.uri_out, cookie_in=prepared.cookie_out, destination_record=prepared.record))
    await destination.release_slot(RELEASE)
    await destination.acquire_slot(acquire("other"))
    assert (await destination.finish(finish())).record.state == handshake_pb2.RECORD_STATE_ARMED
    assert (pair.destination.durable.transferring, pair.destination.in_use) == (True, 2)
    pair.wire.all_sent.set()


async def test_8_2_a_driver_whose_slot_was_given_back_before_perform_waits_for_it_again(pair: Pair) -> None:
    driver, performs = pair.driver(), pair.to_source.perform

    async def given_back(request: handshake_pb2.PerformRequest) -> handshake_pb2.PerformResponse:
        vars(pair.to_source).pop("perform")
        await pair.destination.engine.release_slot(RELEASE)
        await pair.destination.engine.acquire_slot(acquire("other"))
        await until(lambda: (heard := pair.source.heard.of(pair.source.durable)) is None or not heard.slot.transferring)
        response: handshake_pb2.PerformResponse = await performs(request)
        return response

    vars(pair.to_source)["perform"] = given_back
    await driver.reserve()
    running = asyncio.ensure_future(finished(driver))
    await until(lambda: driver.view.wait is not None)
    assert pair.states == ("begun", "prepared")
    await pair.destination.engine.release_slot(pb.ReleaseSlotRequest(migration_id="other", direction=INCOMING))
    await running
    pair.moved()


async def test_8_2_a_fail_fast_migration_whose_slot_was_given_back_ends_with_busy(pair: Pair) -> None:
    driver = pair.driver()
    driver.slots.may_wait = False
    await driver.reserve()
    await pair.destination.engine.release_slot(RELEASE)
    await pair.destination.engine.acquire_slot(acquire("other"))
    await finished(driver)
    pair.stayed()
    assert driver.view.failure is not None
    assert (driver.view.failure.reason, driver.view.failure.metadata["limit"]) == (Reason.BUSY, "incoming_limit")


async def test_8_2_a_prepared_migration_that_ends_while_it_waits_leaves_no_place(pair: Pair) -> None:
    driver, aborts = pair.driver(), pair.to_source.abort

    async def overtaken(request: handshake_pb2.AbortRequest) -> handshake_pb2.AbortResponse:
        response: handshake_pb2.AbortResponse = await aborts(request)
        await pair.source.engine.acquire_slot(acquire(ID, OUTGOING, place_only=True))  # the driver's last call, on its way until now
        return response

    vars(pair.to_source)["abort"] = overtaken
    await driver.reserve()
    await pair.destination.engine.release_slot(RELEASE)
    await pair.destination.engine.acquire_slot(acquire("other"))
    running = asyncio.ensure_future(finished(driver))
    await until(lambda: driver.view.wait is not None)
    driver.view.cancel(CANCELLED)
    await running
    await driver.slots.leave(cancelled=True)
    pair.stayed()
    assert (await listed(pair.source), await listed(pair.destination)) == ([], [("other", TRANSFERRING, False, 0)])
