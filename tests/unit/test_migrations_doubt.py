"""agent.migration.migrations: restarts of the driving process, unknown outcomes, and who may end them."""

import asyncio
from pathlib import Path

import pytest

from agent.migration.fencing import FencingConfig
from agent.runtime.errors import DroverError, Reason
from drover.agent.v1 import handshake_pb2
from drover.agent.v1 import migration_pb2 as pb
from tests.unit.asking import ID, fails, statement, until
from tests.unit.fake_directory import Driving
from tests.unit.two_agents import JOURNAL_DOWN, Line, Pair

SPEC = pb.MigrationSpec(domain="web1", destination_host="h2")


async def flowing(driving: Driving) -> None:
    driving.pair.wire.all_sent.clear()
    await driving.migrations.start(ID, SPEC)
    await driving.pair.are("performing", "armed")


async def in_doubt(driving: Driving) -> pb.Migration:
    """h1 has sent everything, and h2 is silent."""
    pair = driving.pair
    await flowing(driving)
    pair.wire.starts.clear()
    pair.to_destination.cut = True
    pair.wire.all_sent.set()
    return await driving.reaches(ID, pb.MIGRATION_STATE_OUTCOME_UNKNOWN)


# --- another life -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["begin", "prepare", "perform", "finish", "confirm"])
@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_restart_at_each_call_goes_on(driving: Driving, call: str, when: str) -> None:
    """The process dies as it makes a call, or as the answer arrives; its next life goes on from the records."""
    pair = driving.pair
    line = pair.to_source if call in ("begin", "perform", "confirm") else pair.to_destination
    if when == "before":
        line.hang = {call}
    else:
        line.answer[call] = lambda answer: asyncio.current_task().cancel() or answer  # type: ignore[union-attr]
    await driving.migrations.start(ID, SPEC)
    await until(lambda: line.count[call])
    await asyncio.sleep(0.01)
    line.hang.clear()
    line.answer.clear()
    await driving.restart()
    ended = await driving.ended(ID)
    assert (ended.state, ended.runs_on) == (pb.MIGRATION_STATE_SUCCEEDED, "h2")
    pair.moved()


async def test_6_6_an_answer_is_given_once_the_migration_is_written_down(driving: Driving) -> None:
    driving.log.held = asyncio.Event()
    starting = asyncio.create_task(driving.migrations.start(ID, SPEC))
    await driving.log.waiting.wait()
    assert not starting.done()
    assert driving.pair.source.calls == [], "the guest is not touched before it is durable"
    driving.log.held.set()
    await starting
    assert ID in driving.log.rows


async def test_6_6_a_life_that_died_before_a_start_was_durable_leaves_nothing(driving: Driving) -> None:
    driving.log.held = asyncio.Event()
    starting = asyncio.create_task(driving.migrations.start(ID, SPEC))
    await driving.log.waiting.wait()
    await driving.restart()
    await asyncio.gather(starting, return_exceptions=True)
    with pytest.raises(DroverError, match="knows no migration"):
        driving.migrations.collection.get(ID)
    assert driving.pair.source.calls == []
    assert driving.pair.states == ("", "")


async def test_what_has_ended_stays_ended_over_a_restart(driving: Driving) -> None:
    await driving.migrations.start(ID, SPEC)
    ended = await driving.ended(ID)
    await until(lambda: driving.log.rows[ID][1])
    asked = driving.directory.asked
    await driving.restart()
    assert driving.migrations.collection.get(ID).migration == ended
    assert driving.directory.asked == asked
    assert await driving.migrations.idle(0.1)


async def test_a_directory_that_does_not_know_yet_is_asked_again(driving: Driving) -> None:
    await flowing(driving)
    driving.directory.fails = [DroverError(Reason.HOST_NOT_FOUND, "not registered yet")]
    driving.pair.wire.all_sent.set()
    await driving.restart()
    ended = await driving.ended(ID)
    assert ended.state == pb.MIGRATION_STATE_SUCCEEDED


