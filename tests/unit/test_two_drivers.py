"""Two drivers of one migration that waits for its slots: what one of them does counts for the other one (issue 8, point 2)."""

import asyncio
from collections.abc import AsyncIterator

import pytest

import agent.admission.places
from agent.admission.values import Direction
from agent.handshake.drive.driver import Driver
from agent.migration.takeover import waiting_taken_over
from agent.runtime.errors import DroverError, Reason
from agent.runtime.events import Bus
from drover.agent.v1 import admission_pb2, handshake_pb2
from drover.agent.v1 import migration_pb2 as pb
from tests.unit.asking import ID, REF, destination_record, fails, finished, make_plan, reserve, until
from tests.unit.clocks import QUICK
from tests.unit.fake_directory import Driving
from tests.unit.fake_hypervisor import UUID
from tests.unit.test_entry_first import waiting
from tests.unit.test_slots_of_records import OUTGOING, acquire
from tests.unit.two_agents import Line, Pair

CANCELLED = admission_pb2.ReleaseSlotRequest(migration_id=ID, direction=OUTGOING, cancelled=True)


@pytest.fixture
async def two(driving: Driving) -> AsyncIterator[tuple[Driving, Driving]]:
    """A coordinator whose migration waits, and the source's agent, which has taken it over."""
    await waiting(driving)
    other = Driving(driving.pair)
    place = await driving.pair.source.journal.admission.place(Direction.OUTGOING, ID)
    assert place is not None
    other.migrations.take_over(waiting_taken_over(place, "h1"))
    await until(lambda: other.migrations.collection.get(ID).driver is not None)
    yield driving, other
    await other.close()


async def test_8_2_a_cancel_at_one_driver_ends_the_other_one_too_wherever_it_waits(two: tuple[Driving, Driving]) -> None:
    driving, other = two
    await driving.migrations.cancel(ID)
    assert (await driving.ended(ID)).state == pb.MIGRATION_STATE_CANCELLED
    ended = await other.ended(ID)
    assert (ended.state, ended.failure.reason, ended.runs_on) == (pb.MIGRATION_STATE_CANCELLED, Reason.CANCELLED, "h1")
    assert [len(queue.book.claims()) for queue in driving.pair.source.engine.desk.queues.values()] == [0, 0]


async def test_8_2_a_driver_that_comes_back_after_a_cancel_ends_its_migration(driving: Driving) -> None:
    await waiting(driving)
    other = Driving(driving.pair)
    other.log.rows = dict(driving.log.rows)
    await driving.migrations.cancel(ID)
    await driving.ended(ID)
    await until(lambda: driving.pair.source.engine.desk.queues[Direction.OUTGOING].places.cancelled_ago(ID) is not None)
    await driving.pair.source.restart()
    driving.pair.destination.room(1)
    await other.migrations.recover()
    ended = await other.ended(ID)
    assert (ended.state, ended.failure.reason) == (pb.MIGRATION_STATE_CANCELLED, Reason.CANCELLED)
    assert "was cancelled on request" in ended.failure.message
    assert (driving.pair.states, driving.pair.runs_on) == (("", ""), ["h1"])
    await other.close()


