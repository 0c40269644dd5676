"""A sample of `scripts/bench failpoints`: the arrows at which a wrong step would cost a guest. The whole table is in the docs."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.handshake.machines.failpoints import all_points

if os.environ.get("CI") != "true":
    pytest.importorskip("libvirt", reason="libvirt-python is not installed")

from tests.bench.chaos_arena import Arena
from tests.bench.failpoints import DEADLINE, run
from tests.bench.failpoints_cases import MANAGED, P2P, TAKE_OVER, cases
from tests.bench.failpoints_report import tell_row

pytestmark = pytest.mark.timeout(240)

SAMPLE = (
    # Before the memory flows: rolled back, and the slot is free again.
    (MANAGED, "source.begin_done.journal.after", "rolled back"),
    (MANAGED, "driver.prepare.after", ""),
    # The commit is under way: it is armed, it happens without us, and is recorded later.
    (MANAGED, "source.perform.reply", ""),
    (P2P, "driver.finish.after", "done"),
    (MANAGED, "destination.finish.reply", "done"),
    (MANAGED, "destination.saw_running.journal.before", "done"),
    (P2P, "destination.saw_running.journal.after", "done"),
    (MANAGED, "destination.finish_done.journal.before", "done"),
    # The guest runs there, and its old copy is still here.
    (MANAGED, "source.remove.effect.before", "done"),
    (P2P, "source.remove_done.journal.before", "done"),
    # The way back.
    (MANAGED, "source.abort.journal.after", ""),
    (MANAGED, "destination.abandon_source_kept.journal.before", "rolled back"),
    # The coordinator is dead, and so is then the agent that took over from it.
    (TAKE_OVER, "driver.confirm_running.before", "done"),
)
"""Mode, failpoint, and the one outcome that is right. Empty where both are: a lease, or the end of the transfer, may come first."""

RACE = frozenset(
    f"destination.{point}" for point in ("saw_running.journal.before", "saw_running.journal.after", "finish_done.journal.before")
)
"""The destination learns of the start by an event and by the end of Finish. Where the other one is first, these are not reached."""


@pytest.fixture(scope="module")
def arena(_real_hosts: None) -> Iterator[Arena]:
    with Arena(f"fp{os.getpid()}") as made:
        yield made


@pytest.mark.parametrize(("mode", "point", "outcome"), SAMPLE)
def test_killed_there_it_ends_by_itself(arena: Arena, tmp_path: Path, mode: str, point: str, outcome: str) -> None:
    [row] = run(arena, cases((mode,), point), tmp_path, tell_row)
    assert row.judgement.problems == [], f"logs and journals are in {tmp_path}"
    assert row.reached or point in RACE, "the failpoint was not reached"
    assert row.judgement.seconds <= DEADLINE
    assert outcome in ("", row.judgement.outcome)


def test_every_failpoint_has_a_row_in_both_modes() -> None:
    rows = list(cases((MANAGED, P2P)))
    assert len({row.name for row in rows}) == len(rows) == 2 * len(list(all_points()))
    assert all(row.process for row in rows)
