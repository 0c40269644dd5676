"""agent.migration.migrations: start, get, list, watch, cancel."""

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

import agent.migration.driving
from agent.migration.collection import KEEP
from agent.runtime.errors import DroverError, Reason
from drover.agent.v1 import migration_pb2 as pb
from drover.agent.v1 import options_pb2
from tests.unit.asking import ID, PATIENCE, fails, until
from tests.unit.fake_directory import Driving
from tests.unit.fake_hypervisor import UUID
from tests.unit.two_agents import JOURNAL_DOWN

SPEC = pb.MigrationSpec(domain="web1", destination_host="h2")
OTHER_SPEC = pb.MigrationSpec(domain="web1", destination_host="h2", bandwidth_bytes_per_second=5)


async def flowing(driving: Driving) -> pb.Migration:
    """A migration whose memory flows until the test ends it."""
    driving.pair.wire.all_sent.clear()
    await driving.migrations.start(ID, SPEC)
    await driving.pair.are("performing", "armed")
    return await driving.reaches(ID, pb.MIGRATION_STATE_ACTIVE)


# --- start ------------------------------------------------------------------------------------------------------------


async def test_from_accepted_to_succeeded(driving: Driving) -> None:
    accepted = await driving.migrations.start(ID, SPEC)
    assert (accepted.state, accepted.runs_on, accepted.driver) == (pb.MIGRATION_STATE_PENDING, "h1", "h1")
    assert (accepted.source_host, accepted.destination_host) == ("h1", "h2")
    assert (accepted.domain_name, accepted.domain_uuid, accepted.network) == ("web1", UUID, "mig")
    ended = await driving.ended(ID)
    driving.pair.moved()
    assert (ended.state, ended.runs_on, ended.phase) == (pb.MIGRATION_STATE_SUCCEEDED, "h2", "")
    assert ended.uri == "tcp://127.92.0.2:49152"
    assert not ended.HasField("failure")
    assert ended.HasField("commit_time")
    assert ended.end_time.ToNanoseconds() >= ended.commit_time.ToNanoseconds() >= ended.create_time.ToNanoseconds()
    assert [t.phase for t in ended.timings] == ["plan", "reserve", "begin", "prepare", "perform", "finish", "confirm"]
    assert 0 < ended.hypervisor_duration.ToNanoseconds() <= ended.duration.ToNanoseconds()
    await until(lambda: driving.log.rows[ID] == (ended.SerializeToString(), True))


async def test_the_end_is_written_down_as_it_was_told(driving: Driving) -> None:
    """The wait is shown while it lasts, and not once the migration has ended."""
    driving.pair.to_source.lose_answer["confirm"] = 1
    await driving.migrations.start(ID, SPEC)
    ended = await driving.ended(ID)
    assert ended.state == pb.MIGRATION_STATE_SUCCEEDED
    assert not ended.silent_hosts
    assert not ended.waiting_for


async def test_the_same_id_again_is_the_same_migration(driving: Driving) -> None:
    first = await flowing(driving)
    again = await driving.migrations.start(ID, SPEC)
    assert again.migration_id == first.migration_id
    assert driving.pair.to_destination.count["reserve_slot"] == 1
    driving.pair.wire.all_sent.set()
    await driving.ended(ID)
    assert (await driving.migrations.start(ID, SPEC)).state == pb.MIGRATION_STATE_SUCCEEDED


async def test_the_same_id_for_another_spec_is_refused(driving: Driving) -> None:
    await flowing(driving)
    await fails(driving.migrations.start(ID, OTHER_SPEC), Reason.MIGRATION_EXISTS)
    assert driving.migrations.collection.get(ID).migration.spec == SPEC


async def test_two_callers_start_it_once(driving: Driving) -> None:
    one, two = await asyncio.gather(*(driving.migrations.start(ID, SPEC) for _ in range(2)))
    assert one == two
    await driving.ended(ID)
    driving.pair.moved()
    assert driving.pair.to_destination.count["reserve_slot"] == 1