async def test_8_2_a_cancelled_migration_gets_no_slot_again_also_after_restarts_and_for_a_time_only(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = pair.source
    await host.engine.acquire_slot(acquire(ID, OUTGOING))
    await host.engine.release_slot(CANCELLED)
    for _ in range(2):
        for request in (acquire(ID, OUTGOING), acquire(ID, OUTGOING, wait=5), acquire(ID, OUTGOING, place_only=True)):
            await fails(host.engine.acquire_slot(request), Reason.CANCELLED)
        await host.restart()
    assert (await host.engine.acquire_slot(acquire("other", OUTGOING))).slot.epoch
    monkeypatch.setattr(agent.admission.places, "CANCELLED_SECONDS", 0.0)
    assert (await host.engine.acquire_slot(acquire(ID, OUTGOING))).slot.epoch


async def test_8_2_why_a_driver_gave_a_migration_up_is_told_to_the_others_unless_a_user_has_cancelled_it(pair: Pair) -> None:
    host, given_up = pair.source, admission_pb2.ReleaseSlotRequest()
    given_up.CopyFrom(CANCELLED)
    for given_up.given_up_for in ("h2 is full", "another reason"):
        await host.engine.release_slot(given_up)
        error = await fails(host.engine.acquire_slot(acquire(ID, OUTGOING)), Reason.GIVEN_UP)
        assert "given up by its driver" in error.message
        assert "h2 is full" in error.message
        await host.restart()
    await host.engine.release_slot(CANCELLED)
    await host.engine.release_slot(given_up)
    await fails(host.engine.acquire_slot(acquire(ID, OUTGOING)), Reason.CANCELLED)


async def test_8_2_the_record_of_an_attempt_says_why_its_driver_gave_it_up(pair: Pair) -> None:
    driver = pair.driver()
    await driver.reserve()
    pair.to_destination.refuse["prepare"] = [DroverError(Reason.INCOMPATIBLE_GUEST, "h2 lacks a bridge")]
    await finished(driver)
    failure = (await pair.source.engine.get_record(handshake_pb2.GetRecordRequest(ref=REF))).record.failure
    assert failure.reason == Reason.GIVEN_UP
    assert "h2 lacks a bridge" in failure.message


async def test_8_2_the_oldest_cancelled_migrations_are_forgotten_with_their_rows(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent.admission.places, "MOST_CANCELLED", 2)
    queue = pair.source.engine.desk.queues[Direction.OUTGOING]
    for name in ("first", "second", "third"):
        await queue.places.cancel(name)
    assert (queue.places.cancelled_ago("first"), len(await pair.source.journal.admission.places())) == (None, 2)


LATER = handshake_pb2.AttemptRef(migration_id=ID, attempt=3)


async def test_8_2_a_later_attempt_that_another_driver_has_reserved_is_joined(driving: Driving) -> None:
    await waiting(driving)
    driving.pair.to_destination.cut = True
    driving.pair.destination.room(2)
    await driving.pair.destination.engine.reserve_slot(reserve(ref=LATER))
    driving.pair.to_destination.cut = False
    ended = await driving.ended(ID)
    assert (ended.state, ended.attempt, ended.runs_on) == (pb.MIGRATION_STATE_SUCCEEDED, 3, "h2")


async def test_8_2_a_later_attempt_that_another_driver_has_begun_is_followed(driving: Driving) -> None:
    await waiting(driving)
    lines = Line(driving.pair.source), Line(driving.pair.destination)
    other = Driver(LATER, *lines, make_plan(), lambda: None, Bus(), QUICK)
    driving.pair.wire.all_sent.clear()
    driving.pair.to_destination.cut = driving.pair.to_source.cut = True
    driving.pair.destination.room(2)
    await other.reserve()
    running = asyncio.ensure_future(finished(other))
    await until(lambda: driving.pair.source.journalled == "performing")
    driving.pair.to_destination.cut = driving.pair.to_source.cut = False
    followed = await driving.reaches(ID, pb.MIGRATION_STATE_ACTIVE)
    assert followed.attempt == 3
    driving.pair.wire.all_sent.set()
    ended = await driving.ended(ID)
    assert (ended.state, ended.attempt, ended.runs_on) == (pb.MIGRATION_STATE_SUCCEEDED, 3, "h2")
    await running
    driving.pair.moved()


@pytest.mark.parametrize(
    ("ref", "uuid", "source"), [(REF, UUID, "h1"), (LATER, "another", "h1"), (LATER, UUID, "h9")], ids=["ours", "guest", "source"]
)
async def test_8_2_no_record_of_something_else_is_taken_for_a_later_attempt(
    pair: Pair, ref: handshake_pb2.AttemptRef, uuid: str, source: str
) -> None:
    driver = pair.driver()
    record = destination_record(ref=ref, domain_uuid=uuid, peer_host=source)
    pair.to_destination.answer["get_record"] = lambda _: handshake_pb2.GetRecordResponse(record=record)
    await pair.destination.engine.reserve_slot(reserve())
    assert await driver.later("destination") is None


@pytest.mark.parametrize(("peer", "found"), [("h2", False), ("h3", True)], ids=["ours", "elsewhere"])
async def test_8_2_the_same_attempt_to_another_host_is_found_where_it_is_asked_for(pair: Pair, peer: str, found: bool) -> None:
    driver = pair.driver()
    record = handshake_pb2.Record(ref=REF, host="h1", domain_uuid=UUID, peer_host=peer)
    pair.to_source.answer["get_record"] = lambda _: handshake_pb2.GetRecordResponse(record=record)
    await pair.source.engine.abort(handshake_pb2.AbortRequest(ref=REF))
    assert await driver.later("source") is None
    assert (await driver.later("source", elsewhere=True) is not None) is found
