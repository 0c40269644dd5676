"""The end of a migration that may wait says what the hosts' records show, also where another driver goes on with it (issue 8)."""

from dataclasses import replace
from typing import Any

import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from agent.admission.book import Book
from agent.admission.values import Ask, Direction
from agent.handshake.drive.driver import Driver
from agent.hypervisor.base import DomainState
from agent.migration.whereabouts import Place, whereabouts
from agent.runtime.errors import DroverError, Reason
from agent.runtime.events import Bus
from agent.runtime.wire import duration
from drover.agent.v1 import handshake_pb2, host_pb2
from drover.agent.v1 import migration_pb2 as pb
from tests.unit.asking import ID, REF, begin, fails, finished, make_plan, reserve, statement, until
from tests.unit.clocks import QUICK
from tests.unit.fake_directory import Driving
from tests.unit.test_entry_first import waiting
from tests.unit.test_migrations import SPEC
from tests.unit.test_slots_of_records import OUTGOING, acquire
from tests.unit.two_agents import Line, Pair

LATER = handshake_pb2.AttemptRef(migration_id=ID, attempt=2)


async def waits_again(driving: Driving) -> None:
    """A coordinator whose migration waits goes away, and the lines to both hosts are down when it returns."""
    await waiting(driving)
    driving.pair.to_source.cut = driving.pair.to_destination.cut = True
    await driving.restart()


def other_driver(pair: Pair, ref: handshake_pb2.AttemptRef = REF) -> Driver:
    """The source's agent as the driver of an attempt."""
    return Driver(ref, Line(pair.source), Line(pair.destination), make_plan(), lambda: None, Bus(), QUICK)


async def moved_by_another(pair: Pair, ref: handshake_pb2.AttemptRef = REF) -> None:
    pair.destination.room(2)
    other = other_driver(pair, ref)
    await other.reserve()
    await finished(other)
    pair.moved()


def shown(driving: Driving) -> pb.Migration:
    return driving.migrations.collection.get(ID).migration


@pytest.fixture
async def away(driving: Driving) -> Driving:
    await waiting(driving)
    await driving.migrations.close()
    return driving


async def test_8_2_a_guest_that_was_moved_meanwhile_is_found_although_its_destination_is_away(away: Driving) -> None:
    await moved_by_another(away.pair)
    away.pair.to_destination.cut = True
    await away.restart()
    ended = await away.ended(ID)
    assert (ended.state, ended.runs_on) == (pb.MIGRATION_STATE_SUCCEEDED, "h2")


async def test_8_2_a_guest_that_has_left_is_asked_for_until_its_destination_answers(away: Driving) -> None:
    """Its source has forgotten the record."""
    pair = away.pair
    await moved_by_another(pair)
    line, unknown = pair.to_source, DroverError(Reason.RECORD_NOT_FOUND, "h1 has no record of it")
    line.refuse["get_record"] = [unknown] * 1000
    pair.to_destination.cut = True
    await away.restart()
    await until(lambda: line.count["get_record"] >= 3)
    await until(lambda: list(shown(away).silent_hosts) == ["h2"])
    found = shown(away)
    assert (found.state, found.wait_reason) == (pb.MIGRATION_STATE_PENDING, pb.WAIT_REASON_HOST_UNREACHABLE)
    line.refuse["get_record"].clear()
    pair.to_destination.cut = False
    ended = await away.ended(ID)
    assert (ended.state, ended.runs_on) == (pb.MIGRATION_STATE_SUCCEEDED, "h2")


async def test_8_2_a_later_attempt_that_moved_the_guest_is_followed_by_a_driver_that_had_its_slots(away: Driving) -> None:
    """It has saved that it took them; they have expired since."""
    stored = pb.Migration.FromString(away.log.rows[ID][0])
    stored.slot_duration.CopyFrom(duration(1.0))
    away.log.rows[ID] = stored.SerializeToString(), False
    await moved_by_another(away.pair, LATER)
    await away.restart()
    ended = await away.ended(ID)
    assert (ended.state, ended.attempt, ended.runs_on) == (pb.MIGRATION_STATE_SUCCEEDED, 2, "h2")


async def test_8_2_an_earlier_attempt_with_which_the_sources_agent_went_on_is_followed(away: Driving) -> None:
    """The driver died before the source had heard of its newest attempt, such as one to another host."""
    stored = pb.Migration.FromString(away.log.rows[ID][0])
    stored.attempt = 2
    away.log.rows[ID] = stored.SerializeToString(), False
    await moved_by_another(away.pair)
    await away.restart()
    ended = await away.ended(ID)
    assert (ended.state, ended.attempt, ended.runs_on) == (pb.MIGRATION_STATE_SUCCEEDED, 1, "h2")


