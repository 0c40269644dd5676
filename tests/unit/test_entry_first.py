"""agent.migration.driving: a migration exists before it has its slot, and may wait for it (issue 7, part 2)."""

import asyncio
from collections.abc import Callable

import pytest

import agent.migration.migrations
from agent.migration import uptime
from agent.migration.collection import Change
from agent.runtime.errors import DroverError, Reason
from coordinator.client import Migration
from drover.agent.v1 import migration_pb2 as pb
from tests.unit.asking import ID, fails, until
from tests.unit.fake_directory import Driving
from tests.unit.fake_hypervisor import guest
from tests.unit.test_migrations import OTHER_SPEC, SPEC
from tests.unit.test_uptime import HOUR, set_wall_clock
from tests.unit.two_agents import JOURNAL_DOWN, FakeJournal, Pair

OTHER_ID = ID.replace("6f1c", "7f1c")
WEEK = 7 * 24 * HOUR


def state(driving: Driving) -> pb.MigrationState.ValueType:
    return driving.migrations.collection.get(ID).migration.state


def saved(driving: Driving) -> pb.Migration:
    return pb.Migration.FromString(driving.log.rows[ID][0])


def slots_taken(pair: Pair) -> int:
    return len(pair.destination.engine.active())


async def asked_for_a_slot(driving: Driving) -> "asyncio.Task[pb.Migration]":
    """A fail-fast start whose ReserveSlot gets no answer."""
    driving.pair.to_destination.hang = {"reserve_slot"}
    starting = asyncio.create_task(driving.migrations.start(ID, SPEC))
    await until(lambda: driving.pair.to_destination.count["reserve_slot"])
    await asyncio.sleep(0)  # the line counts a call one turn before it lets it hang
    return starting


async def waiting(driving: Driving, slot_wait: float = 60.0) -> pb.Migration:
    """A start that waits, because the destination has no slot."""
    driving.pair.destination.room(0)
    started = await driving.migrations.start(ID, SPEC, slot_wait)
    await until(lambda: "are taken" in driving.migrations.collection.get(ID).migration.waiting_for)
    return started


# --- before the slot --------------------------------------------------------------------------------------------------


async def test_7_a_migration_is_durable_listed_and_watched_before_it_has_its_slot(driving: Driving) -> None:
    starting = await asked_for_a_slot(driving)
    assert saved(driving).state == pb.MIGRATION_STATE_PENDING
    assert slots_taken(driving.pair) == 0
    (listed,) = driving.migrations.collection.list(active_only=True)
    seen = await anext(driving.migrations.collection.watch(ID, 0))
    for migration in (listed, seen, driving.migrations.collection.get(ID).migration):
        assert (migration.state, migration.phase, migration.runs_on) == (pb.MIGRATION_STATE_PENDING, "reserve", "h1")
        assert (migration.wait_reason, migration.waiting_for) == (pb.WAIT_REASON_SLOT, "an incoming slot of h2")
    assert not starting.done()
    starting.cancel()


async def test_7_a_cancel_before_the_slot_ends_it_at_once_and_leaves_no_slot(driving: Driving) -> None:
    starting = await asked_for_a_slot(driving)
    await driving.migrations.cancel(ID)
    ended = await driving.ended(ID)
    assert (ended.state, ended.failure.reason, ended.runs_on) == (pb.MIGRATION_STATE_CANCELLED, Reason.CANCELLED, "h1")
    assert (await starting).state == pb.MIGRATION_STATE_CANCELLED
    assert saved(driving).state == pb.MIGRATION_STATE_CANCELLED
    assert driving.pair.source.calls == []
    await until(lambda: driving.pair.to_destination.count["abandon"])
    assert slots_taken(driving.pair) == 0


async def test_7_a_slot_that_is_granted_while_it_is_cancelled_is_given_back(driving: Driving) -> None:
    """The destination is still checking the guest when the caller of ReserveSlot is gone."""
    held = driving.pair.destination.hypervisor.held["incompatibilities"] = asyncio.Event()
    starting = asyncio.create_task(driving.migrations.start(ID, SPEC))
    await until(lambda: driving.pair.destination.hypervisor.arguments.get("incompatibilities"))
    await driving.migrations.cancel(ID)
    assert (await starting).state == pb.MIGRATION_STATE_CANCELLED
    held.set()
    await until(lambda: driving.pair.destination.journalled == "gone")
    await until(lambda: not any(attempt.busy for attempt in driving.pair.destination.engine._attempts.all()))
    assert slots_taken(driving.pair) == 0


