"""agent.admission.slots: a limit, and when to try again."""

import pytest

from agent.admission.slots import Slots
from agent.runtime.errors import DroverError, Reason


def refused(slots: Slots, held: list[float]) -> DroverError:
    with pytest.raises(DroverError) as error:
        slots.check(held)
    assert error.value.reason is Reason.BUSY
    return error.value


def test_up_to_the_limit_and_no_further() -> None:
    slots = Slots(2)
    slots.check([])
    slots.check([0])
    error = refused(slots, [0, 0])
    assert error.metadata == {"limit": "incoming", "limit_value": "2", "in_use": "2"}
    refused(slots, [0] * 5)
    refused(Slots(0), [])


def test_a_limit_that_was_lowered_lets_what_runs_end() -> None:
    slots = Slots(3)
    slots.limit = 1
    assert refused(slots, [0] * 3).metadata["in_use"] == "3"
    slots.check([])


def test_try_again_when_the_oldest_should_have_ended() -> None:
    slots = Slots(1)
    assert refused(slots, [4]).retry_after == pytest.approx(6.0)  # nothing is known yet: 10 s
    for seconds in (20, 30, 1000):
        slots.arrived(seconds)
    assert refused(slots, [10]).retry_after == pytest.approx(20.0)
    slots.limit = 2
    assert refused(slots, [5, 10]).retry_after == pytest.approx(20.0)


def test_never_at_once() -> None:
    assert refused(Slots(1), [10_000]).retry_after == 1.0


def test_only_the_latest_durations_count() -> None:
    slots = Slots(1)
    for _ in range(50):
        slots.arrived(100)
    for _ in range(20):
        slots.arrived(5)
    assert refused(slots, [0]).retry_after == pytest.approx(5.0)