async def test_the_same_id_for_another_spec_while_the_first_is_being_started(driving: Driving) -> None:
    driving.directory.held = asyncio.Event()
    first = asyncio.create_task(driving.migrations.start(ID, SPEC))
    await until(lambda: driving.directory.asked)
    second = asyncio.create_task(driving.migrations.start(ID, OTHER_SPEC))
    await asyncio.sleep(0)
    driving.directory.held.set()
    try:
        await fails(second, Reason.MIGRATION_EXISTS)
    finally:
        await first


async def test_a_caller_that_goes_away_does_not_stop_the_start(driving: Driving) -> None:
    driving.directory.held = asyncio.Event()
    leaving = asyncio.create_task(driving.migrations.start(ID, SPEC))
    await until(lambda: driving.directory.asked)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    driving.directory.held.set()
    await until(lambda: driving.migrations.collection.list(active_only=False))
    assert (await driving.ended(ID)).state == pb.MIGRATION_STATE_SUCCEEDED


def no_cpu(driving: Driving) -> None:
    driving.pair.destination.hypervisor.problems = ["no such CPU"]


def no_room(driving: Driving) -> None:
    driving.pair.destination.room(0)


def not_there(driving: Driving) -> None:
    driving.pair.source.hypervisor.domains.clear()


def unreachable(driving: Driving) -> None:
    driving.pair.to_destination.cut = True


def unknown(driving: Driving) -> None:
    driving.directory.fails = [DroverError(Reason.HOST_NOT_FOUND, "no such host")]


def stopping(driving: Driving) -> None:
    driving.migrations.runner.draining = True


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (no_cpu, Reason.INCOMPATIBLE_GUEST),
        (no_room, Reason.BUSY),
        (not_there, Reason.DOMAIN_NOT_FOUND),
        (unreachable, Reason.HOST_UNREACHABLE),
        (unknown, Reason.HOST_NOT_FOUND),
        (stopping, Reason.DRAINING),
    ],
)
async def test_a_refusal_leaves_nothing(driving: Driving, prepare: Callable[[Driving], None], reason: Reason) -> None:
    prepare(driving)
    await fails(driving.migrations.start(ID, SPEC), reason)
    assert driving.migrations.collection.list(active_only=False) == []
    assert driving.log.rows == {}
    assert driving.pair.source.calls == driving.pair.destination.calls == []
    assert driving.pair.destination.engine.active() == []
    with pytest.raises(DroverError, match="knows no migration"):
        driving.migrations.collection.get(ID)
    async with asyncio.timeout(PATIENCE):
        assert await driving.migrations.idle(0.5)


async def test_an_option_that_cannot_be_honoured_is_refused_before_any_host_is_called(driving: Driving) -> None:
    spec = pb.MigrationSpec(domain="web1", destination_host="h2", options=options_pb2.Options(rdma=True))
    error = await fails(driving.migrations.start(ID, spec), Reason.OPTION_UNSUPPORTED)
    assert error.metadata["option"] == "rdma"
    assert not driving.pair.to_destination.count


async def test_6_6_what_cannot_be_written_down_is_not_accepted(driving: Driving) -> None:
    """No host was called, and the same request can be made again."""
    driving.log.fails = [JOURNAL_DOWN]
    await fails(driving.migrations.start(ID, SPEC), Reason.JOURNAL_UNAVAILABLE)
    assert driving.migrations.collection.list(active_only=False) == []
    assert driving.pair.source.calls == driving.pair.destination.calls == []
    await driving.migrations.start(ID, SPEC)
    assert (await driving.ended(ID)).state == pb.MIGRATION_STATE_SUCCEEDED
    assert [a.record.migration_id for a in driving.pair.destination.engine.active()] == []