async def test_7_a_life_that_died_before_the_slot_plans_again_and_goes_on(driving: Driving) -> None:
    starting = await asked_for_a_slot(driving)
    asked = driving.directory.asked
    driving.pair.to_destination.hang.clear()
    await driving.restart()
    starting.cancel()
    ended = await driving.ended(ID)
    assert (ended.state, ended.runs_on) == (pb.MIGRATION_STATE_SUCCEEDED, "h2")
    assert driving.directory.asked >= asked + 2, "where both are, and what the guest needs"
    driving.pair.moved()


async def test_7_a_life_that_died_with_the_slot_takes_it_up(driving: Driving) -> None:
    driving.pair.to_source.hang = {"begin"}
    await driving.migrations.start(ID, SPEC)
    await until(lambda: driving.pair.to_source.count["begin"])
    driving.pair.to_source.hang.clear()
    await driving.restart()
    assert (await driving.ended(ID)).state == pb.MIGRATION_STATE_SUCCEEDED
    driving.pair.moved()


async def test_7_what_cannot_go_on_after_a_restart_is_kept_as_failed(driving: Driving) -> None:
    """No call returns the refusal, so the migration stays to be read; and its guest may belong to another migration by now."""
    starting = await asked_for_a_slot(driving)
    driving.pair.source.hypervisor.domains.clear()
    await driving.restart()
    starting.cancel()
    ended = await driving.ended(ID)
    assert (ended.state, ended.failure.reason) == (pb.MIGRATION_STATE_FAILED, Reason.DOMAIN_NOT_FOUND)
    assert saved(driving).state == pb.MIGRATION_STATE_FAILED
    assert slots_taken(driving.pair) == 0


async def test_7_what_its_source_has_forgotten_is_not_given_up_before_the_destination_was_asked(driving: Driving) -> None:
    pair = driving.pair
    starting = await asked_for_a_slot(driving)
    begun = driving.log.rows[ID]
    pair.to_destination.hang.clear()
    await driving.restart()
    starting.cancel()
    assert (await driving.ended(ID)).runs_on == "h2"
    await driving.migrations.close()
    driving.log.rows[ID] = begun
    pair.source.journal = FakeJournal(pair.source.calls)
    await pair.source.restart()
    pair.to_destination.cut = True
    asked = driving.directory.asked
    await driving.restart()
    await until(lambda: driving.directory.asked >= asked + 2)
    assert state(driving) != pb.MIGRATION_STATE_FAILED
    pair.to_destination.cut = False
    await until(lambda: driving.migrations.collection.get(ID).migration.runs_on == "h2")
    assert state(driving) != pb.MIGRATION_STATE_FAILED


async def test_7_a_destination_that_is_another_host_by_now_is_not_taken(driving: Driving) -> None:
    starting = await asked_for_a_slot(driving)
    await driving.migrations.close()
    driving.pair.to_destination.hang.clear()
    driving.pair.destination.engine.host.name = "h3"
    await driving.restart()
    starting.cancel()
    ended = await driving.ended(ID)
    assert (ended.state, ended.failure.reason) == (pb.MIGRATION_STATE_FAILED, Reason.HOST_NOT_FOUND)
    assert driving.pair.source.calls == driving.pair.destination.calls == []


# --- fail-fast --------------------------------------------------------------------------------------------------------


def no_room(pair: Pair) -> Callable[[], None]:
    pair.destination.room(0)
    return lambda: pair.destination.room(2)


def no_cpu(pair: Pair) -> Callable[[], None]:
    pair.destination.hypervisor.problems = ["no such CPU"]
    return pair.destination.hypervisor.problems.clear