async def test_a_cancel_while_it_is_being_taken_up_again_is_not_lost(driving: Driving) -> None:
    await flowing(driving)
    driving.directory.held = asyncio.Event()
    await driving.restart()
    await driving.migrations.cancel(ID)
    driving.directory.held.set()
    ended = await driving.ended(ID)
    assert ended.state == pb.MIGRATION_STATE_CANCELLED


@pytest.mark.parametrize("both", [False, True])
async def test_after_a_restart_a_silent_host_is_in_doubt_as_before(driving: Driving, both: bool) -> None:
    await in_doubt(driving)
    driving.pair.to_source.cut = both
    await driving.restart()
    again = await driving.reaches(ID, pb.MIGRATION_STATE_OUTCOME_UNKNOWN)
    assert sorted(again.silent_hosts) == (["h1", "h2"] if both else ["h2"])


async def test_6_6_an_acknowledged_cancel_survives_a_restart_before_an_agent_heard_it(driving: Driving) -> None:
    await flowing(driving)
    driving.pair.to_source.cut = True
    acknowledged = await driving.migrations.cancel(ID)
    assert acknowledged.state == pb.MIGRATION_STATE_CANCELLING
    await driving.restart()
    driving.pair.to_source.cut = False
    ended = await driving.ended(ID)
    assert (ended.state, ended.failure.reason, ended.runs_on) == (pb.MIGRATION_STATE_CANCELLED, Reason.CANCELLED, "h1")
    driving.pair.stayed()


async def test_6_6_a_cancel_that_cannot_be_written_down_is_carried_out_and_not_acknowledged(driving: Driving) -> None:
    await flowing(driving)
    driving.log.fails = [JOURNAL_DOWN]
    await fails(driving.migrations.cancel(ID), Reason.JOURNAL_UNAVAILABLE)
    assert (await driving.ended(ID)).state == pb.MIGRATION_STATE_CANCELLED


async def test_6_6_an_acknowledged_statement_survives_a_restart_before_an_agent_heard_it(driving: Driving) -> None:
    await in_doubt(driving)
    driving.pair.to_source.cut = True
    await driving.migrations.resolve(ID, statement("h2"))
    await driving.restart()
    assert [said.dead_host for said in driving.migrations.collection.get(ID).migration.statements] == ["h2"]
    driving.pair.to_source.cut = False
    ended = await driving.ended(ID)
    assert (ended.failure.reason, ended.runs_on) == (Reason.DECLARED_DEAD, "h1")
    assert driving.pair.runs_on == ["h1"]


async def test_6_6_statements_about_both_hosts_survive_a_restart(driving: Driving) -> None:
    await in_doubt(driving)
    driving.pair.to_source.cut = True
    for host in ("h2", "h1"):
        await driving.migrations.resolve(ID, statement(host))
    ended = await driving.ended(ID)
    assert (ended.state, ended.runs_on) == (pb.MIGRATION_STATE_FAILED, "")
    saved = pb.Migration.FromString(driving.log.rows[ID][0])
    assert sorted(said.dead_host for said in saved.statements) == ["h1", "h2"]


async def test_6_6_a_statement_that_was_refuted_does_not_count_after_a_restart(driving: Driving) -> None:
    await in_doubt(driving)
    driving.pair.to_source.cut = True
    await driving.migrations.resolve(ID, statement("h2"))
    driving.pair.to_destination.cut = False
    await driving.restart()
    await until(lambda: not pb.Migration.FromString(driving.log.rows[ID][0]).statements)
    driving.pair.to_destination.cut = True
    await driving.restart()
    await until(lambda: len(driving.migrations.collection.get(ID).migration.silent_hosts) == 2)
    driving.pair.to_source.cut = False
    await driving.reaches(ID, pb.MIGRATION_STATE_OUTCOME_UNKNOWN)
    assert driving.pair.runs_on == []


