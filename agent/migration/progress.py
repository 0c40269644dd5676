"""A migration as its user sees it, from what its driver knows. Pure; the time is a parameter."""

from collections.abc import Iterable
from copy import deepcopy
from typing import Final

from google.protobuf.duration_pb2 import Duration

from agent.handshake.drive.view import View
from agent.handshake.machines.destination import DestinationState as Dst
from agent.handshake.machines.facts import loss_of
from agent.handshake.machines.source import SourceState as Src
from agent.hypervisor.guest_fact import GuestFact, GuestState
from agent.migration.waits import note_wait
from agent.migration.whereabouts import MOVED, Place, said, whereabouts
from agent.runtime.errors import Reason, said_by_peer
from agent.runtime.failure import Failure, causes_first, failure_to_proto
from agent.runtime.wire import duration
from drover.agent.v1 import handshake_pb2
from drover.agent.v1 import migration_pb2 as pb

_PHASE_OF_SOURCE: Final = {
    Src.BEGINNING: "begin",
    Src.PERFORMING: "perform",
    Src.PERFORMED: "finish",
    Src.LOST: "finish",
    Src.REMOVING: "confirm",
    Src.RESUMING: "confirm",
}
_PHASE_OF_DESTINATION: Final = {None: "reserve", Dst.RESERVED: "begin", Dst.PREPARING: "prepare", Dst.PREPARED: "perform"}

_ORDER: Final = {name: place for place, name in enumerate(("plan", "reserve", "begin", "prepare", "perform", "finish", "confirm"))}
"""Order of the phases."""

SKEW_SECONDS: Final = 2.0
"""Wall clocks that differ by less count as equal: this much may pass between a host's reading of its clock and ours."""
_SKEW: Final = "the clocks of both hosts differ"

_GUEST_STATES: Final = {handshake_pb2.GuestState.Value(f"GUEST_STATE_{state.upper()}"): state for state in GuestState}


_NOT_AS_PLANNED: Final = frozenset({Reason.DOMAIN_NOT_FOUND, Reason.DOMAIN_NOT_RUNNING, Reason.GUEST_CRASHED})
"""Refusals of Begin after which the guest is not as it was seen when the migration was planned."""


def describe(before: pb.Migration, view: View, elapsed: float, *, ended: bool, wall: float | None = None) -> pb.Migration:
    """Return the present state of the migration, from its last one and what its driver knows. `elapsed`: measured seconds since its
    request; with `wall` (Unix time) only since this process has driven it."""
    # Setting the wall clock meanwhile changes no duration and no order.
    now = max(before.create_time.ToNanoseconds() / 1e9 + elapsed, wall or 0.0)
    src, dst = view.source_state, view.destination_state
    migration = deepcopy(before)
    if ended:
        for field in ("waiting_for", "wait_reason", "wait"):
            migration.ClearField(field)
    else:
        note_wait(migration, view)
    migration.uri = view.uri or before.uri
    _copy_path(migration, view)
    del migration.silent_hosts[:]
    migration.silent_hosts.extend(_hosts(before)[side] for side in view.silent_since)
    migration.ClearField("statement")
    del migration.statements[:]
    migration.statements.extend(view.statements.values())
    for statement in _statements(view):
        migration.statement.CopyFrom(statement)
    migration.phase = "" if ended else phase(src, dst)
    _copy_records(migration, view)
    _warn_of_skew(migration, view.clock_skew)
    _warn_of_pause(migration, view)
    if dst is Dst.RUNNING and not view.disputed and not before.HasField("commit_time"):
        migration.commit_time.FromNanoseconds(int(now * 1e9))
    failures = causes_first((view.failure, _failure_of(view.source_record), _failure_of(view.destination_record)))
    failure = failures[0] if failures else None
    untouched = not (view.source_record is not None and view.source_record.HasField("guest"))
    seen = migration.source_guest
    stands = seen.state in (handshake_pb2.GUEST_STATE_RUNNING, handshake_pb2.GUEST_STATE_PAUSED) and seen.reason != MOVED
    if untouched and stands and failure is not None and failure.reason in _NOT_AS_PLANNED:
        migration.source_guest.CopyFrom(handshake_pb2.GuestFact())  # what the plan saw is not true any more
    migration.state = _state(migration.state, view, failure, ended=ended)
    as_asked = migration.state == pb.MIGRATION_STATE_SUCCEEDED or (untouched and migration.state == pb.MIGRATION_STATE_CANCELLED)
    if ended and not as_asked and (lost := _loss(migration)) is not None:
        migration.state, failure = pb.MIGRATION_STATE_FAILED, lost
    migration.runs_on = whereabouts(migration).runs_on
    migration.ClearField("failure")
    if migration.state == pb.MIGRATION_STATE_OUTCOME_UNKNOWN:
        failure = _unknown(migration, view)
    del migration.other_failures[:]
    if failure is not None and migration.state != pb.MIGRATION_STATE_SUCCEEDED:
        migration.failure.CopyFrom(failure_to_proto(failure))
        migration.other_failures.extend(failure_to_proto(other) for other in failures if _adds(other, failure))
    if ended:
        migration.end_time.FromNanoseconds(int(now * 1e9))
        planning = sum(t.hypervisor_duration.ToNanoseconds() / 1e9 for t in migration.timings if t.phase == "plan")
        in_calls = planning + union(call for calls in view.hypervisor_calls.values() for call in calls)
        migration.duration_is_least = wall is not None
        migration.duration.CopyFrom(_seconds(max(elapsed, in_calls) if migration.duration_is_least else elapsed))
        migration.hypervisor_duration.CopyFrom(_seconds(in_calls))
    return migration


