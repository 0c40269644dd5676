"""agent.handshake.host.slots and agent.admission.queue: what records hold is what is counted, whatever dies."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from agent.admission.values import Direction
from agent.handshake.host.records import Role, decode, encode, state_from_proto
from agent.runtime.errors import Reason
from agent.runtime.wire import duration
from drover.agent.v1 import admission_pb2 as pb
from drover.agent.v1 import handshake_pb2, host_pb2, migration_pb2
from tests.unit.asking import ID, REF, begin, fails, finish, finished, make_plan, perform, prepare, record, reserve, until
from tests.unit.fake_hypervisor import UUID
from tests.unit.two_agents import Agent, Pair, pair_of_agents

INCOMING, OUTGOING = pb.SLOT_DIRECTION_INCOMING, pb.SLOT_DIRECTION_OUTGOING
PREPARED, TRANSFERRING = pb.SLOT_KIND_PREPARED, pb.SLOT_KIND_TRANSFERRING


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    async with pair_of_agents(slots=1) as pair:
        yield pair


@pytest.fixture
async def brief() -> AsyncIterator[Pair]:
    async with pair_of_agents(slots=1, lease=0.3, takeover=0.1) as pair:
        yield pair


def acquire(migration_id: str = ID, direction: pb.SlotDirection.ValueType = INCOMING, wait: float = 0, **fields: Any) -> Any:
    request = pb.AcquireSlotRequest(migration_id=migration_id, direction=direction, peer_host="h1", **fields)
    if wait:
        request.wait.CopyFrom(duration(wait))
    return request


async def listed(agent: Agent) -> list[tuple[str, int, bool, int]]:
    answer = await agent.engine.list_slots(pb.ListSlotsRequest())
    slots = sorted(answer.slots, key=lambda slot: (slot.direction, slot.waiting, slot.position))
    return [(slot.migration_id, slot.kind, slot.waiting, slot.position) for slot in slots]


def waits(**fields: Any) -> migration_pb2.Migration:
    """Return the migration as a driver has stored it that waits for its slots."""
    values = {"migration_id": ID, "domain_uuid": UUID, "attempt": 1, "state": migration_pb2.MIGRATION_STATE_PENDING}
    values |= {"spec": migration_pb2.MigrationSpec(domain="web1"), "slot_wait": duration(60)}
    return migration_pb2.Migration(**{**values, **fields})


async def set_limits(agent: Agent, **limits: int) -> None:
    request = host_pb2.UpdateHostRequest(settings=host_pb2.HostSettings(**limits))  # type: ignore[arg-type]
    request.update_mask.paths[:] = list(limits)
    await agent.engine.desk.update(request)


def waiting(agent: Agent, migration_id: str, direction: Direction = Direction.INCOMING) -> bool:
    claim = agent.engine.desk.queues[direction].book.find(migration_id)
    return claim is not None and claim.calls > 0


# --- taking and giving back -------------------------------------------------------------------------------------------


async def test_8_1_a_slot_that_was_acquired_is_the_one_of_the_record(pair: Pair) -> None:
    agent = pair.destination
    slot = (await agent.engine.acquire_slot(acquire(kind=PREPARED))).slot
    assert (slot.kind, slot.cost, slot.HasField("expire_time")) == (TRANSFERRING, 1, True)
    reserved = await agent.engine.reserve_slot(reserve())
    assert (reserved.record.slot.epoch, reserved.record.slot.transferring) == (slot.epoch, True)
    assert await listed(agent) == [(ID, TRANSFERRING, False, 0)]
    assert not (await agent.engine.list_slots(pb.ListSlotsRequest())).slots[0].HasField("expire_time")


async def test_8_1_both_hosts_show_the_slots_that_their_records_hold(pair: Pair) -> None:
    reserved = (await pair.destination.engine.reserve_slot(reserve())).record.slot
    begun = (await pair.alone().engine.begin(begin())).record.slot
    assert (reserved.cost, begun.cost, reserved.transferring, begun.transferring) == (1, 1, True, True)
    assert (await listed(pair.source))[0][:2] == (ID, TRANSFERRING)


async def test_8_1_a_source_without_room_lets_no_guest_leave(pair: Pair) -> None:
    agent = pair.alone()
    await agent.engine.acquire_slot(acquire("other", OUTGOING))
    busy = await fails(agent.engine.begin(begin()), Reason.BUSY)
    assert (busy.metadata["limit"], busy.metadata["holders"], busy.metadata["position"]) == ("outgoing_limit", "other", "1")
    assert busy.retry_after is not None
    assert "begin" not in agent.effects


async def test_8_1_a_begin_that_is_refused_leaves_no_slot_behind(pair: Pair) -> None:
    agent = pair.alone()
    agent.journal.fails = [OSError("no space")]
    with pytest.raises(OSError, match="no space"):
        await agent.engine.begin(begin())
    assert await listed(agent) == []


async def test_8_1_the_sources_slot_is_free_once_all_is_sent_and_the_destinations_at_the_end(pair: Pair) -> None:
    driver = pair.driver()
    await driver.reserve()
    running = asyncio.ensure_future(finished(driver))
    await pair.in_doubt(driver)
    assert (await listed(pair.source), (await listed(pair.destination))[0][:2]) == ([], (ID, TRANSFERRING))
    pair.to_destination.cut = False
    pair.wire.starts.set()
    await running
    pair.moved()
    assert await listed(pair.destination) == []


async def test_8_1_what_is_not_used_expires_and_the_next_one_gets_it(brief: Pair) -> None:
    agent = brief.destination
    first = (await agent.engine.acquire_slot(acquire())).slot
    second = (await agent.engine.acquire_slot(acquire("next", wait=5))).slot
    assert second.epoch > first.epoch
    assert await listed(agent) == [("next", TRANSFERRING, False, 0)]


async def test_8_2_whoever_waits_gets_what_is_given_back_and_its_row_stays_until_memory_flows(pair: Pair) -> None:
    agent = pair.destination
    await agent.engine.acquire_slot(acquire("holds"))
    waits = asyncio.ensure_future(agent.engine.acquire_slot(acquire(wait=5)))
    await until(lambda: waiting(agent, ID))
    assert await listed(agent) == [("holds", TRANSFERRING, False, 0), (ID, TRANSFERRING, True, 1)]
    await agent.engine.release_slot(pb.ReleaseSlotRequest(migration_id="holds", direction=INCOMING))
    assert (await waits).slot.kind == TRANSFERRING
    assert len(await agent.journal.admission.places()) == 1
    await agent.engine.reserve_slot(reserve())
    assert len(await agent.journal.admission.places()) == 1, "its attempt may be given up"
    queue = agent.engine.desk.queues[Direction.INCOMING]
    queue.flows(ID)
    await queue.places.close()
    assert await agent.journal.admission.places() == []


async def test_8_2_a_wait_that_is_over_says_what_it_waits_for(pair: Pair) -> None:
    agent = pair.destination
    await agent.engine.acquire_slot(acquire("holds"))
    wait = (await agent.engine.acquire_slot(acquire(wait=0.01))).wait
    assert (wait.reason, wait.host, wait.limit) == (migration_pb2.WAIT_REASON_SLOT, "h2", "incoming_limit")
    assert (wait.limit_value, wait.in_use, list(wait.holders), wait.position, wait.queue_length) == (1, 1, ["holds"], 1, 1)
    assert wait.estimate_high.ToNanoseconds() > wait.estimate_low.ToNanoseconds() > 0


async def test_8_2_a_waiter_whose_call_is_cancelled_is_passed_over_at_once(pair: Pair) -> None:
    agent = pair.destination
    await agent.engine.acquire_slot(acquire("holds"))
    dead = asyncio.ensure_future(agent.engine.acquire_slot(acquire("dead", wait=30)))
    await until(lambda: waiting(agent, "dead"))
    alive = asyncio.ensure_future(agent.engine.acquire_slot(acquire("alive", wait=30)))
    await until(lambda: waiting(agent, "alive"))
    dead.cancel()
    await asyncio.wait({dead})
    await agent.engine.release_slot(pb.ReleaseSlotRequest(migration_id="holds", direction=INCOMING))
    assert (await asyncio.wait_for(alive, 1)).slot.epoch
    assert ("dead", TRANSFERRING, True, 1) in await listed(agent)


async def test_8_2_a_place_alone_is_kept_and_never_served(pair: Pair) -> None:
    agent = pair.destination
    answer = await agent.engine.acquire_slot(acquire(place_only=True, driver="one"))
    assert (answer.HasField("slot"), answer.wait.position) == (False, 1)
    again = await agent.engine.acquire_slot(acquire(wait=1, driver="two"))
    assert (again.slot.migration_id, again.other_driver) == (ID, "one")


# --- restarts ---------------------------------------------------------------------------------------------------------


async def test_8_1_a_restart_counts_the_records_again_and_keeps_the_queue_in_its_order(pair: Pair) -> None:
    agent = pair.destination
    await agent.engine.reserve_slot(reserve())
    for name in ("third", "first", "second"):
        await agent.engine.acquire_slot(acquire(name, wait=0.01, importance=3 if name == "first" else 2))
    order = await listed(agent)
    assert [name for name, *_ in order] == [ID, "first", "third", "second"]
    for _ in range(3):
        await agent.restart()
        assert await listed(agent) == order
    await fails(agent.engine.acquire_slot(acquire("late")), Reason.BUSY)
    await agent.engine.abandon(handshake_pb2.AbandonRequest(ref=REF))
    asks = [acquire(name, wait=9, importance=importance) for name, importance in (("second", 2), ("first", 3))]
    waits = [asyncio.ensure_future(agent.engine.acquire_slot(ask)) for ask in asks]
    done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    assert [task.result().slot.migration_id for task in done] == ["first"]
    waits[0].cancel()


async def test_8_2_the_rows_of_an_older_agent_are_places_and_cancelled_migrations(pair: Pair) -> None:
    rows, host = pair.source.journal.admission, pair.source
    row = {"direction": "outgoing", "migration_id": "waits", "place": 7, "kind": 1, "peer": "h2", "importance": 3, "memory": 9}
    row |= {"since": time.time(), "driver": "co", "pending": b"pending", "peer_agent": "10.91.0.2:7400", "cancelled": 0.0}
    mark = row | {"migration_id": "cancelled", "place": 0, "driver": "", "pending": b"", "peer_agent": "", "cancelled": time.time()}
    await rows.put_place("outgoing", "waits", msgspec.msgpack.encode(row))
    await rows.put_place("cancelled", "cancelled", msgspec.msgpack.encode(mark))
    await host.restart()
    assert await listed(host) == [("waits", PREPARED, True, 1)]
    await fails(host.engine.acquire_slot(acquire("cancelled", OUTGOING)), Reason.CANCELLED)
    place = await rows.place("outgoing", "waits")
    assert place is not None
    assert msgspec.to_builtins(place, builtin_types=(bytes,)) == row | {"given_up_for": ""}


async def test_8_1_a_record_of_an_older_agent_holds_a_slot_that_allows_everything(pair: Pair) -> None:
    agent = pair.destination
    old = msgspec.msgpack.decode(encode(record(Role.DESTINATION, "reserved", epoch=7)))
    del old["transferring"], old["cost"]
    agent.keep(decode(msgspec.msgpack.encode(old)))
    await agent.restart()
    assert await listed(agent) == [(ID, TRANSFERRING, False, 0)]
    await fails(agent.engine.acquire_slot(acquire("other")), Reason.BUSY)


# --- calls without a driver -------------------------------------------------------------------------------------------


async def test_8_2_a_begin_that_finds_no_slot_leaves_the_place_as_its_driver_has_asked_for_it(pair: Pair) -> None:
    agent = pair.alone()
    fields = {"pending": waits(), "peer_agent": "10.91.0.2:7400", "importance": 3, "driver": "co"}
    await agent.engine.acquire_slot(acquire("holds", OUTGOING))
    await agent.engine.acquire_slot(acquire(ID, OUTGOING, wait=0.01, **fields))
    before = await agent.journal.admission.place(Direction.OUTGOING, ID)
    await fails(agent.engine.begin(begin()), Reason.BUSY)
    claim = agent.engine.desk.queues[Direction.OUTGOING].book.find(ID)
    assert claim is not None
    assert (claim.ask.importance, claim.ask.driver) == (3, "co")
    assert await agent.journal.admission.place(Direction.OUTGOING, ID) == before
    assert before is not None
    assert migration_pb2.Migration.FromString(before.pending) == waits()


async def test_8_2_a_begin_takes_the_slot_that_is_free_for_the_one_that_waits(pair: Pair) -> None:
    agent = pair.alone()
    await agent.engine.acquire_slot(acquire("holds", OUTGOING))
    await agent.engine.acquire_slot(acquire(ID, OUTGOING, wait=0.01))
    await agent.engine.release_slot(pb.ReleaseSlotRequest(migration_id="holds", direction=OUTGOING))
    assert (await agent.engine.begin(begin())).record.slot.transferring
    assert await listed(agent) == [(ID, TRANSFERRING, False, 0)]


async def test_8_1_whoever_watches_the_host_hears_that_a_slot_has_become_prepared(pair: Pair) -> None:
    agent = pair.destination
    await agent.engine.reserve_slot(reserve())
    changed = agent.engine.desk.changed.next
    await agent.engine.release_slot(pb.ReleaseSlotRequest(migration_id=ID, direction=INCOMING, keep_place=True))
    assert (agent.in_use, changed.is_set()) == (0, True)


# --- the kinds --------------------------------------------------------------------------------------------------------


async def parked(pair: Pair) -> handshake_pb2.PrepareResponse:
    """Prepare the migration at both hosts with a prepared slot at the destination, whose transferring one is taken."""
    await set_limits(pair.destination, prepared_limit=1)
    await pair.destination.engine.acquire_slot(acquire("holds"))
    slot = (await pair.destination.engine.acquire_slot(acquire(kind=PREPARED))).slot
    assert slot.kind == PREPARED
    reserved = await pair.destination.engine.reserve_slot(reserve())
    assert (reserved.record.slot.epoch, reserved.record.slot.transferring) == (slot.epoch, False)
    await pair.source.engine.begin(begin(probe=reserved.probe))
    prepared: handshake_pb2.PrepareResponse = await pair.destination.engine.prepare(prepare(epoch=slot.epoch))
    return prepared


async def test_8_1_no_memory_flows_and_nothing_is_armed_with_a_prepared_slot(pair: Pair) -> None:
    prepared = await parked(pair)
    performs = perform(uri=prepared.uri_out, cookie_in=prepared.cookie_out, destination_record=prepared.record)
    refused = await fails(pair.source.engine.perform(performs), Reason.BUSY)
    assert (refused.metadata["host"], refused.metadata["limit"]) == ("h2", "incoming_limit")
    assert (await fails(pair.destination.engine.finish(finish()), Reason.BUSY)).metadata["holders"] == "holds"
    assert (pair.states, "perform" in pair.source.effects) == (("begun", "prepared"), False)
    await pair.destination.restart()
    assert (await pair.destination.record()).slot.transferring is False


async def test_8_1_a_prepared_slot_becomes_a_transferring_one_in_its_turn_durably(pair: Pair) -> None:
    prepared = await parked(pair)
    asks = asyncio.ensure_future(pair.destination.engine.acquire_slot(acquire(kind=TRANSFERRING, wait=5)))
    await until(lambda: pair.destination.engine.desk.queues[Direction.INCOMING].book.queue_length == 1)
    await pair.destination.engine.release_slot(pb.ReleaseSlotRequest(migration_id="holds", direction=INCOMING))
    slot = (await asks).slot
    assert (slot.kind, slot.epoch) == (TRANSFERRING, prepared.record.slot.epoch)
    assert pair.destination.durable.transferring
    plan = make_plan()
    driver = pair.driver(plan)
    await driver.resume()
    assert state_from_proto(await pair.destination.record()) == "prepared"


async def test_8_1_the_slot_of_a_record_becomes_prepared_and_transfers_again_where_there_is_room(pair: Pair) -> None:
    agent = pair.destination
    await agent.engine.reserve_slot(reserve())
    release = pb.ReleaseSlotRequest(migration_id=ID, direction=INCOMING, keep_place=True)
    await agent.engine.release_slot(release)
    assert (agent.durable.transferring, agent.in_use) == (False, 0)
    await agent.engine.acquire_slot(acquire("other"))
    await fails(agent.engine.acquire_slot(acquire(kind=TRANSFERRING)), Reason.BUSY)
    await agent.engine.release_slot(pb.ReleaseSlotRequest(migration_id="other", direction=INCOMING))
    await agent.engine.acquire_slot(acquire(kind=TRANSFERRING))
    assert (agent.durable.transferring, agent.in_use) == (True, 1)


async def test_8_1_a_slot_whose_transfer_runs_cannot_be_given_back(pair: Pair) -> None:
    agent = pair.destination
    agent.keep(record(Role.DESTINATION, "armed"))
    await agent.restart()
    await agent.engine.release_slot(pb.ReleaseSlotRequest(migration_id=ID, direction=INCOMING))
    assert agent.durable.transferring


# --- limits -----------------------------------------------------------------------------------------------------------


async def test_8_1_a_limit_of_zero_is_closed_and_ends_waits_and_places(pair: Pair) -> None:
    agent = pair.destination
    await agent.engine.acquire_slot(acquire("holds"))
    waits = asyncio.ensure_future(agent.engine.acquire_slot(acquire(wait=30)))
    await until(lambda: waiting(agent, ID))
    await set_limits(agent, incoming_limit=0)
    closed = await fails(waits, Reason.HOST_CLOSED)
    assert (closed.retry_after, closed.metadata["limit"]) == (None, "incoming_limit")
    await fails(agent.engine.reserve_slot(reserve()), Reason.HOST_CLOSED)
    assert await listed(agent) == [("holds", TRANSFERRING, False, 0)]
    await agent.restart()
    await fails(agent.engine.acquire_slot(acquire()), Reason.HOST_CLOSED)


async def test_8_1_a_raised_limit_serves_who_waits_at_once(pair: Pair) -> None:
    agent = pair.destination
    await agent.engine.acquire_slot(acquire("holds"))
    waits = asyncio.ensure_future(agent.engine.acquire_slot(acquire(wait=30)))
    await until(lambda: waiting(agent, ID))
    await set_limits(agent, incoming_limit=2)
    assert (await asyncio.wait_for(waits, 1)).slot.epoch


@pytest.mark.parametrize(
    ("paths", "field"), [(["incoming_limit"], "settings.incoming_limit"), (["name"], "update_mask"), ([], "update_mask")]
)
async def test_8_1_a_bad_setting_changes_nothing(pair: Pair, paths: list[str], field: str) -> None:
    agent = pair.destination
    request = host_pb2.UpdateHostRequest(settings=host_pb2.HostSettings(incoming_limit=-1, cordoned=True))
    request.update_mask.paths[:] = paths
    refused = await fails(agent.engine.desk.update(request), Reason.INVALID_FIELD)
    assert refused.metadata["field"] == field
    await agent.restart()
    assert agent.engine.desk.queues[Direction.INCOMING].book.limits.limit == 1


# --- silent drivers ---------------------------------------------------------------------------------------------------


async def test_8_2_a_migration_that_waits_at_its_source_is_told_when_its_driver_is_silent_also_after_a_restart(brief: Pair) -> None:
    agent = brief.source
    await agent.engine.acquire_slot(acquire("holds", OUTGOING))
    await agent.engine.acquire_slot(acquire(ID, OUTGOING, wait=0.01, pending=waits(), peer_agent="10.91.0.2:7400", driver="co"))
    for restarts in (False, True):
        if restarts:
            await agent.restart()
        told = await asyncio.wait_for(agent.silent.get(), 5)
        assert migration_pb2.Migration.FromString(told.pending) == waits()
        assert (told.peer_agent, told.driver) == ("10.91.0.2:7400", "co")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("migration_id", "another"),
        ("spec", None),
        ("state", migration_pb2.MIGRATION_STATE_SUCCEEDED),
        ("attempt", 0),
        ("attempt", 2**31 - 1),
        ("domain_uuid", ""),
        ("slot_wait", duration(0)),
    ],
)
async def test_8_2_nothing_is_kept_of_a_migration_that_is_not_the_one_that_waits(pair: Pair, field: str, value: Any) -> None:
    request = acquire(ID, OUTGOING, wait=1, pending=waits(**{field: value}), peer_agent="10.91.0.2:7400")
    refused = await fails(pair.source.engine.acquire_slot(request), Reason.INVALID_FIELD)
    assert refused.metadata["field"] == f"pending.{field}"
    assert (await listed(pair.source), await pair.source.journal.admission.places()) == ([], [])


@pytest.mark.parametrize("address", ["", "nonsense"])
async def test_8_2_nothing_is_kept_of_a_migration_whose_destination_cannot_be_asked(pair: Pair, address: str) -> None:
    request = acquire(ID, OUTGOING, wait=1, pending=waits(), peer_agent=address)
    refused = await fails(pair.source.engine.acquire_slot(request), Reason.INVALID_FIELD)
    assert refused.metadata["field"] == "peer_agent"
    assert (await listed(pair.source), await pair.source.journal.admission.places()) == ([], [])


@pytest.mark.parametrize("place_only", [True, False])
async def test_8_2_nothing_is_kept_of_a_migration_whose_guest_is_not_here(pair: Pair, place_only: bool) -> None:
    fields = {"pending": waits(domain_uuid="another"), "peer_agent": "10.91.0.2:7400", "place_only": place_only}
    await fails(pair.source.engine.acquire_slot(acquire(ID, OUTGOING, wait=1, **fields)), Reason.DOMAIN_NOT_FOUND)
    assert (await listed(pair.source), await pair.source.journal.admission.places()) == ([], [])