async def test_8_2_an_earlier_attempt_that_was_given_up_is_not_followed(pair: Pair) -> None:
    reserved = await pair.destination.engine.reserve_slot(reserve())
    await pair.source.engine.begin(begin(probe=reserved.probe))
    later = other_driver(pair, LATER)
    assert (await later.newest("source")) is not None
    await pair.source.engine.abort(handshake_pb2.AbortRequest(ref=REF))
    await pair.source.reaches("kept")
    assert (await later.newest("source")) is None


async def test_8_2_a_later_attempt_that_begins_as_the_wait_goes_on_is_followed_too(driving: Driving) -> None:
    """The lease of its own attempt has ended while it was away; then the other driver is the first to use the slot."""
    pair = driving.pair
    await waiting(driving)
    await driving.migrations.close()
    stored = pb.Migration.FromString(driving.log.rows[ID][0])
    stored.slot_duration.CopyFrom(duration(1.0))
    driving.log.rows[ID] = stored.SerializeToString(), False
    pair.destination.room(2)
    expired = await pair.destination.engine.reserve_slot(reserve())
    assert expired.record.ref.attempt == 1
    await pair.destination.engine.abandon(handshake_pb2.AbandonRequest(ref=REF))
    record = await pair.destination.record()

    def as_expired(response: handshake_pb2.GetRecordResponse) -> handshake_pb2.GetRecordResponse:
        if response.record.ref.attempt == 1:
            response.record.failure.reason = Reason.LEASE_EXPIRED
        return response

    assert record.state == handshake_pb2.RECORD_STATE_GONE
    pair.to_destination.answer["get_record"] = as_expired
    pair.destination.room(0)
    await driving.restart()
    await until(lambda: shown(driving).attempt == 2 and "are taken" in shown(driving).waiting_for)
    pair.to_source.cut = pair.to_destination.cut = True
    await moved_by_another(pair, LATER)
    pair.to_source.cut = pair.to_destination.cut = False
    ended = await driving.ended(ID)
    assert (ended.state, ended.attempt, ended.runs_on) == (pb.MIGRATION_STATE_SUCCEEDED, 2, "h2")


async def test_8_2_a_driver_that_stood_still_until_its_wait_was_over_says_where_the_guest_is(driving: Driving) -> None:
    """Nothing has told it of the other driver, and both hosts have answered all its calls."""
    await waiting(driving)
    for line in (driving.pair.to_source, driving.pair.to_destination):
        line.hang = {"acquire_slot", "reserve_slot"}
    await moved_by_another(driving.pair)
    now = pb.MigrationSettings(slot_wait=duration(0.001))
    await driving.migrations.update(ID, now, FieldMask(paths=["slot_wait"]))
    ended = await driving.ended(ID)
    assert (ended.state, ended.runs_on) == (pb.MIGRATION_STATE_SUCCEEDED, "h2"), ended.failure.message


async def test_8_2_a_cancel_waits_for_the_source_whose_agent_may_go_on_with_the_migration(driving: Driving) -> None:
    await waits_again(driving)
    await driving.migrations.cancel(ID)
    await until(lambda: list(shown(driving).silent_hosts) == ["h1"])
    assert shown(driving).state == pb.MIGRATION_STATE_CANCELLING
    driving.pair.to_source.cut = False
    ended = await driving.ended(ID)
    assert (ended.state, ended.failure.reason, ended.runs_on) == (pb.MIGRATION_STATE_CANCELLED, Reason.CANCELLED, "h1")
    await fails(driving.pair.source.engine.acquire_slot(acquire(ID, OUTGOING)), Reason.CANCELLED)


async def test_8_2_a_cancel_that_comes_too_late_shows_where_the_guest_is(driving: Driving) -> None:
    await waits_again(driving)
    await driving.migrations.cancel(ID)
    await moved_by_another(driving.pair)
    driving.pair.to_source.cut = driving.pair.to_destination.cut = False
    ended = await driving.ended(ID)
    assert (ended.state, ended.runs_on) == (pb.MIGRATION_STATE_SUCCEEDED, "h2")


async def test_8_2_a_cancel_ends_without_a_source_that_is_stated_to_be_dead(driving: Driving) -> None:
    await waits_again(driving)
    await driving.migrations.cancel(ID)
    await until(lambda: list(shown(driving).silent_hosts) == ["h1"])
    driving.pair.to_destination.cut = False
    await driving.migrations.resolve(ID, statement("h1"))
    ended = await driving.ended(ID)
    assert (ended.state, ended.runs_on) == (pb.MIGRATION_STATE_CANCELLED, "")