def _copy_path(migration: pb.Migration, view: View) -> None:
    if view.path is not None and view.path.HasField("round_trip"):
        migration.network_choice.round_trip.CopyFrom(view.path.round_trip)
        migration.network_choice.mtu = view.path.mtu


def _warn_of_skew(migration: pb.Migration, skew: float) -> None:
    """Warn if the hosts' clocks differ: readers of their logs must know."""
    if abs(skew) < SKEW_SECONDS or any(warning.startswith(_SKEW) for warning in migration.warnings):
        return
    ahead, behind = (migration.destination_host, migration.source_host)[:: 1 if skew > 0 else -1]
    migration.warnings.append(
        f"{_SKEW}: {ahead} is {abs(skew):.0f} s ahead of {behind}. Times of day in their logs and records cannot be compared; "
        "durations are not affected. Look at the time service of both"
    )


def _warn_of_pause(migration: pb.Migration, view: View) -> None:
    """Warn if the guest is left paused because its user paused it during the transfer."""
    warning = f"guest {migration.domain_name} was paused by its user during the transfer, and is left paused"
    paused = any(record is not None and record.paused_by_user for record in (view.source_record, view.destination_record))
    if paused and warning not in migration.warnings:
        migration.warnings.append(warning)


def _statements(view: View) -> list[handshake_pb2.Statement]:
    """Return the statements made here, and those that a host has acted upon, which stay even if the other host answers again."""
    records = [record for record in (view.destination_record, view.source_record) if record is not None]
    return [*view.statements.values(), *(record.statement for record in records if record.HasField("statement"))]


def phase(src: Src | None, dst: Dst | None) -> str:
    """The phase under way."""
    if src in (Src.PERFORMED, Src.LOST) and dst in (Dst.RUNNING, Dst.GONE):
        return "confirm"
    if src in _PHASE_OF_SOURCE:
        return _PHASE_OF_SOURCE[src]
    if dst in (Dst.RUNNING, Dst.GONE, Dst.ABANDONING) or src is Src.KEPT:
        return "confirm"
    if src is Src.BEGUN and dst is Dst.RESERVED:
        return "prepare"
    return _PHASE_OF_DESTINATION.get(dst, "perform")


def _state(before: pb.MigrationState.ValueType, view: View, failure: Failure | None, *, ended: bool) -> pb.MigrationState.ValueType:
    if ended:
        if view.states[1] is Dst.RUNNING:
            return pb.MIGRATION_STATE_SUCCEEDED
        cancelled = failure is not None and failure.reason == Reason.CANCELLED
        return pb.MIGRATION_STATE_CANCELLED if cancelled else pb.MIGRATION_STATE_FAILED
    if view.outcome_unknown:
        return pb.MIGRATION_STATE_OUTCOME_UNKNOWN
    if view.cancelling:
        return pb.MIGRATION_STATE_CANCELLING
    return pb.MIGRATION_STATE_PENDING if view.source_record is None else pb.MIGRATION_STATE_ACTIVE


def _failure_of(record: handshake_pb2.Record | None) -> Failure | None:
    if record is None or not record.HasField("failure"):
        return None
    failure = record.failure
    return Failure.of(said_by_peer(failure.reason, failure.message, failure.metadata))


def _adds(other: Failure, failure: Failure) -> bool:
    """Return whether it adds to the failure: not if its agent knows only that the attempt was cancelled or given up."""
    echo_of_cancel = failure.reason is Reason.CANCELLED and other.distance > 0
    return other.message != failure.message and other.reason not in (Reason.GIVEN_UP, Reason.CANCELLED) and not echo_of_cancel


