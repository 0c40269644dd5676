"""A fixed 25 rounds of `scripts/bench chaos`: whatever dies, exactly one copy runs at the end, and nothing is left behind."""

import itertools
import os
from collections import Counter
from pathlib import Path

import pytest

from agent.handshake.machines.failpoints import all_points

if os.environ.get("CI") != "true":
    pytest.importorskip("libvirt", reason="libvirt-python is not installed")

from tests.bench.chaos import Result, new_arena, run
from tests.bench.chaos_plan import HOSTS, PHASES, POINTS, each_phase, plan
from tests.bench.chaos_report import tell, tell_round
from tests.bench.chaos_targets import FAULTS

pytestmark = pytest.mark.timeout(1500)

SEED = 1
ROUNDS = 25


@pytest.mark.usefixtures("_real_hosts")
def test_whatever_dies_exactly_one_copy_runs(tmp_path: Path) -> None:
    with new_arena(f"ch{os.getpid()}") as arena:
        plans = (plan(SEED, number) for number in range(1, ROUNDS + 1))
        results = run([arena], plans, lambda bad: tmp_path / f"round-{bad.number}", tell_round)
    tell(results)
    bad = [
        f"scripts/bench chaos --seed {SEED} --round {result.plan.number}: {result.report()}" for result in results if not result.good
    ]
    assert not bad, "\n".join([f"logs and journals are in {tmp_path}", *bad])
    assert len({strike.fault.target for result in results for strike in result.strikes}) >= 8, "the faults are of many kinds"
    assert outcomes(results)["done"] > 0


def outcomes(results: list[Result]) -> Counter[str]:
    return Counter(result.outcome for result in results)


def test_a_round_is_the_same_whenever_it_is_planned() -> None:
    assert [plan(7, number) for number in range(1, 50)] == [plan(7, number) for number in range(1, 50)]
    assert plan(7, 3) != plan(8, 3)


def test_rounds_have_every_kind_of_fault() -> None:
    planned = {(fault.action, fault.target) for number in range(1, 600) for fault in plan(SEED, number).faults}
    assert planned == set(FAULTS)


def test_6_35_every_kind_of_fault_meets_a_cancel_and_a_rival() -> None:
    plans = [plan(SEED, number) for number in range(1, 1500)]
    every = {fault.name for each in plans for fault in each.faults}
    assert {fault.name for each in plans if each.cancel is not None for fault in each.faults} == every
    assert {(each.rival.same_id, each.rival.third) for each in plans if each.rival} == set(
        itertools.product((True, False), repeat=2)
    )
    assert {(each.source, each.destination) for each in plans} == set(itertools.permutations(HOSTS, 2))


def test_the_failpoints_of_the_rounds_are_failpoints() -> None:
    assert {point for points in POINTS.values() for point in points} <= set(all_points())
    assert {point for point in PHASES.values() if point} <= set(all_points())


def test_what_belongs_to_the_hypervisor_is_killed_in_each_phase() -> None:
    planned = [(plan.mode, plan.faults[0].target, plan.faults[0].point) for plan in each_phase()]
    assert len(set(planned)) == len(planned) == 2 * 4 * len(PHASES)


def test_only_some_faults() -> None:
    planned = {fault.name for number in range(1, 60) for fault in plan(SEED, number, "kill * libvirtd").faults}
    assert planned == {"kill source libvirtd", "kill destination libvirtd"}