async def test_8_2_no_driver_goes_on_after_a_migration_has_failed(driving: Driving) -> None:
    """Another driver holds its slots and has not begun."""
    pair = driving.pair
    await waiting(driving)
    await driving.migrations.close()
    pair.destination.room(2)
    other = other_driver(pair)
    await other.slots.take("source", acquire(ID, OUTGOING).kind)
    await other.reserve()
    driving.directory.fails = [DroverError(Reason.OPTION_UNSUPPORTED, "h2 cannot do that")]
    await driving.restart()
    ended = await driving.ended(ID)
    assert (ended.state, ended.failure.reason, ended.runs_on) == (pb.MIGRATION_STATE_FAILED, Reason.OPTION_UNSUPPORTED, "h1")
    await finished(other)
    assert other.view.failure is not None
    assert (other.view.failure.reason, "h2 cannot do that" in other.view.failure.message) == (Reason.GIVEN_UP, True)
    pair.stayed()


async def test_8_2_the_id_of_another_migration_is_not_given_up_at_its_source(driving: Driving) -> None:
    await driving.pair.source.engine.acquire_slot(acquire(ID, OUTGOING))
    await driving.pair.destination.engine.reserve_slot(reserve(source_host="h9"))
    await driving.migrations.start(ID, SPEC, slot_wait=60.0)
    assert (await driving.ended(ID)).failure.reason == Reason.MIGRATION_EXISTS
    driving.pair.source.slots = 1
    assert (await driving.pair.source.engine.acquire_slot(acquire(ID, OUTGOING))).slot.epoch


async def test_8_2_a_migration_that_may_wait_waits_again_where_begin_finds_its_slot_taken(driving: Driving) -> None:
    """A slot without a record is in memory only: a restart of the source's agent loses it, and others may be first then."""
    pair, line, begun = driving.pair, driving.pair.to_source, []
    begins, queue = line.begin, pair.source.engine.desk.queues[Direction.OUTGOING]

    async def begin(request: Any) -> Any:
        vars(line).pop("begin")
        queue.release(ID, keep_place=False)
        for name in ("other1", "other2"):
            await queue.acquire(Ask(name))
        begun.append(request)
        return await begins(request)

    vars(line)["begin"] = begin
    await driving.migrations.start(ID, SPEC, slot_wait=60.0)
    await until(lambda: begun and shown(driving).attempt == 2 and shown(driving).wait.limit)
    assert shown(driving).state == pb.MIGRATION_STATE_PENDING
    for name in ("other1", "other2"):
        queue.release(name, keep_place=False)
    ended = await driving.ended(ID)
    assert (ended.state, ended.attempt) == (pb.MIGRATION_STATE_SUCCEEDED, 2)
    pair.moved()


async def test_8_2_a_begin_that_is_under_way_as_the_migration_is_given_up_makes_no_record(pair: Pair) -> None:
    slot = await pair.destination.engine.reserve_slot(reserve())
    places = pair.source.engine.desk.queues[Direction.OUTGOING].places
    reads = pair.source.hypervisor.stored

    async def given_up_meanwhile(*arguments: Any) -> Any:
        await places.cancel(ID)
        return await reads(*arguments)

    vars(pair.source.hypervisor)["stored"] = given_up_meanwhile
    await fails(pair.to_source.begin(begin(probe=slot.probe)), Reason.CANCELLED)
    assert (pair.source.journalled, pair.runs_on) == ("", ["h1"])


# --- a guest that changed while its migration waited ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("end", "place", "says"),
    [
        ("removed", Place.UNKNOWN, "has left h1 without this migration"),
        ("stopped", Place.NOWHERE, "it is shutoff (destroyed) on h1"),
    ],
)
async def test_8_2_a_cancelled_wait_says_how_the_guest_is_now(driving: Driving, end: str, place: Place, says: str) -> None:
    """What its plan saw is old by then: the guest ran on h1."""
    await waiting(driving)
    domains = driving.pair.source.hypervisor.domains
    if end == "removed":
        domains.clear()
    else:
        (uuid,) = domains
        domains[uuid] = replace(domains[uuid], state=DomainState.SHUTOFF, reason="destroyed")
    await driving.migrations.cancel(ID)
    ended = await driving.ended(ID)
    assert (ended.state, ended.failure.reason, ended.runs_on) == (pb.MIGRATION_STATE_CANCELLED, Reason.CANCELLED, "")
    assert whereabouts(ended).place is place
    assert says in whereabouts(ended).sentence