def name_taken(pair: Pair) -> Callable[[], None]:
    pair.destination.hypervisor.put(guest(uuid="b" * 8 + "-0000-4000-8000-000000000000"))
    return pair.destination.hypervisor.domains.clear


def unreachable(pair: Pair) -> Callable[[], None]:
    pair.to_destination.cut = True
    return lambda: setattr(pair.to_destination, "cut", False)


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (no_room, Reason.BUSY),
        (no_cpu, Reason.INCOMPATIBLE_GUEST),
        (name_taken, Reason.DOMAIN_EXISTS),
        (unreachable, Reason.HOST_UNREACHABLE),
    ],
)
async def test_7_a_refused_start_is_told_to_its_caller_and_its_watchers_and_gone(
    driving: Driving, prepare: Callable[[Pair], Callable[[], None]], reason: Reason
) -> None:
    mend = prepare(driving.pair)
    changes: list[Change] = []
    ends: list[pb.Migration] = []

    async def watch_all() -> None:
        async for change in driving.migrations.collection.watch_all(0):
            changes.append(change)
            if change.migration is not None and not ends:
                asyncio.get_running_loop().create_task(watch_one(change.migration.migration_id))

    async def watch_one(migration_id: str) -> None:
        ends.extend([migration async for migration in driving.migrations.collection.watch(migration_id, 0)])

    watching = asyncio.create_task(watch_all())
    await until(lambda: changes)
    refusal = await fails(driving.migrations.start(ID, SPEC), reason)
    assert reason is not Reason.BUSY or refusal.retry_after
    await until(lambda: changes[-1].removed and ends)
    watching.cancel()
    assert changes[-1].removed == ID
    assert (ends[-1].state, ends[-1].failure.reason) == (pb.MIGRATION_STATE_FAILED, reason)
    assert driving.log.rows == {}
    await fails(anext(driving.migrations.collection.watch(ID, 0)), Reason.MIGRATION_NOT_FOUND)
    mend()
    await driving.migrations.start(ID, SPEC)
    assert (await driving.ended(ID)).state == pb.MIGRATION_STATE_SUCCEEDED
    driving.pair.moved()


async def test_7_the_id_of_a_refused_start_may_have_another_spec(driving: Driving) -> None:
    mend = no_room(driving.pair)
    await fails(driving.migrations.start(ID, OTHER_SPEC), Reason.BUSY)
    mend()
    await driving.migrations.start(ID, SPEC)
    assert (await driving.ended(ID)).spec == SPEC


async def test_7_all_callers_of_one_start_get_its_refusal(driving: Driving) -> None:
    no_room(driving.pair)
    calls = [asyncio.create_task(driving.migrations.start(ID, SPEC)) for _ in range(3)]
    assert {(await fails(call, Reason.BUSY)).reason for call in calls} == {Reason.BUSY}
    assert driving.pair.to_destination.count["reserve_slot"] == 1


async def test_7_a_refusal_that_cannot_be_written_down_is_no_refusal_yet(driving: Driving) -> None:
    """Else the next life would start a migration whose start was refused."""
    no_room(driving.pair)
    driving.log.remove_fails = [JOURNAL_DOWN]
    await fails(driving.migrations.start(ID, SPEC), Reason.JOURNAL_UNAVAILABLE)
    await until(lambda: driving.log.rows == {} and not driving.migrations.collection.list(active_only=False))


# --- the wait ---------------------------------------------------------------------------------------------------------


async def test_7_a_start_that_may_wait_answers_at_once_and_moves_when_a_slot_is_free(driving: Driving) -> None:
    started = await waiting(driving)
    assert (started.state, started.slot_wait.seconds) == (pb.MIGRATION_STATE_PENDING, 60)
    now = driving.migrations.collection.get(ID).migration
    assert (now.state, now.wait_reason) == (pb.MIGRATION_STATE_PENDING, pb.WAIT_REASON_SLOT)
    assert now.waiting_for.startswith("an incoming slot of h2: 2 of 2 are taken, place 1 of 1, likely ")
    assert (now.wait.reason, now.wait.host, now.wait.limit, now.wait.position) == (pb.WAIT_REASON_SLOT, "h2", "incoming_limit", 1)
    assert Migration.from_proto(now).slot_duration is None
    assert driving.pair.source.calls == []
    driving.pair.destination.room(1)
    ended = await driving.ended(ID)
    waited = Migration.from_proto(ended).slot_duration
    assert waited is not None
    assert 0 < waited < ended.duration.ToNanoseconds() / 1e9
    assert (ended.state, ended.waiting_for, ended.wait_reason) == (pb.MIGRATION_STATE_SUCCEEDED, "", 0)
    driving.pair.moved()


