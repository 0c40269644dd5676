"""agent.migration.progress: the description of a migration from what its driver knows."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.handshake.drive.view import View
from agent.handshake.machines.destination import DestinationState as Dst
from agent.handshake.machines.source import SourceState as Src
from agent.hypervisor.guest_fact import GuestFact, GuestState, fact_to_proto
from agent.migration.progress import describe, impossible, phase, union, with_eta
from agent.runtime.errors import Reason
from agent.runtime.events import Bus
from agent.runtime.failure import Failure, failure_to_proto
from agent.runtime.wire import duration, timestamp
from drover.agent.v1 import handshake_pb2
from drover.agent.v1 import migration_pb2 as pb
from tests.unit.asking import CANCELLED, REF, statement

BEFORE = pb.Migration(
    migration_id="m1",
    source_host="h1",
    destination_host="h2",
    runs_on="h1",
    source_guest=handshake_pb2.GuestFact(state=handshake_pb2.GUEST_STATE_RUNNING),
    state=pb.MIGRATION_STATE_PENDING,
    create_time=timestamp(1000.0),
)


def knows(src: Src | None, dst: Dst | None, *silent: str, **records: Any) -> View:
    view = View(REF, None, lambda: None, Bus())
    for side, state in (("source", src), ("destination", dst)):
        if state is not None:
            wire = handshake_pb2.RecordState.Value(f"RECORD_STATE_{state.upper()}")
            setattr(view, f"{side}_record", handshake_pb2.Record(ref=REF, state=wire, **records))
    view.silent_since = dict.fromkeys(silent, 1.0)
    return view


def seen(view: View, before: pb.Migration = BEFORE, *, ended: bool = False) -> pb.Migration:
    return describe(before, view, 10.0, ended=ended)


def test_what_to_do_about_a_host_that_was_not_dead() -> None:
    view = says(knows(Src.KEPT, Dst.RUNNING), _RUNS, _RUNS)
    assert view.source_record is not None
    view.source_record.statement.CopyFrom(statement("h2"))
    told = seen(view)
    assert (told.runs_on, told.HasField("commit_time")) == ("h1", False)
    for needed in ("h2 to give up its copy", "goes on at h1", "asks again within half a minute", "drover migration watch m1"):
        assert needed in told.waiting_for


# --- state, phase and place -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("src", "dst", "expected"),
    [
        (None, None, "reserve"),
        (None, Dst.RESERVED, "begin"),
        (Src.BEGINNING, Dst.RESERVED, "begin"),
        (Src.BEGUN, Dst.RESERVED, "prepare"),
        (Src.BEGUN, Dst.PREPARING, "prepare"),
        (Src.BEGUN, Dst.PREPARED, "perform"),
        (Src.PERFORMING, Dst.PREPARED, "perform"),
        (Src.PERFORMING, Dst.ARMED, "perform"),
        (Src.PERFORMED, Dst.ARMED, "finish"),
        (Src.REMOVING, Dst.RUNNING, "confirm"),
        (Src.RESUMING, Dst.GONE, "confirm"),
        (Src.BEGUN, Dst.GONE, "confirm"),
        (Src.KEPT, Dst.ARMED, "confirm"),
    ],
)
def test_the_phase_under_way(src: Src | None, dst: Dst | None, expected: str) -> None:
    assert phase(src, dst) == expected


def test_every_pair_has_a_phase_and_a_state() -> None:
    for src in (None, *Src):
        for dst in (None, *Dst):
            assert phase(src, dst) in ("reserve", "begin", "prepare", "perform", "finish", "confirm")
            assert seen(knows(src, dst)).state in (pb.MIGRATION_STATE_PENDING, pb.MIGRATION_STATE_ACTIVE)


def says(view: View, source: GuestFact | None = None, destination: GuestFact | None = None) -> View:
    """Return the view with the last reports of both hosts' hypervisors."""
    for record, fact in ((view.source_record, source), (view.destination_record, destination)):
        if record is not None and fact is not None:
            record.guest.CopyFrom(fact_to_proto(fact))
    return view


_RUNS, _WAITS, _CRASHED = GuestFact(GuestState.RUNNING), GuestFact(GuestState.WAITING), GuestFact(GuestState.CRASHED, "crashed")
_LEFT = GuestFact(GuestState.PAUSED, "migration")


