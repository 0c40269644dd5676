"""agent.migration.driving: what a refused, lost or late start leaves behind (issue 7, part 2)."""


import pytest

from agent.migration import uptime
from agent.runtime.errors import Reason
from drover.agent.v1 import migration_pb2 as pb
from tests.unit.asking import ID, until
from tests.unit.fake_directory import Driving
from tests.unit.test_entry_first import asked_for_a_slot, saved, slots_taken, state
from tests.unit.test_uptime import HOUR


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