async def test_7_an_unreachable_destination_is_waited_for_too(driving: Driving) -> None:
    driving.pair.to_destination.cut = True
    await driving.migrations.start(ID, SPEC, 60)
    await until(lambda: driving.migrations.collection.get(ID).migration.wait_reason == pb.WAIT_REASON_HOST_UNREACHABLE)
    assert list(driving.migrations.collection.get(ID).migration.silent_hosts) == ["h2"]
    driving.pair.to_destination.cut = False
    assert (await driving.ended(ID)).state == pb.MIGRATION_STATE_SUCCEEDED


async def test_7_what_waiting_cannot_mend_ends_the_wait(driving: Driving) -> None:
    await waiting(driving)
    driving.pair.destination.hypervisor.problems = ["no such CPU"]
    driving.pair.destination.room(1)
    ended = await driving.ended(ID)
    assert (ended.state, ended.failure.reason) == (pb.MIGRATION_STATE_FAILED, Reason.INCOMPATIBLE_GUEST)
    assert slots_taken(driving.pair) == 0


async def test_7_the_end_of_the_wait_says_what_it_waited_for_and_stays(driving: Driving) -> None:
    driving.pair.destination.room(0)
    await driving.migrations.start(ID, SPEC, 1)
    ended = await driving.ended(ID)
    assert (ended.state, ended.failure.reason, ended.runs_on) == (pb.MIGRATION_STATE_FAILED, Reason.BUSY, "h1")
    assert ended.failure.message.startswith("h2 gave no slot within 1 s: it waited for an incoming slot of h2: 2 of 2 are taken")
    assert (ended.failure.metadata["limit"], ended.failure.metadata["position"]) == ("incoming_limit", "1")
    driving.pair.destination.room(1)
    await driving.restart()
    assert state(driving) == pb.MIGRATION_STATE_FAILED
    assert (await driving.migrations.start(ID, SPEC, 60)).state == pb.MIGRATION_STATE_FAILED
    assert driving.pair.source.calls == driving.pair.destination.calls == []


async def test_7_only_so_many_migrations_wait(driving: Driving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent.migration.migrations, "MOST_WAITING", 1)
    await waiting(driving)
    error = await fails(driving.migrations.start(OTHER_ID, SPEC, 60), Reason.OVERLOADED)
    assert error.retry_after
    await fails(driving.migrations.start(OTHER_ID, SPEC), Reason.BUSY)  # one that does not wait is not counted
    await driving.migrations.cancel(ID)
    await driving.ended(ID)
    assert (await driving.migrations.start(OTHER_ID, SPEC, 60)).state == pb.MIGRATION_STATE_PENDING


async def test_7_the_same_id_for_another_spec_is_refused_while_it_waits(driving: Driving) -> None:
    await waiting(driving)
    await fails(driving.migrations.start(ID, OTHER_SPEC, 60), Reason.MIGRATION_EXISTS)
    assert (await driving.migrations.start(ID, SPEC)).state == pb.MIGRATION_STATE_PENDING


async def test_7_a_cancel_ends_the_wait_at_once(driving: Driving) -> None:
    await waiting(driving)
    await driving.migrations.cancel(ID)
    ended = await driving.ended(ID, within=1.0)
    assert (ended.state, ended.failure.reason) == (pb.MIGRATION_STATE_CANCELLED, Reason.CANCELLED)
    assert saved(driving).state == pb.MIGRATION_STATE_CANCELLED
    driving.pair.destination.room(1)
    await driving.restart()
    assert state(driving) == pb.MIGRATION_STATE_CANCELLED
    assert driving.pair.source.calls == driving.pair.destination.calls == []