@pytest.mark.parametrize(
    ("src", "dst", "here", "there", "host"),
    [
        (None, Dst.RESERVED, None, None, "h1"),
        (Src.PERFORMING, Dst.ARMED, _RUNS, _WAITS, "h1"),
        (Src.PERFORMED, Dst.ARMED, _LEFT, _WAITS, ""),
        (Src.LOST, Dst.ARMED, _CRASHED, _WAITS, ""),
        (Src.RESUMING, Dst.GONE, _LEFT, GuestFact(GuestState.ABSENT), ""),
        (Src.KEPT, Dst.GONE, _RUNS, GuestFact(GuestState.ABSENT), "h1"),
        (Src.PERFORMING, Dst.RUNNING, _RUNS, _RUNS, "h2"),
        (Src.REMOVED, Dst.RUNNING, GuestFact(GuestState.ABSENT), _RUNS, "h2"),
        (Src.PERFORMING, Dst.RUNNING, _RUNS, None, "h2"),
    ],
)
def test_where_the_guest_runs(src: Src, dst: Dst, here: GuestFact | None, there: GuestFact | None, host: str) -> None:
    assert seen(says(knows(src, dst), here, there)).runs_on == host


def test_a_guest_does_not_run_on_a_host_that_is_dead() -> None:
    view = says(knows(Src.PERFORMING, Dst.GONE, "source"), _RUNS, GuestFact(GuestState.ABSENT))
    view.declare_dead("source", statement("h1"))
    assert seen(view, ended=True).runs_on == ""


@pytest.mark.parametrize(
    ("fact", "reason"),
    [
        (_CRASHED, Reason.GUEST_CRASHED),
        (GuestFact(GuestState.SHUTOFF, "destroyed"), Reason.DOMAIN_NOT_RUNNING),
        (GuestFact(GuestState.ABSENT), Reason.DOMAIN_NOT_FOUND),
    ],
)
def test_6_13_a_cancel_that_ends_with_the_guest_dead_says_that_it_is_dead(fact: GuestFact, reason: Reason) -> None:
    """Chaos seed 90210, round 29: the source's QEMU is killed while a cancel is under way."""
    view = says(knows(Src.KEPT, Dst.GONE, failure=failure_to_proto(CANCELLED)), fact, GuestFact(GuestState.ABSENT))
    view.cancel(CANCELLED)
    ended = seen(view, ended=True)
    assert (ended.state, ended.runs_on, ended.failure.reason) == (pb.MIGRATION_STATE_FAILED, "", reason)


def test_6_14_the_cause_comes_first_and_its_echo_second() -> None:
    """The source only knows that its stream broke; the destination has the cause, whichever record comes first."""
    view = knows(Src.KEPT, Dst.GONE)
    assert view.source_record is not None
    assert view.destination_record is not None
    echo = Failure(Reason.TRANSFER_FAILED, "h1: Broken pipe", {"host": "h1", "echo": "true"})
    cause = Failure(Reason.TRANSFER_FAILED, "h2: the QEMU of vm1 died", {"host": "h2"})
    view.source_record.failure.CopyFrom(failure_to_proto(echo))
    view.destination_record.failure.CopyFrom(failure_to_proto(cause))
    ended = seen(view, ended=True)
    assert ended.failure.message == cause.message
    assert [other.message for other in ended.other_failures] == [echo.message]
    view.destination_record.failure.CopyFrom(failure_to_proto(Failure(Reason.GIVEN_UP, "given up")))
    alone = seen(view, ended=True)
    assert (alone.failure.message, list(alone.other_failures)) == (echo.message, [])
    view.cancel(CANCELLED)
    assert seen(view, ended=True).failure.reason == Reason.CANCELLED


def test_cancelling_until_it_has_ended() -> None:
    view = knows(Src.PERFORMING, Dst.ARMED)
    view.cancel(CANCELLED)
    assert seen(view).state == pb.MIGRATION_STATE_CANCELLING


@pytest.mark.parametrize(
    ("failure", "state"),
    [
        (CANCELLED, pb.MIGRATION_STATE_CANCELLED),
        (Failure(Reason.TRANSFER_FAILED, "cut"), pb.MIGRATION_STATE_FAILED),
        (None, pb.MIGRATION_STATE_FAILED),
    ],
)
def test_an_end_without_success_keeps_its_reason(failure: Failure | None, state: pb.MigrationState.ValueType) -> None:
    view = knows(Src.KEPT, Dst.GONE)
    if failure is not None:
        view.cancel(failure)
    ended = seen(view, ended=True)
    assert (ended.state, ended.phase, ended.waiting_for) == (state, "", "")
    assert ended.failure.reason == (failure.reason if failure else "")
    assert ended.duration.ToNanoseconds() == 10 * 10**9
    assert ended.end_time.seconds == 1010


def test_a_success_has_no_failure_whatever_was_tried() -> None:
    view = knows(Src.REMOVED, Dst.RUNNING, failure=failure_to_proto(CANCELLED))
    view.cancel(CANCELLED)
    ended = seen(view, ended=True)
    assert ended.state == pb.MIGRATION_STATE_SUCCEEDED
    assert not ended.HasField("failure")
    assert ended.commit_time.seconds == 1010