async def test_an_end_that_cannot_be_written_down_is_told_all_the_same(driving: Driving) -> None:
    """The next life learns it from the records again."""
    driving.pair.wire.all_sent.clear()
    await driving.migrations.start(ID, SPEC)
    driving.log.fails = [JOURNAL_DOWN]
    driving.pair.wire.all_sent.set()
    assert (await driving.ended(ID)).state == pb.MIGRATION_STATE_SUCCEEDED
    await driving.migrations.idle(1)
    await driving.restart()
    assert (await driving.ended(ID)).state == pb.MIGRATION_STATE_SUCCEEDED


# --- cancel -----------------------------------------------------------------------------------------------------------


async def test_cancel_keeps_the_guest_and_says_so(driving: Driving) -> None:
    await flowing(driving)
    assert (await driving.migrations.cancel(ID)).state == pb.MIGRATION_STATE_CANCELLING
    ended = await driving.ended(ID)
    driving.pair.stayed()
    assert (ended.state, ended.runs_on) == (pb.MIGRATION_STATE_CANCELLED, "h1")
    assert ended.failure.reason == Reason.CANCELLED
    assert (await driving.migrations.cancel(ID)) == ended  # again is no error


async def test_cancel_that_comes_too_late_is_a_success(driving: Driving) -> None:
    driving.pair.to_source.hang = {"confirm"}
    await driving.migrations.start(ID, SPEC)
    await until(lambda: driving.pair.to_source.count["confirm"])
    await driving.migrations.cancel(ID)
    await driving.restart()
    driving.pair.to_source.hang.clear()
    ended = await driving.ended(ID)
    assert (ended.state, ended.runs_on) == (pb.MIGRATION_STATE_SUCCEEDED, "h2")
    assert not ended.HasField("failure")


async def test_a_migration_that_failed_by_itself_is_not_called_cancelled(driving: Driving) -> None:
    await flowing(driving)
    driving.pair.wire.broken.set()
    ended = await driving.ended(ID)
    driving.pair.stayed()
    assert (ended.state, ended.failure.reason) == (pb.MIGRATION_STATE_FAILED, Reason.TRANSFER_FAILED)


@pytest.mark.parametrize("side", ["source", "destination"])
async def test_an_agent_that_is_restarted_does_not_count_as_a_cancel(driving: Driving, side: str) -> None:
    held = driving.pair.destination.hypervisor.held["prepare"] = asyncio.Event()
    await driving.migrations.start(ID, SPEC)
    await driving.pair.are("begun", "preparing")
    await (driving.pair.source if side == "source" else driving.pair.destination).restart()
    held.set()
    ended = await driving.ended(ID)
    assert driving.pair.runs_on == ["h1"]
    assert ended.state == pb.MIGRATION_STATE_FAILED
    assert ended.failure.reason != Reason.CANCELLED


# --- watch and list ---------------------------------------------------------------------------------------------------


async def test_a_watch_says_at_once_how_it_is_and_ends_with_it(driving: Driving) -> None:
    now = await flowing(driving)
    seen: list[pb.Migration] = []

    async def read(from_revision: int) -> None:
        async for migration in driving.migrations.collection.watch(ID, from_revision):
            seen.append(migration)  # noqa: PERF401 - one at a time

    watching = asyncio.create_task(read(now.revision + 1_000_000))
    await until(lambda: seen)
    assert seen[0].state == pb.MIGRATION_STATE_ACTIVE
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    seen.clear()
    watching = asyncio.create_task(read(0))
    await until(lambda: seen)
    driving.pair.wire.all_sent.set()
    await asyncio.wait_for(watching, PATIENCE)
    revisions = [migration.revision for migration in seen]
    assert revisions == sorted(set(revisions))
    assert seen[-1].state == pb.MIGRATION_STATE_SUCCEEDED
    seen.clear()
    await asyncio.wait_for(read(revisions[-1]), PATIENCE)  # of one that has ended: its last word, and the end
    assert [migration.state for migration in seen] == [pb.MIGRATION_STATE_SUCCEEDED]