async def test_6_6_a_statement_that_cannot_be_written_down_changes_nothing(driving: Driving) -> None:
    before = await in_doubt(driving)
    driving.log.fails = [JOURNAL_DOWN]
    await fails(driving.migrations.resolve(ID, statement("h2")), Reason.JOURNAL_UNAVAILABLE)
    after = driving.migrations.collection.get(ID).migration
    assert (after.state, list(after.statements)) == (before.state, [])
    assert driving.pair.runs_on == []


async def test_a_driver_that_is_broken_off_by_nobody_goes_on(driving: Driving) -> None:
    driving.pair.to_destination.refuse["finish"] = [asyncio.CancelledError()]  # type: ignore[list-item]
    await driving.migrations.start(ID, SPEC)
    ended = await driving.ended(ID)
    assert ended.state == pb.MIGRATION_STATE_SUCCEEDED
    driving.pair.moved()


# --- in doubt ---------------------------------------------------------------------------------------------------------


async def test_the_outcome_is_unknown_and_known_again(driving: Driving) -> None:
    unknown = await in_doubt(driving)
    assert unknown.failure.reason == Reason.OUTCOME_UNKNOWN
    assert list(unknown.silent_hosts) == ["h2"]
    assert unknown.runs_on == ""
    for needed in ("h1 last reported that the guest is paused (migration) there", f"drover migration resolve {ID} --assume-dead h2"):
        assert needed in unknown.failure.message
    driving.pair.to_destination.cut = False
    driving.pair.wire.starts.set()
    ended = await driving.ended(ID)
    assert ended.state == pb.MIGRATION_STATE_SUCCEEDED
    assert not ended.HasField("failure")
    assert not ended.silent_hosts


async def test_the_word_of_an_operator_ends_it_and_is_kept(driving: Driving) -> None:
    await in_doubt(driving)
    said = statement("h2")
    said.ClearField("say_time")
    await driving.migrations.resolve(ID, said)
    ended = await driving.ended(ID)
    assert (ended.state, ended.runs_on) == (pb.MIGRATION_STATE_FAILED, "h1")
    assert ended.failure.reason == Reason.DECLARED_DEAD
    assert (ended.statement.dead_host, ended.statement.said_by) == ("h2", "root@admin1")
    assert ended.statement.HasField("say_time")
    assert (await driving.pair.source.record()).statement.said_by == "root@admin1"
    assert driving.pair.runs_on == ["h1"]


async def test_only_a_host_that_takes_part_and_is_silent_can_be_declared_dead(driving: Driving) -> None:
    await flowing(driving)
    for host, reason in (("h3", Reason.HOST_NOT_FOUND), ("h1", Reason.NOT_IN_DOUBT), ("h2", Reason.NOT_IN_DOUBT)):
        await fails(driving.migrations.resolve(ID, statement(host)), reason)
    driving.pair.wire.all_sent.set()
    ended = await driving.ended(ID)
    await fails(driving.migrations.resolve(ID, statement("h2")), Reason.NOT_IN_DOUBT)
    await fails(driving.migrations.resolve("another", statement("h2")), Reason.MIGRATION_NOT_FOUND)
    assert driving.migrations.collection.get(ID).migration == ended


async def test_6_19_a_host_is_asked_before_it_is_said_to_answer(driving: Driving) -> None:
    """The driver has not noticed yet that the host does not answer."""
    await flowing(driving)
    driving.pair.to_destination.cut = True
    assert not driving.migrations.collection.get(ID).migration.silent_hosts
    resolved = await driving.migrations.resolve(ID, statement("h2"))
    assert [said.dead_host for said in resolved.statements] == ["h2"]


async def test_6_19_a_host_is_asked_before_it_is_taken_for_dead(driving: Driving) -> None:
    """The driver has not noticed yet that the host answers again."""
    await in_doubt(driving)
    driving.pair.to_destination.cut = False
    assert list(driving.migrations.collection.get(ID).migration.silent_hosts) == ["h2"]
    await fails(driving.migrations.resolve(ID, statement("h2")), Reason.NOT_IN_DOUBT)
    driving.pair.wire.starts.set()
    assert (await driving.ended(ID)).state == pb.MIGRATION_STATE_SUCCEEDED