def test_the_commit_is_timed_once() -> None:
    first = seen(knows(Src.PERFORMED, Dst.RUNNING))
    again = describe(first, knows(Src.REMOVED, Dst.RUNNING), 1000.0, ended=True)
    assert again.commit_time == first.commit_time


def test_the_given_migration_is_not_changed() -> None:
    before = pb.Migration()
    before.CopyFrom(BEFORE)
    view = knows(Src.PERFORMED, Dst.ARMED, "destination")
    view.waiting_for = "x" * 5000
    assert len(seen(view).waiting_for) == 1000
    assert before == BEFORE


# --- in doubt ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("silent", "src", "parts"),
    [
        (
            ("destination",),
            Src.PERFORMED,
            ("h2 does not answer", "h1 last reported that the guest is running there", "--assume-dead h2"),
        ),
        (
            ("source", "destination"),
            Src.PERFORMING,
            ("h1 and h2", "h1 last reported that the guest is running there", "--assume-dead h1"),
        ),
    ],
)
def test_an_unknown_outcome_says_what_is_known_and_what_to_do(silent: tuple[str, ...], src: Src, parts: tuple[str, ...]) -> None:
    unknown = seen(knows(src, Dst.ARMED, *silent))
    assert unknown.state == pb.MIGRATION_STATE_OUTCOME_UNKNOWN
    assert unknown.failure.reason == Reason.OUTCOME_UNKNOWN
    assert [{"h1": "source", "h2": "destination"}[host] for host in unknown.silent_hosts] == list(silent)
    for part in (*parts, "drover migration watch m1"):
        assert part in unknown.failure.message
    known = seen(knows(src, Dst.ARMED), unknown)
    assert known.state == pb.MIGRATION_STATE_ACTIVE
    assert not known.HasField("failure")
    assert not known.silent_hosts


def test_no_doubt_while_the_destination_has_decided_or_the_guest_has_not_left() -> None:
    for src, dst, silent in (
        (Src.PERFORMED, Dst.RUNNING, "source"),
        (Src.PERFORMED, Dst.GONE, "source"),
        (Src.PERFORMING, Dst.ARMED, "destination"),
        (Src.BEGUN, Dst.PREPARED, "source"),
    ):
        assert seen(knows(src, dst, silent)).state == pb.MIGRATION_STATE_ACTIVE


def test_what_is_impossible_says_that_nothing_is_done() -> None:
    stopped = impossible(BEFORE)
    assert (stopped.state, stopped.failure.reason) == (pb.MIGRATION_STATE_OUTCOME_UNKNOWN, Reason.INTERNAL)
    assert "h1 and h2 contradict each other" in stopped.failure.message


# --- progress and timings ---------------------------------------------------------------------------------------------


def test_progress_has_an_expected_end_while_it_flows_only() -> None:
    reading = handshake_pb2.Progress(remaining_bytes=1000, bytes_per_second=100)
    assert seen(knows(Src.PERFORMING, Dst.ARMED, progress=reading)).progress.eta_low.seconds == 10
    assert not seen(knows(Src.PERFORMED, Dst.ARMED, progress=reading)).progress.HasField("eta_low")


def test_an_expected_end_needs_a_rate_and_a_guest_that_can_be_caught_up_with() -> None:
    unknown = with_eta(handshake_pb2.Progress(remaining_bytes=1000))
    assert not unknown.HasField("eta_low")
    assert unknown.reason
    never = with_eta(handshake_pb2.Progress(remaining_bytes=1000, bytes_per_second=100, dirty_bytes_per_second=100))
    assert never.eta_low.seconds == 10
    assert not never.HasField("eta_high")
    assert "no end in sight" in never.reason


_amount = st.integers(0, 2**62)


@given(_amount, _amount, _amount)
def test_an_expected_end_is_a_range(remaining: int, rate: int, dirty: int) -> None:
    reading = handshake_pb2.Progress(remaining_bytes=remaining, bytes_per_second=rate, dirty_bytes_per_second=dirty)
    eta = with_eta(reading)
    assert eta.HasField("eta_low") == (rate > 0)
    assert eta.HasField("eta_high") == (rate > dirty)
    if rate > dirty:
        assert 0 <= eta.eta_low.ToNanoseconds() <= eta.eta_high.ToNanoseconds()