async def test_7_a_cancel_that_only_the_log_has_seen_ends_the_wait_in_the_next_life(driving: Driving) -> None:
    await waiting(driving)
    await driving.migrations.close()
    asked = saved(driving)
    asked.state = pb.MIGRATION_STATE_CANCELLING
    asked.cancel_time.GetCurrentTime()
    driving.log.rows[ID] = asked.SerializeToString(), False
    driving.pair.to_destination.cut = True  # nothing of it is needed
    await driving.restart()
    assert (await driving.ended(ID)).state == pb.MIGRATION_STATE_CANCELLED
    assert driving.pair.source.calls == []


async def test_7_the_wait_goes_on_in_the_next_life(driving: Driving) -> None:
    await waiting(driving, WEEK)
    await driving.restart()
    await until(lambda: "are taken" in driving.migrations.collection.get(ID).migration.waiting_for)
    driving.pair.destination.room(1)
    assert (await driving.ended(ID)).state == pb.MIGRATION_STATE_SUCCEEDED
    driving.pair.moved()


@pytest.mark.parametrize("by", [HOUR, -HOUR])
async def test_7_the_wait_is_measured_over_restarts_and_not_by_the_wall_clock(
    driving: Driving, monkeypatch: pytest.MonkeyPatch, by: float
) -> None:
    await waiting(driving, HOUR / 2)
    set_wall_clock(monkeypatch, by)
    await driving.restart()
    await until(lambda: "are taken" in driving.migrations.collection.get(ID).migration.waiting_for)
    later = uptime._seconds() + HOUR
    monkeypatch.setattr(uptime, "_seconds", lambda: later)
    await driving.restart()
    ended = await driving.ended(ID)
    assert (ended.state, ended.failure.reason) == (pb.MIGRATION_STATE_FAILED, Reason.BUSY)


async def test_7_a_slot_whose_answer_was_lost_until_its_lease_ended_is_asked_for_anew(driving: Driving) -> None:
    pair = driving.pair
    pair.destination.engine.host.lease_seconds = 0.1
    pair.to_destination.lose_answer["reserve_slot"] = 1
    pair.to_destination.on_call = lambda _: setattr(pair.to_destination, "cut", pair.destination.journalled == "reserved")
    await driving.migrations.start(ID, SPEC, 60)
    await until(lambda: pair.destination.journalled == "gone")
    pair.destination.engine.host.lease_seconds = 60.0
    pair.to_destination.on_call = lambda _: None
    pair.to_destination.cut = False
    ended = await driving.ended(ID)
    assert (ended.state, ended.attempt) == (pb.MIGRATION_STATE_SUCCEEDED, 2)
    assert pair.runs_on == ["h2"]


async def test_7_a_process_that_stops_neither_waits_for_the_wait_nor_takes_a_slot(driving: Driving) -> None:
    await waiting(driving)
    driving.migrations.runner.draining = True
    assert await driving.migrations.idle(0.5)
    await asyncio.sleep(0.1)  # many pauses of the wait; a call that was under way is answered by now
    driving.pair.destination.room(1)
    tried = driving.pair.to_destination.count["reserve_slot"]
    await asyncio.sleep(0.1)
    assert driving.pair.to_destination.count["reserve_slot"] == tried
    assert driving.pair.source.calls == []
    await driving.restart()
    assert (await driving.ended(ID)).state == pb.MIGRATION_STATE_SUCCEEDED


@pytest.mark.parametrize("slot_wait", [0, 60])
async def test_8_1_a_migration_whose_begin_was_refused_leaves_no_slot(driving: Driving, slot_wait: float) -> None:
    """No record at the source has held the slot, so none frees it."""
    pair = driving.pair
    pair.to_source.refuse["begin"] = [DroverError(Reason.DOMAIN_NOT_RUNNING, "it is paused")]
    await driving.migrations.start(ID, SPEC, slot_wait)
    ended = await driving.ended(ID)
    assert (ended.state, ended.failure.reason) == (pb.MIGRATION_STATE_FAILED, Reason.DOMAIN_NOT_RUNNING)
    assert [queue.book.claims() for queue in pair.source.engine.desk.queues.values() if queue.book.claims()] == []