async def test_6_19_a_host_that_answers_with_an_error_answers(driving: Driving) -> None:
    await in_doubt(driving)
    driving.pair.to_destination.refuse["get_record"] = [JOURNAL_DOWN] * 1000  # its driver asks too
    await fails(driving.migrations.resolve(ID, statement("h2")), Reason.NOT_IN_DOUBT)


async def test_6_19_a_migration_that_is_being_taken_up_again_says_so(driving: Driving) -> None:
    await in_doubt(driving)
    driving.directory.held = asyncio.Event()
    await driving.restart()
    error = await fails(driving.migrations.resolve(ID, statement("h2")), Reason.NOT_IN_DOUBT)
    assert "was not asked yet" in error.message
    driving.directory.held.set()


async def test_records_that_contradict_each_other_stop_it_for_good(driving: Driving) -> None:
    await flowing(driving)

    def lie(answer: handshake_pb2.FinishResponse) -> handshake_pb2.FinishResponse:
        answer.record.state = handshake_pb2.RECORD_STATE_RUNNING
        answer.record.revision += 100
        return answer

    driving.pair.to_destination.answer["finish"] = lie
    driving.pair.to_source.answer["confirm"] = kept
    stopped = await driving.reaches(ID, pb.MIGRATION_STATE_OUTCOME_UNKNOWN)
    assert stopped.failure.reason == Reason.INTERNAL
    assert "contradict" in stopped.failure.message
    driving.pair.wire.all_sent.set()

    def calls() -> dict[str, int]:
        """The driver's: the agents watch each other's records, too."""
        made = driving.pair.to_source.count + driving.pair.to_destination.count
        return {call: count for call, count in made.items() if call != "watch_record"}

    before = calls()
    after = await driving.migrations.cancel(ID)
    await asyncio.sleep(0.05)
    assert calls() == before
    assert after.state == pb.MIGRATION_STATE_OUTCOME_UNKNOWN
    assert after.failure.reason == Reason.INTERNAL


def kept(answer: handshake_pb2.ConfirmResponse) -> handshake_pb2.ConfirmResponse:
    answer.record.state = handshake_pb2.RECORD_STATE_KEPT
    answer.record.revision += 100
    return answer


# --- fencing ----------------------------------------------------------------------------------------------------------


class Fence:
    """A fencing command that counts its runs, and ends as the test sets it."""

    def __init__(self, path: Path, status: int = 0) -> None:
        self.log = path / "log"
        self.status = path / "status"
        self.status.write_text(str(status))
        self.command = ("/bin/sh", "-c", 'echo "$2" >> "$0/log"; echo pulled; exit $(cat "$0/status")', str(path), "--force")

    @property
    def runs(self) -> list[str]:
        return self.log.read_text().split() if self.log.exists() else []


async def fenced_pair(pair: Pair, fence: Fence, after: float = 0.05) -> Driving:
    return Driving(pair, FencingConfig(command=fence.command, after_seconds=after, timeout_seconds=5))


async def test_a_fenced_host_is_dead_by_the_word_of_the_command(pair: Pair, tmp_path: Path) -> None:
    fence = Fence(tmp_path)
    driving = await fenced_pair(pair, fence)
    try:
        await in_doubt(driving)
        ended = await driving.ended(ID)
    finally:
        await driving.close()
    assert fence.runs == ["h2"]
    assert (ended.statement.said_by, ended.statement.dead_host) == ("fencing command", "h2")
    assert "pulled" in ended.statement.reason
    assert pair.runs_on == ["h1"]
    assert (ended.state, ended.failure.reason) == (pb.MIGRATION_STATE_FAILED, Reason.DECLARED_DEAD)