async def test_8_2_a_wait_for_a_guest_that_another_migration_moves_offers_no_resume_of_its_old_copy(driving: Driving) -> None:
    await waiting(driving)
    domains = driving.pair.source.hypervisor.domains
    (uuid,) = domains
    domains[uuid] = replace(domains[uuid], state=DomainState.PAUSED, reason="migration")
    await driving.migrations.cancel(ID)
    sentence = whereabouts(await driving.ended(ID)).sentence
    assert "another one moves it" in sentence
    assert "resume" not in sentence


async def test_8_2_a_wait_whose_source_does_not_answer_at_its_end_says_when_it_last_did(driving: Driving) -> None:
    await waiting(driving)
    driving.directory.guest_fails = DroverError(Reason.HOST_UNREACHABLE, "h1 does not answer")
    await driving.migrations.cancel(ID)
    ended = await driving.ended(ID)
    assert "ran on h1 when its hypervisor last answered" in whereabouts(ended).sentence


async def test_8_1_a_wait_for_any_host_does_not_take_one_that_was_cordoned_meanwhile(driving: Driving) -> None:
    pair = driving.pair
    await waits_at_a_cordoned_host(driving)
    await until(lambda: shown(driving).wait_reason == pb.WAIT_REASON_ANY_HOST and "h2 was cordoned" in shown(driving).waiting_for)
    assert "h2 was cordoned by root@admin1" in shown(driving).waiting_for
    assert shown(driving).state == pb.MIGRATION_STATE_PENDING
    assert not pair.to_destination.count["reserve_slot"]
    assert not pair.destination.engine.desk.queues[Direction.INCOMING].book.slots()
    await cordon(driving, cordoned=False)
    ended = await driving.ended(ID)
    assert (ended.state, ended.runs_on) == (pb.MIGRATION_STATE_SUCCEEDED, "h2")


async def waits_at_a_cordoned_host(driving: Driving) -> None:
    """A migration to any host waits for h2, which is cordoned then, and has room."""
    driving.pair.destination.room(0)
    await driving.migrations.start(ID, pb.MigrationSpec(domain=SPEC.domain), 60.0)
    await until(lambda: "are taken" in shown(driving).waiting_for)
    await cordon(driving, cordoned=True)
    driving.pair.destination.room(2)


async def cordon(driving: Driving, *, cordoned: bool) -> None:
    request = host_pb2.UpdateHostRequest(settings=host_pb2.HostSettings(cordoned=cordoned))
    request.update_mask.paths[:] = ["cordoned"]
    request.change.changed_by = "root@admin1"
    await driving.pair.destination.engine.desk.update(request)
    driving.directory.changed.ring()


async def test_8_1_a_wait_that_cannot_go_on_now_shows_both_hosts_that_its_driver_is_there(driving: Driving) -> None:
    """Else the source's agent takes it over, and does not know what keeps it from going on."""
    pair = driving.pair
    await waits_at_a_cordoned_host(driving)
    driving.migrations.collection.plan_again()  # with another driver, which has asked no host yet
    await until(lambda: "h2 was cordoned" in shown(driving).waiting_for)
    books = [
        agent.engine.desk.queues[side].book
        for agent, side in ((pair.source, Direction.OUTGOING), (pair.destination, Direction.INCOMING))
    ]
    for _ in range(3):
        before = min(seen(books))
        await until(lambda before=before: min(seen(books)) > before)  # type: ignore[misc]
    assert not any(book.slots() for book in books)


def seen(books: list[Book]) -> list[float]:
    return [claim.seen for book in books for claim in book.claims()]


async def test_8_1_a_driver_that_follows_another_one_leaves_no_slot(driving: Driving) -> None:
    """It was silent, not dead, and got slots just as the other one had moved the guest."""
    await waiting(driving)
    to_both = (driving.pair.to_source, driving.pair.to_destination)
    for line in to_both:
        line.cut = True
    await until(lambda: shown(driving).silent_hosts)
    await moved_by_another(driving.pair)
    for line in to_both:
        line.cut = False
    ended = await driving.ended(ID)
    assert (ended.state, ended.runs_on) == (pb.MIGRATION_STATE_SUCCEEDED, "h2")
    for agent in (driving.pair.source, driving.pair.destination):
        books = [queue.book for queue in agent.engine.desk.queues.values()]
        await until(lambda books=books: not seen(books))  # type: ignore[misc]
