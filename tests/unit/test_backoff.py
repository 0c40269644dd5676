"""agent.runtime.backoff: how everything that failed is tried again."""

import asyncio
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from agent.runtime import backoff
from agent.runtime.backoff import Backoff, Breaker, Pauses
from agent.runtime.errors import DroverError, Reason
from tests.unit.asking import PATIENCE
from tests.unit.clocks import FakeClock, StoppedClock

POLICY = Backoff(1.0, 2, 5.0)
NO_ANSWER = (Reason.HOST_UNREACHABLE, Reason.DEADLINE_EXCEEDED)
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


# --- the breaker ------------------------------------------------------------------------------------------------------


class Asked:
    """A host that is asked through a breaker; `answer` is what it says."""

    def __init__(self, **options: int) -> None:
        self.clock = FakeClock()
        self.breaker = Breaker(POLICY, NO_ANSWER, self.clock, lambda: NOT_QUITE_ONE, **options)
        self.asked: list[str] = []
        self.answer: Reason | None = Reason.HOST_UNREACHABLE

    def ask(self, host: str = "h1") -> Reason | None:
        try:
            with self.breaker.guard(host):
                self.asked.append(host)
                if self.answer is not None:
                    raise DroverError(self.answer, "no", metadata={"host": host})
        except DroverError as error:
            return error.reason
        return None

    def times(self, count: int) -> int:
        """Ask so often; how often the host was really asked."""
        before = len(self.asked)
        for _ in range(count):
            self.ask()
        return len(self.asked) - before


def test_7_a_breaker_opens_says_so_once_and_gives_the_last_error() -> None:
    host = Asked()
    with capture_logs() as logs:
        assert host.times(10) == 3
        with pytest.raises(DroverError, match="no") as caught, host.breaker.guard("h1"):
            pytest.fail("asked")
        assert (caught.value.reason, caught.value.metadata) == (Reason.HOST_UNREACHABLE, {"host": "h1"})
        assert caught.value.retry_after == pytest.approx(1.0)
        host.clock.now += 1.0
        assert host.times(10) == 1
    assert [(line["host"], line["reason"]) for line in logs] == [("h1", Reason.HOST_UNREACHABLE)]


def test_7_an_open_breaker_lets_one_question_through_after_each_pause_which_grows() -> None:
    host = Asked()
    host.times(3)
    pauses = []
    for _ in range(5):
        began = host.clock.now
        while not host.times(1):
            host.clock.now += 0.25
        pauses.append(host.clock.now - began)
    assert pauses == [1.0, 2.0, 4.0, 5.0, 5.0]


def test_7_an_answer_closes_the_breaker() -> None:
    host = Asked()
    host.times(3)
    host.clock.now += 1.0
    host.answer = None
    with capture_logs() as logs:
        assert host.times(10) == 10
    assert [line["event"] for line in logs] == ["a host answers again"]
    host.answer = Reason.HOST_UNREACHABLE
    assert host.times(10) == 3


@pytest.mark.parametrize("answer", [None, Reason.DOMAIN_NOT_FOUND])
def test_7_failures_count_in_a_row_and_a_refusal_is_an_answer(answer: Reason | None) -> None:
    host = Asked()
    for _ in range(5):
        host.answer = Reason.HOST_UNREACHABLE
        assert host.times(2) == 2
        host.answer = answer
        assert host.times(1) == 1


def test_7_hosts_and_reasons_are_counted_apart() -> None:
    host = Asked()
    assert host.times(2) == 2
    host.answer = Reason.DEADLINE_EXCEEDED
    assert host.times(2) == 2
    assert host.times(2) == 1
    assert host.ask("h2") is Reason.DEADLINE_EXCEEDED
    assert host.asked[-1] == "h2"


def test_7_what_a_breaker_remembers_is_bounded() -> None:
    host = Asked(size=2)
    for name in ("h1", "h2", "h3"):
        for _ in range(3):
            host.ask(name)
    assert list(host.breaker._hosts) == ["h2", "h3"]
    assert host.times(1) == 1  # h1 was forgotten
    host.ask("h3")
    assert host.asked[-1] == "h1"


def test_7_a_question_that_was_broken_off_says_nothing_of_the_host() -> None:
    host = Asked()
    host.times(2)
    with pytest.raises(asyncio.CancelledError), host.breaker.guard("h1"):
        raise asyncio.CancelledError
    assert host.times(3) == 1


async def test_7_an_error_of_the_clock_is_not_lost() -> None:
    class Broken(FakeClock):
        async def sleep(self, seconds: float) -> None:
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        await Pauses(POLICY, Broken()).pause(asyncio.Event())