async def test_a_command_that_fails_changes_nothing_and_is_run_again(pair: Pair, tmp_path: Path) -> None:
    fence = Fence(tmp_path, status=1)
    driving = await fenced_pair(pair, fence)
    try:
        await in_doubt(driving)
        await until(lambda: len(fence.runs) >= 2)
        assert driving.migrations.collection.get(ID).migration.state == pb.MIGRATION_STATE_OUTCOME_UNKNOWN
        assert pair.runs_on == []
        assert pair.states[0] == "performed"
        fence.status.write_text("0")
        ended = await driving.ended(ID)
    finally:
        await driving.close()
    assert ended.failure.reason == Reason.DECLARED_DEAD


async def test_a_host_that_answers_in_time_is_not_fenced(pair: Pair, tmp_path: Path) -> None:
    fence = Fence(tmp_path)
    driving = await fenced_pair(pair, fence, after=1.5)
    try:
        await in_doubt(driving)
        pair.to_destination.cut = False
        pair.wire.starts.set()
        assert (await driving.ended(ID)).state == pb.MIGRATION_STATE_SUCCEEDED
        await asyncio.sleep(1.6)
    finally:
        await driving.close()
    assert fence.runs == []


async def test_nobody_is_fenced_while_both_hosts_are_silent(pair: Pair, tmp_path: Path) -> None:
    """Most likely the driver is cut off, and the guest may run on."""
    fence = Fence(tmp_path)
    driving = await fenced_pair(pair, fence)
    try:
        await flowing(driving)
        pair.to_source.cut = pair.to_destination.cut = True
        await driving.reaches(ID, pb.MIGRATION_STATE_OUTCOME_UNKNOWN)
        await asyncio.sleep(0.3)
        assert fence.runs == []
        pair.to_source.cut = pair.to_destination.cut = False
        pair.wire.all_sent.set()
        assert (await driving.ended(ID)).state == pb.MIGRATION_STATE_SUCCEEDED
    finally:
        await driving.close()


async def test_a_host_is_fenced_only_after_it_was_silent_for_the_whole_time(pair: Pair, tmp_path: Path) -> None:
    """It was silent, answered, and is silent again: the time counts from the last silence."""
    fence = Fence(tmp_path)
    driving = await fenced_pair(pair, fence, after=2)
    try:
        await in_doubt(driving)
        await asyncio.sleep(1)
        pair.to_destination.cut = False
        await until(lambda: driving.migrations.collection.get(ID).migration.state != pb.MIGRATION_STATE_OUTCOME_UNKNOWN)
        pair.to_destination.cut = True
        await driving.reaches(ID, pb.MIGRATION_STATE_OUTCOME_UNKNOWN)
        await asyncio.sleep(1.4)
        assert fence.runs == []
    finally:
        await driving.close()


async def test_nothing_is_fenced_without_the_configuration_or_once_closed(driving: Driving, pair: Pair, tmp_path: Path) -> None:
    fence = Fence(tmp_path)
    other = await fenced_pair(pair, fence, after=1)
    await in_doubt(other)
    await other.close()
    await driving.restart()
    await asyncio.sleep(1.1)
    assert fence.runs == []


async def test_6_13_a_host_that_the_other_one_hears_is_not_declared_dead(driving: Driving) -> None:
    """This driver is cut off, and the error of the statement says so."""
    pair = driving.pair
    pair.source.other_side = Line(pair.destination)
    pair.wire.all_sent.clear()
    await driving.migrations.start(ID, SPEC)
    await pair.are("performing", "armed")
    pair.wire.starts.clear()
    pair.to_destination.cut = True
    pair.wire.all_sent.set()
    await driving.reaches(ID, pb.MIGRATION_STATE_OUTCOME_UNKNOWN)
    error = await fails(driving.migrations.resolve(ID, statement("h2")), Reason.NOT_IN_DOUBT)
    assert "it answers the other host of the migration" in error.message
    pair.wire.starts.set()
    ended = await driving.ended(ID)
    assert (ended.state, ended.runs_on) == (pb.MIGRATION_STATE_SUCCEEDED, "h2")