def timing(name: str, start: float, seconds: float) -> handshake_pb2.PhaseTiming:
    return handshake_pb2.PhaseTiming(phase=name, start_time=timestamp(start), hypervisor_duration=duration(seconds))


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), max_size=8))
def test_the_hypervisors_time_is_that_of_the_union(spans: list[tuple[int, int]]) -> None:
    covered = {second for start, length in spans for second in range(start, start + length)}
    assert union((float(start), float(start + length)) for start, length in spans) == pytest.approx(len(covered))


HOUR = 3600.0


def with_timings(view: View, side: str, *timings: handshake_pb2.PhaseTiming, updated: float = 0.0) -> None:
    """Let the side answer with these ended phases."""
    record = handshake_pb2.Record()
    record.CopyFrom(getattr(view, f"{side}_record"))
    record.timings.extend(timings)
    record.update_time.CopyFrom(timestamp(updated))
    {"source": view.saw_source, "destination": view.saw_destination}[side](record)


def test_6_16_no_duration_is_taken_from_a_wall_clock() -> None:
    """The source's clock is an hour ahead, and was set back by a day between its phases."""
    view = knows(Src.REMOVED, Dst.RUNNING)
    with_timings(view, "destination", timing("reserve", 1000.0, 0.1), timing("prepare", 1000.3, 0.2))
    with_timings(view, "source", timing("begin", 1000.0 + HOUR, 0.1), timing("perform", 1000.5 - 24 * HOUR, 2.0))
    with_timings(view, "destination", timing("finish", 1000.6, 1.5))
    end = seen(view, ended=True)
    assert [t.phase for t in end.timings] == ["reserve", "begin", "prepare", "perform", "finish"]
    assert end.duration.ToNanoseconds() / 1e9 == pytest.approx(10.0)
    # Heard of at one moment, so perform and finish overlap, and so does prepare with what precedes perform.
    assert end.hypervisor_duration.ToNanoseconds() / 1e9 == pytest.approx(2.1, abs=0.05)
    assert end.create_time.seconds <= end.commit_time.seconds <= end.end_time.seconds


def test_6_16_calls_are_laid_on_the_drivers_own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 100.0
    monkeypatch.setattr("agent.handshake.drive.view.time.monotonic", lambda: clock)
    view = knows(Src.PERFORMED, Dst.RUNNING)
    for clock, side, name, seconds in (  # noqa: B007 - the clock is read above
        (101.0, "destination", "reserve", 0.5),
        (103.0, "source", "begin", 1.0),
        (110.0, "source", "perform", 4.0),
        (111.0, "destination", "finish", 4.5),
    ):
        with_timings(view, side, timing(name, 0.0, seconds))
    assert view.hypervisor_calls == {
        "source": [(102.0, 103.0), (106.0, 110.0)],
        "destination": [(100.5, 101.0), (106.5, 111.0)],
    }


@pytest.mark.parametrize(("ahead", "said"), [(HOUR, "h2 is 3600 s ahead of h1"), (-HOUR, "h1 is 3600 s ahead of h2"), (0.5, "")])
def test_6_16_clocks_that_differ_are_told(ahead: float, said: str) -> None:
    view = knows(Src.BEGUN, Dst.RESERVED)
    view.read_clock("destination", handshake_pb2.Record(revision=99, update_time=timestamp(5000.0 + ahead)))
    assert not seen(view).warnings, "one clock alone says nothing"
    view.read_clock("source", handshake_pb2.Record(update_time=timestamp(5000.0 + 2 * ahead)))
    assert not seen(view).warnings, "nor does a record that was known: it was changed long ago"
    view.read_clock("source", handshake_pb2.Record(revision=99, update_time=timestamp(5000.0)))
    first = seen(view)
    assert [said in warning for warning in first.warnings] == ([True] if said else [])
    assert list(seen(view, first).warnings) == list(first.warnings), "once"


def test_the_timings_of_both_hosts_in_their_order() -> None:
    view = knows(Src.PERFORMING, Dst.ARMED)
    assert view.source_record is not None
    assert view.destination_record is not None
    view.source_record.timings.extend([timing("begin", 2.0, 1.0), timing("perform", 5.0, 1.0)])
    view.destination_record.timings.extend([timing("reserve", 1.0, 1.0), timing("prepare", 4.0, 1.0)])
    assert [t.phase for t in seen(view).timings] == ["reserve", "begin", "prepare", "perform"]


def test_a_host_that_tells_of_the_drivers_own_phase_adds_nothing() -> None:
    """A record with "plan" in it is forged, and would be added again at each change."""
    view = knows(Src.PERFORMING, Dst.ARMED)
    assert view.source_record is not None
    view.source_record.timings.extend([timing("plan", 2.0, 1.0), timing("begin", 2.0, 1.0)])
    told = seen(view, before=seen(view))
    assert [t.phase for t in told.timings] == ["begin"]
