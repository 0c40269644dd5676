"""agent.runtime.backoff: the pauses before retries."""

import asyncio
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.runtime import backoff
from agent.runtime.backoff import Backoff, Pauses
from tests.unit.asking import PATIENCE
from tests.unit.clocks import FakeClock, StoppedClock

POLICY = Backoff(1.0, 2, 5.0)
NOT_QUITE_ONE = 1 - 2**-53

policies = st.builds(
    Backoff, st.floats(0.001, 100), st.floats(1, 10), st.floats(100, 10_000)
)  # a cap below the first pause would be a mistake in the table
failures = st.integers(1, 100_000)


@given(policies, failures, st.floats(0, NOT_QUITE_ONE))
def test_7_a_pause_is_between_nothing_and_the_ceiling(policy: Backoff, failed: int, random: float) -> None:
    assert 0 <= policy.delay(failed, random) <= policy.ceiling(failed) <= policy.cap


@given(policies, failures)
def test_7_the_ceiling_never_falls_and_grows_by_the_factor_up_to_the_cap(policy: Backoff, failed: int) -> None:
    now, then = policy.ceiling(failed), policy.ceiling(failed + 1)
    assert now <= then <= max(now * policy.factor * (1 + 1e-9), now)
    assert then == policy.cap or then == pytest.approx(now * policy.factor)


@given(policies)
def test_7_the_first_ceiling_is_the_first_pause_and_the_last_one_is_the_cap(policy: Backoff) -> None:
    assert policy.ceiling(1) == policy.first
    assert policy.factor < 1.01 or policy.ceiling(100_000) == policy.cap


def test_7_every_policy_of_the_table_grows_and_has_a_cap() -> None:
    table = {name: value for name, value in vars(backoff).items() if isinstance(value, Backoff)}
    assert len(table) > 5
    for name, policy in table.items():
        ceilings = [policy.ceiling(failed) for failed in range(1, 20)]
        assert all(a < b or b == policy.cap for a, b in pairwise(ceilings)), name
        assert ceilings[-1] == policy.cap, name


async def test_7_pauses_grow_and_begin_anew_after_a_success() -> None:
    clock = FakeClock()
    pauses = Pauses(POLICY, clock, lambda: 0.5)
    for _ in range(5):
        await pauses.pause()
    pauses.succeeded()
    await pauses.pause()
    assert clock.slept == [0.5, 1.0, 2.0, 2.5, 2.5, 0.5]


async def test_7_an_event_ends_a_pause_early() -> None:
    end, pauses = asyncio.Event(), Pauses(POLICY, StoppedClock())
    waiting = asyncio.create_task(pauses.pause(end))
    await asyncio.sleep(0)
    assert not waiting.done()
    end.set()
    async with asyncio.timeout(PATIENCE):
        await waiting
    async with asyncio.timeout(PATIENCE):
        await Pauses(POLICY, FakeClock()).pause(asyncio.Event())  # and without it, the clock does


async def test_7_an_error_of_the_clock_is_not_lost() -> None:
    class Broken(FakeClock):
        async def sleep(self, seconds: float) -> None:
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        await Pauses(POLICY, Broken()).pause(asyncio.Event())
