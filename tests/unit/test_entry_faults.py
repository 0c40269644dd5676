"""agent.migration.driving: what a refused, lost or late start leaves behind (issue 7, part 2)."""

import asyncio
import gc
from unittest.mock import AsyncMock

import pytest

import agent.migration.migrations
from agent.hypervisor.base import DomainState
from agent.migration import uptime
from agent.migration.whereabouts import whereabouts
from agent.runtime.alongside import unless
from agent.runtime.errors import DroverError, Reason
from coordinator.store import MemoryStore
from coordinator.store.migration_log import StoredMigrations
from drover.agent.v1 import migration_pb2 as pb
from tests.unit.asking import ID, PATIENCE, fails, statement, until
from tests.unit.fake_directory import Driving
from tests.unit.fake_hypervisor import UUID
from tests.unit.test_entry_first import asked_for_a_slot, saved, slots_taken, state, waiting
from tests.unit.test_migrations import SPEC
from tests.unit.test_uptime import HOUR
from tests.unit.two_agents import JOURNAL_DOWN


async def test_7_an_old_fail_fast_start_is_not_carried_out_by_a_later_life(
    driving: Driving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its caller got an error when the process died, and may have arranged things otherwise since."""
    starting = await asked_for_a_slot(driving)
    driving.pair.to_destination.hang.clear()
    later = uptime._seconds() + HOUR
    monkeypatch.setattr(uptime, "_seconds", lambda: later)
    await driving.restart()
    starting.cancel()
    ended = await driving.ended(ID)
    assert (ended.state, ended.failure.reason, ended.runs_on) == (pb.MIGRATION_STATE_FAILED, Reason.DRIVER_SILENT, "h1")
    assert saved(driving).state == pb.MIGRATION_STATE_FAILED
    assert driving.pair.source.calls == []
    assert slots_taken(driving.pair) == 0


async def test_7_an_old_fail_fast_start_does_not_end_before_the_destination_was_asked(
    driving: Driving, monkeypatch: pytest.MonkeyPatch
) -> None:
    starting = await asked_for_a_slot(driving)
    driving.pair.to_destination.hang.clear()
    driving.pair.to_destination.cut = True
    later = uptime._seconds() + HOUR
    monkeypatch.setattr(uptime, "_seconds", lambda: later)
    await driving.restart()
    starting.cancel()
    tried = driving.pair.to_destination.count["get_record"]
    await until(lambda: driving.pair.to_destination.count["get_record"] >= tried + 4)
    assert state(driving) == pb.MIGRATION_STATE_PENDING
    driving.pair.to_destination.cut = False
    assert (await driving.ended(ID)).failure.reason == Reason.DRIVER_SILENT


def unknown_once(driving: Driving, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the next save be written, and fail all the same."""
    save = driving.log.save

    async def written_but_not_known(migration_id: str, body: bytes, *, ended: bool) -> None:
        monkeypatch.setattr(driving.log, "save", save)
        await save(migration_id, body, ended=ended)
        raise DroverError(Reason.JOURNAL_UNAVAILABLE, "no answer", metadata={"written": "unknown"})

    monkeypatch.setattr(driving.log, "save", written_but_not_known)


@pytest.mark.parametrize("slot_wait", [0.0, 60.0])
async def test_7_a_start_whose_write_failed_leaves_no_row_if_it_was_written_all_the_same(
    driving: Driving, slot_wait: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    unknown_once(driving, monkeypatch)
    await fails(driving.migrations.start(ID, SPEC, slot_wait), Reason.JOURNAL_UNAVAILABLE)
    await until(lambda: not driving.migrations.collection.list(active_only=False))
    assert driving.log.rows == {}
    assert driving.pair.to_destination.count["reserve_slot"] == 0
    await driving.migrations.start(ID, SPEC)
    assert (await driving.ended(ID)).state == pb.MIGRATION_STATE_SUCCEEDED


async def test_7_a_start_whose_write_failed_is_listed_as_long_as_its_row_may_be_there(
    driving: Driving, monkeypatch: pytest.MonkeyPatch
) -> None:
    unknown_once(driving, monkeypatch)
    down = driving.log.remove_fails = [JOURNAL_DOWN] * 1000
    await fails(driving.migrations.start(ID, SPEC, 60), Reason.JOURNAL_UNAVAILABLE)
    await until(lambda: len(down) < 1000)
    assert state(driving) == pb.MIGRATION_STATE_PENDING
    await fails(driving.migrations.start(ID, SPEC, 60), Reason.JOURNAL_UNAVAILABLE)
    await fails(driving.migrations.cancel(ID), Reason.JOURNAL_UNAVAILABLE)
    assert not await driving.migrations.idle(0.05)
    down.clear()
    await until(lambda: not driving.migrations.collection.list(active_only=False))
    assert driving.log.rows == {}


async def test_7_a_start_whose_write_has_failed_for_certain_leaves_nothing(driving: Driving) -> None:
    full = DroverError(Reason.JOURNAL_UNAVAILABLE, "the disk is full", metadata={"written": "no"})
    driving.log.fails = [full]
    driving.log.remove_fails = [full] * 1000
    await fails(driving.migrations.start(ID, SPEC), Reason.JOURNAL_UNAVAILABLE)
    assert driving.migrations.collection.list(active_only=False) == []


async def test_7_a_start_that_a_stopping_process_cuts_off_leaves_no_row(driving: Driving, monkeypatch: pytest.MonkeyPatch) -> None:
    """As SQLite does: a write is carried out although its caller is gone."""
    save, asked = driving.log.save, asyncio.Event()

    async def written_later(migration_id: str, body: bytes, *, ended: bool) -> None:
        await save(migration_id, body, ended=ended)
        asked.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(driving.log, "save", written_later)
    starting = asyncio.create_task(driving.migrations.start(ID, SPEC, 60))
    await asked.wait()
    await driving.migrations.close()
    await asyncio.wait({starting})
    assert driving.log.rows == {}


async def test_7_the_same_start_after_the_end_of_the_wait_returns_the_migration(driving: Driving) -> None:
    driving.pair.destination.room(0)
    await driving.migrations.start(ID, SPEC, 0.05)
    await driving.ended(ID)
    assert (await driving.migrations.start(ID, SPEC, 0.05)).state == pb.MIGRATION_STATE_FAILED


async def test_7_the_same_start_after_an_end_that_was_saved_late_returns_the_migration(driving: Driving) -> None:
    await waiting(driving)
    await driving.migrations.cancel(ID)
    driving.log.fails = [JOURNAL_DOWN]
    await driving.ended(ID)
    assert (await driving.migrations.start(ID, SPEC, 60)).state == pb.MIGRATION_STATE_CANCELLED


async def test_7_the_same_start_after_a_later_life_has_failed_returns_the_migration(driving: Driving) -> None:
    starting = await asked_for_a_slot(driving)
    driving.pair.source.hypervisor.domains.clear()
    await driving.restart()
    starting.cancel()
    await driving.ended(ID)
    assert (await driving.migrations.start(ID, SPEC)).failure.reason == Reason.DOMAIN_NOT_FOUND


async def test_7_a_recovered_start_that_stops_with_the_process_does_not_hold_it_up(driving: Driving) -> None:
    starting = await asked_for_a_slot(driving)
    driving.pair.to_destination.hang.clear()
    driving.pair.to_destination.cut = True
    await driving.restart()
    starting.cancel()
    await until(lambda: "retrying" in driving.migrations.collection.get(ID).migration.waiting_for)
    driving.migrations.runner.draining = True
    assert await driving.migrations.idle(PATIENCE)


async def test_7_a_cancel_while_the_next_attempt_is_saved_is_kept(driving: Driving) -> None:
    pair = driving.pair
    await waiting(driving)
    over = DroverError(Reason.WRONG_PHASE, "it is over", metadata={"state": "gone"})
    pair.to_destination.refuse["reserve_slot"] = [pair.to_destination.unreachable(), over]
    driving.log.held = held = asyncio.Event()
    pair.destination.room(1)
    await driving.log.waiting.wait()
    driving.log.held = None
    held.set()  # the save ends in the moment in which the cancel comes
    await driving.migrations.cancel(ID)
    ended = await driving.ended(ID)
    assert (ended.state, ended.HasField("cancel_time")) == (pb.MIGRATION_STATE_CANCELLED, True)
    row = saved(driving)
    assert (row.state, row.attempt, row.cancel_time) == (ended.state, ended.attempt, ended.cancel_time)


async def test_7_a_save_as_open_replaces_the_end_in_the_store(store: MemoryStore) -> None:
    log = StoredMigrations(store)
    await log.save(ID, b"", ended=True)
    await log.save(ID, b"", ended=False)
    assert len(await log.load()) == 1


async def test_7_no_cancel_is_saved_over_the_end_of_a_wait(driving: Driving, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log fails once, so that the end is saved only after the cancel has come."""
    driving.pair.destination.room(0)
    save, saves, refused = driving.log.save, [], asyncio.Event()

    async def fails_once(migration_id: str, body: bytes, *, ended: bool) -> None:
        saves.append(ended)
        if saves.count(True) == 1 and ended:
            raise JOURNAL_DOWN
        if ended:
            await refused.wait()
        await save(migration_id, body, ended=ended)

    monkeypatch.setattr(driving.log, "save", fails_once)
    await driving.migrations.start(ID, SPEC, 0.05)
    await until(lambda: True in saves)
    await fails(driving.migrations.cancel(ID), Reason.JOURNAL_UNAVAILABLE)
    refused.set()
    assert (await driving.ended(ID)).state == pb.MIGRATION_STATE_FAILED
    assert saves == [False, True, True]


async def test_7_starts_at_the_same_time_keep_the_bound_of_waiting_migrations(
    driving: Driving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent.migration.migrations, "MOST_WAITING", 2)
    driving.pair.destination.room(0)
    starts = (driving.migrations.start(f"{n}{ID[1:]}", SPEC, 60) for n in range(5))
    outcomes = await asyncio.gather(*starts, return_exceptions=True)
    refused = [outcome.reason for outcome in outcomes if isinstance(outcome, DroverError)]
    assert refused == [Reason.OVERLOADED] * 3
    assert len(driving.migrations.collection.list(active_only=True)) == 2


async def test_7_the_error_of_work_that_was_ended_is_read() -> None:
    unread: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unread.append(context))
    ended = asyncio.Event()

    async def work() -> None:
        try:
            ended.set()
            await asyncio.Event().wait()
        finally:
            raise JOURNAL_DOWN

    await fails(unless(ended, DroverError(Reason.CANCELLED, "ended"), work), Reason.CANCELLED)
    gc.collect()
    assert unread == []


async def test_7_a_first_try_does_not_take_up_an_attempt_that_is_over(driving: Driving) -> None:
    """The id was used before: the destination's record is of that migration."""
    over = DroverError(Reason.WRONG_PHASE, "it is over", metadata={"state": "gone"})
    driving.pair.to_destination.refuse["reserve_slot"] = [over]
    await driving.migrations.start(ID, SPEC, 60)
    ended = await driving.ended(ID)
    assert (ended.state, ended.failure.reason, ended.attempt) == (pb.MIGRATION_STATE_FAILED, Reason.WRONG_PHASE, 1)
    assert driving.pair.source.calls == []


async def slot_lost_in_an_earlier_life(driving: Driving) -> None:
    """A migration that waits took a slot, got no answer, and its process ended; then the lease ended, too."""
    pair = driving.pair
    pair.destination.engine.host.lease_seconds = 0.1
    pair.to_destination.lose_answer["reserve_slot"] = 1
    pair.to_destination.on_call = lambda _: setattr(pair.to_destination, "cut", pair.destination.journalled == "reserved")
    await driving.migrations.start(ID, SPEC, 60)
    await until(lambda: pair.destination.journalled == "gone")
    await driving.migrations.close()
    pair.destination.engine.host.lease_seconds = 60.0
    pair.to_destination.on_call = lambda _: None
    pair.to_destination.cut = False


async def test_7_a_wait_goes_on_after_a_life_in_which_its_slot_was_lost(driving: Driving) -> None:
    await slot_lost_in_an_earlier_life(driving)
    await driving.restart()
    ended = await driving.ended(ID)
    assert (ended.state, ended.attempt) == (pb.MIGRATION_STATE_SUCCEEDED, 2)
    assert driving.pair.runs_on == ["h2"]


async def test_7_a_cancel_after_a_slot_was_lost_ends_as_cancelled(driving: Driving, monkeypatch: pytest.MonkeyPatch) -> None:
    await slot_lost_in_an_earlier_life(driving)
    find = AsyncMock(side_effect=driving.pair.to_destination.unreachable())
    monkeypatch.setattr(driving.directory, "find", find)
    await driving.restart()
    await until(lambda: find.await_count >= 2)
    assert state(driving) == pb.MIGRATION_STATE_PENDING
    await driving.migrations.cancel(ID)
    assert (await driving.ended(ID)).state == pb.MIGRATION_STATE_CANCELLED


async def test_7_a_slot_that_may_be_held_is_given_back_after_another_plan(driving: Driving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent.migration.slots, "PLAN_SECONDS", 0.0)
    pair = driving.pair
    pair.to_destination.lose_answer["reserve_slot"] = 1
    pair.to_destination.on_call = lambda _: pair.source.hypervisor.domains.clear() if slots_taken(pair) else None
    await driving.migrations.start(ID, SPEC, 60)
    assert (await driving.ended(ID)).failure.reason == Reason.DOMAIN_NOT_FOUND
    await until(lambda: slots_taken(pair) == 0)


async def test_7_a_long_wait_plans_again(driving: Driving, monkeypatch: pytest.MonkeyPatch) -> None:
    await waiting(driving)
    driving.pair.source.hypervisor.change(UUID, memory_bytes=1 << 40)
    monkeypatch.setattr(agent.migration.slots, "PLAN_SECONDS", 0.0)
    planned = driving.directory.asked
    await until(lambda: driving.directory.asked >= planned + 2)
    driving.pair.destination.room(1)
    assert (await driving.ended(ID)).state == pb.MIGRATION_STATE_SUCCEEDED
    assert driving.pair.destination.hypervisor.arguments["incompatibilities"][0].memory_bytes == 1 << 40


async def test_8_4_a_change_of_networks_while_the_last_call_waits_plans_again(driving: Driving) -> None:
    await waiting(driving)
    driving.pair.source.hypervisor.change(UUID, memory_bytes=1 << 40)
    driving.migrations.collection.plan_again()
    driving.pair.destination.room(1)
    assert (await driving.ended(ID)).state == pb.MIGRATION_STATE_SUCCEEDED
    assert driving.pair.destination.hypervisor.arguments["incompatibilities"][0].memory_bytes == 1 << 40


async def test_7_a_guest_that_is_gone_ends_the_wait(driving: Driving, monkeypatch: pytest.MonkeyPatch) -> None:
    await waiting(driving)
    monkeypatch.setattr(agent.migration.slots, "PLAN_SECONDS", 0.0)
    driving.pair.source.hypervisor.domains.clear()
    ended = await driving.ended(ID)
    assert (ended.state, ended.failure.reason) == (pb.MIGRATION_STATE_FAILED, Reason.DOMAIN_NOT_FOUND)


async def test_7_a_destination_that_gives_no_plan_is_shown_as_silent(driving: Driving, monkeypatch: pytest.MonkeyPatch) -> None:
    await waiting(driving)
    monkeypatch.setattr(agent.migration.slots, "PLAN_SECONDS", 0.0)
    driving.directory.fails = [DroverError(Reason.HOST_UNREACHABLE, "h2 does not answer", metadata={"peer": "h2"})] * 1000
    await until(lambda: driving.migrations.collection.get(ID).migration.wait_reason == pb.WAIT_REASON_HOST_UNREACHABLE)
    assert list(driving.migrations.collection.get(ID).migration.silent_hosts) == ["h2"]
    driving.directory.fails.clear()
    driving.pair.destination.room(1)
    assert (await driving.ended(ID)).state == pb.MIGRATION_STATE_SUCCEEDED


async def test_7_a_guest_that_is_busy_for_a_while_does_not_end_the_wait(driving: Driving) -> None:
    driving.pair.to_destination.refuse["reserve_slot"] = [DroverError(Reason.DOMAIN_BUSY, "it is being saved")]
    await driving.migrations.start(ID, SPEC, 60)
    assert (await driving.ended(ID)).state == pb.MIGRATION_STATE_SUCCEEDED


async def test_7_the_same_start_in_a_later_life_returns_at_once(driving: Driving) -> None:
    starting = await asked_for_a_slot(driving)
    driving.pair.to_source.cut = driving.pair.to_destination.cut = True
    await driving.restart()
    starting.cancel()
    async with asyncio.timeout(PATIENCE):
        assert (await driving.migrations.start(ID, SPEC)).state == pb.MIGRATION_STATE_PENDING


async def test_7_a_guest_that_left_during_the_wait_is_not_said_to_run_here(
    driving: Driving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another migration may have moved it: nobody may be told to start it again."""
    await waiting(driving)
    monkeypatch.setattr(agent.migration.slots, "PLAN_SECONDS", 0.0)
    driving.pair.source.hypervisor.domains.clear()
    ended = await driving.ended(ID)
    assert (ended.failure.reason, ended.runs_on) == (Reason.DOMAIN_NOT_FOUND, "")
    assert "has left h1 without this migration: another one moves it, or somebody has removed it" in whereabouts(ended).sentence


async def test_7_a_guest_that_was_shut_down_during_the_wait_is_not_said_to_run(
    driving: Driving, monkeypatch: pytest.MonkeyPatch
) -> None:
    await waiting(driving)
    monkeypatch.setattr(agent.migration.slots, "PLAN_SECONDS", 0.0)
    driving.pair.source.hypervisor.change(UUID, state=DomainState.SHUTOFF, reason="shutdown")
    ended = await driving.ended(ID)
    assert (ended.state, ended.runs_on) == (pb.MIGRATION_STATE_FAILED, "")
    assert "runs nowhere" in whereabouts(ended).sentence


async def test_7_a_cancel_of_a_start_that_is_being_checked_waits_for_its_first_moment(driving: Driving) -> None:
    driving.directory.held = asyncio.Event()
    starting = asyncio.create_task(driving.migrations.start(ID, SPEC))
    await until(lambda: driving.directory.asked)
    cancelling = asyncio.create_task(driving.migrations.cancel(ID))
    await asyncio.sleep(0)
    driving.directory.held.set()
    assert (await cancelling).HasField("cancel_time")
    assert (await starting).HasField("cancel_time")
    assert (await driving.ended(ID)).state == pb.MIGRATION_STATE_CANCELLED
    assert driving.pair.source.calls == []


async def test_7_a_waiting_migration_whose_hosts_are_away_is_not_in_doubt_in_a_later_life(driving: Driving) -> None:
    await waiting(driving)
    driving.pair.to_source.cut = driving.pair.to_destination.cut = True
    await driving.restart()
    assert driving.migrations.collection.get(ID).migration.state == pb.MIGRATION_STATE_PENDING
    error = await fails(driving.migrations.resolve(ID, statement("h1")), Reason.NOT_IN_DOUBT)
    assert "cancel it instead" in error.message


async def test_7_that_the_slot_was_taken_is_saved_before_the_guest_is_touched(driving: Driving) -> None:
    held: list[bool] = []
    driving.pair.to_source.on_call = lambda call: held.append(
        pb.Migration.FromString(driving.log.rows[ID][0]).HasField("slot_duration") if call == "begin" else True
    )
    await waiting(driving)
    driving.pair.destination.room(1)
    assert (await driving.ended(ID)).state == pb.MIGRATION_STATE_SUCCEEDED
    assert all(held)


async def test_7_a_guest_that_was_stopped_before_begin_is_not_shown_as_running(driving: Driving) -> None:
    driving.pair.to_source.refuse["begin"] = [DroverError(Reason.DOMAIN_NOT_RUNNING, "guest web1 on h1 is shutoff")]
    await driving.migrations.start(ID, SPEC)
    ended = await driving.ended(ID)
    assert (ended.failure.reason, ended.runs_on) == (Reason.DOMAIN_NOT_RUNNING, "")


async def test_7_a_waiting_migration_that_another_driver_has_moved_succeeds(driving: Driving) -> None:
    """The process is killed while it waits; the source's agent moves the guest under the same id meanwhile."""
    pair, other = driving.pair, Driving(driving.pair)
    await waiting(driving)
    await driving.migrations.close()
    pair.destination.room(2)
    await other.migrations.start(ID, SPEC)
    assert (await other.ended(ID)).state == pb.MIGRATION_STATE_SUCCEEDED
    await driving.restart()
    ended = await driving.ended(ID)
    assert (ended.state, ended.runs_on) == (pb.MIGRATION_STATE_SUCCEEDED, "h2")
    await other.close()