async def test_a_slow_reader_misses_what_was_in_between_never_the_end(driving: Driving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent.migration.driving, "REPORT_AFTER_SECONDS", 0)
    await flowing(driving)
    slow, quick = driving.migrations.collection.watch(ID, 0), driving.migrations.collection.watch(ID, 0)
    first = await anext(slow)
    reading = asyncio.create_task(_all(quick))
    driving.pair.wire.all_sent.set()
    await driving.ended(ID)
    rest = await _all(slow)
    assert first.state == pb.MIGRATION_STATE_ACTIVE
    assert [migration.state for migration in rest] == [pb.MIGRATION_STATE_SUCCEEDED]
    assert len(await reading) > 3


async def _all(watch: AsyncIterator[pb.Migration]) -> list[pb.Migration]:
    return [migration async for migration in watch]


async def test_a_watch_that_knows_a_revision_of_an_earlier_life_sees_the_end(driving: Driving) -> None:
    """Revisions are saved at the start and the end only, so a new life may count from a lower one than a reader has seen."""
    seen = (await flowing(driving)).revision
    await driving.restart()
    await until(lambda: driving.directory.asked > 1)
    reading = driving.migrations.collection.watch(ID, seen + 1000)
    assert (await anext(reading)).migration_id == ID
    driving.pair.wire.all_sent.set()
    rest = [migration async for migration in reading]
    assert rest
    assert rest[-1].state == pb.MIGRATION_STATE_SUCCEEDED


async def test_list_has_the_newest_first_and_bounds(driving: Driving) -> None:
    for number in range(KEEP + 5):
        migration = pb.Migration(migration_id=f"m{number}", state=pb.MIGRATION_STATE_SUCCEEDED, revision=number + 1)
        migration.create_time.FromSeconds(number + 1)
        await driving.log.save(migration.migration_id, migration.SerializeToString(), ended=True)
    await driving.restart()
    listed = [migration.migration_id for migration in driving.migrations.collection.list(active_only=False)]
    assert listed == [f"m{number}" for number in range(KEEP + 4, -1, -1)]
    assert driving.migrations.collection.list(active_only=True) == []
    await driving.migrations.start(ID, SPEC)
    kept = driving.migrations.collection.list(active_only=False)
    assert len(kept) == KEEP
    assert kept[0].migration_id == ID
    assert "m0" not in {migration.migration_id for migration in kept}
    with pytest.raises(DroverError, match="knows no migration"):
        driving.migrations.collection.get("m0")


async def test_idle_waits_for_the_end(driving: Driving) -> None:
    await flowing(driving)
    assert not await driving.migrations.idle(0.02)
    waiting = asyncio.create_task(driving.migrations.idle(3))
    driving.pair.wire.all_sent.set()
    assert await waiting
    assert driving.migrations.collection.get(ID).migration.state == pb.MIGRATION_STATE_SUCCEEDED


async def test_close_leaves_no_start_behind(driving: Driving) -> None:
    driving.directory.held = asyncio.Event()
    starting = asyncio.create_task(driving.migrations.start(ID, SPEC))
    await until(lambda: driving.directory.asked)
    await driving.migrations.close()
    driving.directory.held.set()
    await asyncio.wait({starting}, timeout=PATIENCE)
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("drive")]
    assert driving.pair.source.effects == []


async def test_6_36_two_coordinators_move_a_guest_once(driving: Driving) -> None:
    """The other one gets DOMAIN_BUSY, in whichever order they come; the same id is the same migration."""
    await flowing(driving)
    other = Driving(driving.pair)
    try:
        await fails(other.migrations.start(ID.replace("6f1c", "7f1c"), SPEC), Reason.DOMAIN_BUSY)
        driving.pair.wire.all_sent.set()
        assert (await driving.ended(ID)).state == pb.MIGRATION_STATE_SUCCEEDED
    finally:
        await other.close()
    driving.pair.moved()
