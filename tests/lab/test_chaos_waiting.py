"""Two fixed rounds of `scripts/bench chaos --waiting`: whoever dies while migrations wait, each end is true."""

import os
from pathlib import Path

import pytest

if os.environ.get("CI") != "true":
    pytest.importorskip("libvirt", reason="libvirt-python is not installed")

from tests.bench.chaos import in_arenas, new_arena
from tests.bench.chaos_report import tell_waiting, tell_waiting_round
from tests.bench.chaos_waiting import play
from tests.bench.chaos_waiting_plan import waiting_plan

pytestmark = pytest.mark.timeout(900)

SEED = 101
ROUNDS = (3, 8)
"""In each the coordinator dies or stands still, and is back once its waits are taken over; in the first one a wait ends then."""


@pytest.mark.usefixtures("_real_hosts")
def test_8_2_whoever_dies_while_migrations_wait_each_end_is_true(tmp_path: Path) -> None:
    with new_arena(f"cw{os.getpid()}") as arena:
        plans = (waiting_plan(SEED, number) for number in ROUNDS)
        results = in_arenas(
            [arena], plans, lambda arena, plan: play(arena, plan, lambda bad: tmp_path / f"round-{bad.number}", tell_waiting_round)
        )
    tell_waiting(results)
    bad = [
        f"scripts/bench chaos --waiting --seed {SEED} --round {result.plan.number}: {result.report()}"
        for result in results
        if not result.good
    ]
    assert not bad, "\n".join([f"logs and journals are in {tmp_path}", *bad])
    assert any(end == "succeeded" for result in results for end in result.verdict.ends.values())
