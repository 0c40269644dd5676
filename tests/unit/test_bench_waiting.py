"""`scripts/bench chaos --waiting`: its plans, and its judge's rules."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from agent.runtime.wire import duration, timestamp
from drover.agent.v1 import migration_pb2 as pb
from tests.bench.chaos_plan import HOSTS
from tests.bench.chaos_targets import FAULTS, DaemonTarget, LinkTarget
from tests.bench.chaos_waiting import target_of
from tests.bench.chaos_waiting_judge import Asked, end_of, false_ends, over_limits, remarks
from tests.bench.chaos_waiting_plan import LIMITS, LONG_WAIT, Change, Move, WaitingPlan, waiting_plan
from tests.kit.cluster import ClusterGuest, GuestSpec
from tests.kit.cluster.platforms import LabCluster

PLANS = [waiting_plan(1, number) for number in range(1, 400)]


def test_8_2_a_round_of_waits_is_the_same_whenever_it_is_planned() -> None:
    assert [waiting_plan(7, number) for number in range(1, 30)] == [waiting_plan(7, number) for number in range(1, 30)]
    assert waiting_plan(7, 3) != waiting_plan(8, 3)
    assert "round 3: limits (incoming/outgoing/prepared) h1 " in str(waiting_plan(7, 3))


def test_8_2_rounds_of_waits_have_migrations_and_faults_of_every_kind() -> None:
    moves = [move for plan in PLANS for move in plan.moves]
    assert {(move.managed, bool(move.destination), bool(move.wait), move.cancel is not None) for move in moves} == {
        (managed, pinned, waits, cancelled)
        for managed in (True, False)
        for pinned in (True, False)
        for waits in (True, False)
        for cancelled in (True, False)
    }
    assert {move.importance for move in moves} == {1, 2, 3}
    assert all(move.source != move.destination for move in moves)
    faults = {(fault.action, fault.target) for plan in PLANS for fault in plan.faults}
    hit = {target for _, target in faults}
    assert hit == {"coordinator", "coordinator management link"} | {
        f"{host} {what}" for host in HOSTS for what in ("agent", "management link", "migration link")
    }
    known = {action for action, _ in FAULTS} | {"end"}
    assert {action for action, _ in faults} <= known
    assert {change.setting for plan in PLANS for change in plan.changes} == {*LIMITS, "cordoned"}


def test_8_2_the_targets_of_a_round_of_waits() -> None:
    names = ("h1", "h2", "h3")
    agents = {name: SimpleNamespace(name=name) for name in names}
    lab = type("Lab", (dict,), {"coordinator": SimpleNamespace(name="co")})({name: SimpleNamespace(name=name) for name in names})
    made = cast("LabCluster", SimpleNamespace(agents=agents, lab=lab, coordinator=SimpleNamespace(name="co"), hosts=names))
    targets = {fault.target: target_of(made, fault.target) for plan in PLANS for fault in plan.faults}
    assert all(hasattr(targets[fault.target], fault.action.replace(" ", "_")) for plan in PLANS for fault in plan.faults)
    agent, coordinator = targets["h2 agent"], targets["coordinator"]
    assert isinstance(agent, DaemonTarget)
    assert isinstance(coordinator, DaemonTarget)
    assert (agent.daemon.name, coordinator.daemon.name) == ("h2", "co")
    assert isinstance(targets["h3 migration link"], LinkTarget)


# ---- the judge

MOVE = Move("a", "h1", "h2", managed=True, importance=2, wait=LONG_WAIT, bandwidth=1, at=0.0, cancel=None, cancelled_at_source=False)
STAYED = None
MOVED = ("h1", "h2")


def asked(**changes: Any) -> Asked:
    guest = ClusterGuest(GuestSpec("wait1"), "uuid", Path("/nonexistent"))
    return Asked(dataclasses.replace(MOVE, **changes), guest, "id")


def report(state: str, runs_on: str, reason: str = "", waited: float = 0.0) -> pb.Migration:
    found = pb.Migration(
        state=pb.MigrationState.Value(f"MIGRATION_STATE_{state}"), runs_on=runs_on, destination_host="h2", duration=duration(waited)
    )
    if reason:
        found.failure.reason = reason
    return found


SUCCEEDED = report("SUCCEEDED", "h2")
FAILED = report("FAILED", "h1", "RESTARTED")


def test_8_2_true_ends() -> None:
    assert not list(false_ends(asked(), {"co": SUCCEEDED, "h1": SUCCEEDED}, MOVED))
    assert not list(false_ends(asked(), {"co": FAILED}, STAYED))
    cancelled = asked()
    cancelled.cancelled = True
    assert not list(false_ends(cancelled, {"co": report("CANCELLED", "h1")}, STAYED))
    assert not list(remarks(cancelled, {"co": report("CANCELLED", "h1")}))
    refused = asked()
    refused.refused = "UNAVAILABLE"
    assert not list(false_ends(refused, {}, STAYED))
    assert not list(false_ends(asked(wait=5.0), {"co": report("FAILED", "h1", "BUSY", waited=5.0)}, STAYED))
    assert end_of(refused, None) == "refused (UNAVAILABLE)"
    assert end_of(asked(), FAILED) == "failed (RESTARTED)"


@pytest.mark.parametrize(
    ("reports", "stay", "problem"),
    [
        ({"co": report("CANCELLED", "h1")}, MOVED, "FALSE END: for co it is cancelled and runs on h1, but it is on h2"),
        ({"co": SUCCEEDED, "h1": FAILED}, MOVED, "FALSE END: for h1 it is failed (RESTARTED) and runs on h1, but it is on h2"),
        ({"co": SUCCEEDED}, STAYED, "FALSE END: for co it is succeeded and runs on h2, but it is on h1"),
        ({"co": report("FAILED", "", "RESTARTED")}, STAYED, "FALSE END: for co it is failed (RESTARTED) and runs on no host"),
        ({"co": report("SUCCEEDED", "h3")}, ("h1", "h3"), "it went from h1 to h3"),
        ({"co": report("FAILED", "h1", "INVALID_FIELD")}, STAYED, "which no fault explains"),
        ({"co": report("FAILED", "h1", "BUSY", waited=5.0)}, STAYED, "it waited 5.0 of 300.0 s"),
        ({}, STAYED, "its driver does not know it"),
        ({"h1": SUCCEEDED}, MOVED, "its driver does not know it"),
    ],
)
def test_8_2_false_ends(reports: dict[str, pb.Migration], stay: tuple[str, str] | None, problem: str) -> None:
    found = list(false_ends(asked(), reports, stay))
    assert any(problem in each for each in found), found


def test_8_2_remarks_on_ends_that_are_true_of_the_guest() -> None:
    assert list(remarks(asked(), {"co": report("CANCELLED", "h1")})) == ["reported by co as cancelled, though nobody cancelled it"]
    assert list(remarks(asked(), {"co": FAILED})) == ["it could wait, and is failed (RESTARTED) for co: "]
    assert not list(remarks(asked(wait=5.0), {"co": FAILED}))


def test_8_2_a_refused_migration_must_not_move_its_guest() -> None:
    refused = asked()
    refused.refused = "UNAVAILABLE"
    assert list(false_ends(refused, {}, MOVED)) == ["its driver does not know it, and it went to h2"]


def transfer(start: float, end: float) -> pb.Migration:
    timing = pb.Migration().timings.add(phase="perform", start_time=timestamp(start), duration=duration(end - start))
    return pb.Migration(source_host="h1", destination_host="h2", timings=[timing])


def test_8_2_transfers_over_a_limit() -> None:
    limits = {host: {"incoming_limit": 1, "outgoing_limit": 2, "prepared_limit": 0} for host in HOSTS}
    plan = WaitingPlan(1, limits, (), (), ())
    moves = [transfer(10, 13), transfer(12, 14)]
    assert list(over_limits(plan, moves)) == ["2 transfers at once, but incoming_limit of h2 was at most 1"]
    assert not list(over_limits(plan, [transfer(10, 12), transfer(12, 14)]))
    raised = dataclasses.replace(plan, changes=(Change(1.0, "h2", "incoming_limit", 2),))
    assert not list(over_limits(raised, moves))
    lowered = dataclasses.replace(plan, changes=(Change(1.0, "h2", "incoming_limit", 0),))
    assert list(over_limits(lowered, moves))
