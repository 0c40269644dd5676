"""agent.admission.slots: a limit, and when to try again."""

import pytest

from agent.admission.slots import Slots
from agent.errors import DroverError, Reason
from agent.handshake.records import AttemptRecord, Role
from tests.unit.asking import record


def held(created: float, updated: float = 0.0) -> AttemptRecord:
    return record(Role.DESTINATION, "prepared", created=created, updated=updated)


def refused(slots: Slots, active: list[AttemptRecord], now: float) -> DroverError:
    with pytest.raises(DroverError) as error:
        slots.check(active, now)
    assert error.value.reason is Reason.BUSY
    return error.value


def test_up_to_the_limit_and_no_further() -> None:
    slots = Slots(2)
    slots.check([], 0)
    slots.check([held(0)], 0)
    error = refused(slots, [held(0), held(0)], 0)
    assert error.metadata == {"limit": "incoming", "limit_value": "2", "in_use": "2"}
    refused(slots, [held(0)] * 5, 0)
    refused(Slots(0), [], 0)


def test_a_limit_that_was_lowered_lets_what_runs_end() -> None:
    slots = Slots(3)
    slots.limit = 1
    assert refused(slots, [held(0)] * 3, 0).metadata["in_use"] == "3"
    slots.check([], 0)


def test_try_again_when_the_oldest_should_have_ended() -> None:
    slots = Slots(1)
    assert refused(slots, [held(100)], 104).retry_after == pytest.approx(6.0)  # nothing is known yet: 10 s
    for seconds in (20, 30, 1000):
        slots.ended(held(0, seconds))
    assert refused(slots, [held(100)], 110).retry_after == pytest.approx(20.0)
    slots.limit = 2
    assert refused(slots, [held(105), held(100)], 110).retry_after == pytest.approx(20.0)


def test_never_at_once_and_never_before_now() -> None:
    assert refused(Slots(1), [held(0)], 10_000).retry_after == 1.0
    assert refused(Slots(1), [held(500)], 100).retry_after is not None


def test_only_the_latest_durations_count() -> None:
    slots = Slots(1)
    for _ in range(50):
        slots.ended(held(0, 100))
    for _ in range(20):
        slots.ended(held(0, 5))
    assert refused(slots, [held(0)], 0).retry_after == pytest.approx(5.0)