def _unknown(migration: pb.Migration, view: View) -> Failure:
    silent = " and ".join(_hosts(migration)[side] for side in view.silent_since)
    here = said(migration.source_host, migration.source_guest)
    return Failure(
        Reason.OUTCOME_UNKNOWN,
        f"{silent} does not answer, and only it knows whether the guest runs on {migration.destination_host}; {here}. "
        f"Drover keeps asking it, and the migration ends by itself once it answers: "
        f"`drover migration watch {migration.migration_id}`. If {silent} is dead for certain (powered off, fenced), and only then: "
        f"`drover migration resolve {migration.migration_id} --assume-dead {next(iter(silent.split(' and ')))} --reason …`",
    )


def _hosts(migration: pb.Migration) -> dict[str, str]:
    return {"source": migration.source_host, "destination": migration.destination_host}


def impossible(before: pb.Migration) -> pb.Migration:
    """Return the state of a migration whose records contradict each other, or whose driver has a bug: it is given up."""
    migration = deepcopy(before)
    migration.state = pb.MIGRATION_STATE_OUTCOME_UNKNOWN
    migration.runs_on = whereabouts(migration).runs_on
    failure = Failure(
        Reason.INTERNAL,
        f"the records of {before.source_host} and {before.destination_host} contradict each other, so nothing more is done to the "
        f"guest: look at both (`drover domain list`) and at the agents' logs, and report this as a defect",
    )
    migration.failure.CopyFrom(failure_to_proto(failure))
    return migration


def _copy_records(migration: pb.Migration, view: View) -> None:
    records = [record for record in (view.source_record, view.destination_record) if record is not None]
    ended = [*(t for t in migration.timings if t.phase == "plan"), *(t for r in records for t in r.timings if t.phase != "plan")]
    if timings := sorted(ended, key=lambda t: _ORDER.get(t.phase, len(_ORDER))):
        del migration.timings[:]
        migration.timings.extend(timings)
    for fact, record in ((migration.source_guest, view.source_record), (migration.destination_guest, view.destination_record)):
        if record is not None and record.HasField("guest"):
            fact.CopyFrom(record.guest)
        elif record is not None and record.state == handshake_pb2.RECORD_STATE_RUNNING:  # older agents report no facts
            fact.CopyFrom(handshake_pb2.GuestFact(state=handshake_pb2.GUEST_STATE_RUNNING, see_time=record.update_time))
    if view.states[1] is Dst.RUNNING and view.destination_state is not Dst.RUNNING and view.source_record is not None:
        # The source has read that from the destination, which does not answer this driver.
        started = handshake_pb2.GuestFact(state=handshake_pb2.GUEST_STATE_RUNNING, reason="migrated")
        started.see_time.CopyFrom(view.source_record.update_time)
        migration.destination_guest.CopyFrom(started)
    if view.source_record is not None and view.source_record.HasField("progress"):
        progress = view.source_record.progress
        migration.progress.CopyFrom(with_eta(progress) if view.source_state is Src.PERFORMING else progress)


def with_eta(progress: handshake_pb2.Progress) -> handshake_pb2.Progress:
    """Return the reading with a range of its end: at best the rest is sent once; at worst also what is dirtied meanwhile."""
    reading = deepcopy(progress)
    rate, dirty = progress.bytes_per_second, progress.dirty_bytes_per_second
    if rate <= 0:
        reading.reason = progress.reason or "no rate measured yet"
        return reading
    reading.eta_low.CopyFrom(_seconds(progress.remaining_bytes / rate))
    if dirty >= rate:
        reading.reason = "the guest dirties its memory faster than it is sent: no end in sight at this rate"
    else:
        reading.eta_high.CopyFrom(_seconds(progress.remaining_bytes / (rate - dirty)))
    return reading


def _seconds(seconds: float) -> Duration:
    """Return a duration, limited: the sum of what hosts report may exceed what one can hold."""
    return duration(min(seconds, 1e9))


def union(intervals: Iterable[tuple[float, float]]) -> float:
    """Return the time that at least one of the intervals covers."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def _loss(migration: pb.Migration) -> Failure | None:
    """Return the failure of a migration whose guest has ended at the source meanwhile, else None."""
    fact, dead = migration.source_guest, migration.statement.dead_host
    if whereabouts(migration).place is not Place.NOWHERE or fact.state not in _GUEST_STATES or dead == migration.source_host:
        return None
    return loss_of(migration.domain_name, migration.source_host, GuestFact(_GUEST_STATES[fact.state], fact.reason))
