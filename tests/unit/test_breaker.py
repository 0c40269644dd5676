"""agent.runtime.breaker."""

import asyncio

import pytest

from agent.runtime.backoff import Backoff
from agent.runtime.breaker import Breaker
from agent.runtime.errors import DroverError, Reason
from agent.runtime.events import BreakerChanged, Bus
from tests.unit.clocks import FakeClock

POLICY = Backoff(1.0, 2, 5.0)
NO_ANSWER = (Reason.HOST_UNREACHABLE, Reason.DEADLINE_EXCEEDED)
NOT_QUITE_ONE = 1 - 2**-53


class Asked:
    """A host that is called through a breaker; `answer` is its answer."""

    def __init__(self, **options: int) -> None:
        self.clock = FakeClock()
        bus = Bus()
        self.events = bus.subscribe()
        self.breaker = Breaker(POLICY, NO_ANSWER, bus, self.clock, lambda: NOT_QUITE_ONE, **options)
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

    async def told(self) -> list[tuple[str, str, str]]:
        """What the breaker has published."""
        self.events.close()
        events = [published.event async for published in self.events]
        return [(e.host, e.change, e.reason) for e in events if isinstance(e, BreakerChanged)]

    def times(self, count: int) -> int:
        """Call that many times. Return how many calls reached the host."""
        before = len(self.asked)
        for _ in range(count):
            self.ask()
        return len(self.asked) - before


async def test_8_3_a_breaker_opens_says_so_once_and_gives_the_last_error() -> None:
    host = Asked()
    assert not host.breaker.is_open("h1")
    assert host.times(10) == 3
    with pytest.raises(DroverError, match="no") as caught, host.breaker.guard("h1"):
        pytest.fail("asked")
    assert (caught.value.reason, caught.value.metadata) == (Reason.HOST_UNREACHABLE, {"host": "h1"})
    assert caught.value.retry_after == pytest.approx(1.0)
    assert host.breaker.is_open("h1")
    assert not host.breaker.is_open("h2")
    host.clock.now += 1.0
    assert not host.breaker.is_open("h1")
    assert host.times(10) == 1
    assert await host.told() == [("h1", change, Reason.HOST_UNREACHABLE) for change in ("opened", "half_open")]


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


async def test_8_3_an_answer_closes_the_breaker_and_it_says_so() -> None:
    host = Asked()
    host.times(3)
    host.clock.now += 1.0
    host.answer = None
    assert host.times(10) == 10
    host.answer = Reason.HOST_UNREACHABLE
    assert host.times(10) == 3
    assert [change for _, change, _ in await host.told()] == ["opened", "half_open", "closed", "opened"]


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
