"""How everything that failed is tried again: pauses that grow up to a cap, with full jitter; a breaker for hosts that do not answer;
the clock of both, which tests replace; and, at the end, the policies.

The model is `stamina`. The library itself does not fit: its jitter is added below the cap and vanishes at it, its only clock is the
event loop's, and it neither begins anew after a success (a watch that ran for a day) nor lets an event end a pause.
"""

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

import structlog

from agent.runtime.errors import DroverError, Reason

log = structlog.get_logger()


class Clock(Protocol):
    """What waits and measures how long."""

    def monotonic(self) -> float:
        """Return seconds that never go back."""

    async def sleep(self, seconds: float) -> None:
        """Return after so many seconds."""


class SystemClock:
    """The clock of every process that is not a test."""

    def monotonic(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


SYSTEM_CLOCK: Final = SystemClock()


@dataclass(frozen=True)
class Backoff:
    """The pauses between tries, in seconds: random, below a ceiling that begins at `first`, grows by `factor` and ends at `cap`."""

    first: float
    factor: float
    cap: float

    def ceiling(self, failures: int) -> float:
        """Return the longest pause after so many failures (at least 1)."""
        try:
            return min(self.cap, self.first * self.factor ** (failures - 1))
        except OverflowError:
            return self.cap

    def delay(self, failures: int, random: float) -> float:
        """Return the pause after so many failures, with `random` in [0, 1): full jitter, so that tries do not come in waves."""
        return random * self.ceiling(failures)


class Pauses:
    """The pauses of one thing that is tried until it succeeds."""

    def __init__(self, backoff: Backoff, clock: Clock = SYSTEM_CLOCK, rand: Callable[[], float] = random.random) -> None:
        self.failures = 0
        self._backoff = backoff
        self._clock = clock
        self._rand = rand

    async def pause(self, end: asyncio.Event | None = None) -> None:
        """Wait after a failure; `end` ends the pause early."""
        self.failures += 1
        sleep = self._clock.sleep(self._backoff.delay(self.failures, self._rand()))
        if end is None:
            await sleep
            return
        tasks = {asyncio.ensure_future(sleep), asyncio.ensure_future(end.wait())}
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
        for task in done:
            task.result()

    def succeeded(self) -> None:
        """Begin with the first pause again."""
        self.failures = 0


@dataclass
class _Trouble:
    message: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    failures: int = 0
    closed_until: float = float("-inf")


class Breaker:
    """Spares hosts that do not answer, and those who ask them, for all tasks that ask. Counts by host and reason.

    Opens after `opens_after` failures in a row: then questions fail at once with the last error. After a pause it lets one
    question through; its failure makes the next pause longer, and any answer closes the breaker.
    """

    def __init__(
        self,
        backoff: Backoff,
        reasons: Collection[Reason],
        clock: Clock = SYSTEM_CLOCK,
        rand: Callable[[], float] = random.random,
        *,
        opens_after: int = 3,
        size: int = 1024,
    ) -> None:
        """`reasons`: those that mean that there was no answer. `size`: hosts that are remembered; the oldest is forgotten first."""
        self._backoff = backoff
        self._reasons = reasons
        self._clock = clock
        self._rand = rand
        self._opens_after = opens_after
        self._size = size
        self._hosts: dict[str, dict[Reason, _Trouble]] = {}

    @contextlib.contextmanager
    def guard(self, host: str) -> Iterator[None]:
        """Wrap one question to a host. Raises its last error, without asking, while the breaker is open."""
        self._check(host)
        try:
            yield
        except DroverError as error:
            if error.reason in self._reasons:
                self._failed(host, error)
            else:
                self._answered(host)
            raise
        self._answered(host)

    def _check(self, host: str) -> None:
        now = self._clock.monotonic()
        troubles = self._hosts.get(host, {})
        for reason, trouble in troubles.items():
            if now < trouble.closed_until:
                left = trouble.closed_until - now
                raise DroverError(reason, trouble.message, metadata=trouble.metadata, retry_after=left)
        for trouble in troubles.values():
            if trouble.failures >= self._opens_after:
                trouble.closed_until = now + self._pause(trouble)  # this question goes through; those beside it do not

    def _failed(self, host: str, error: DroverError) -> None:
        if host not in self._hosts and len(self._hosts) >= self._size:
            del self._hosts[next(iter(self._hosts))]
        trouble = self._hosts.setdefault(host, {}).setdefault(error.reason, _Trouble())
        trouble.message, trouble.metadata = error.message, error.metadata
        trouble.failures += 1
        if trouble.failures >= self._opens_after:
            trouble.closed_until = self._clock.monotonic() + self._pause(trouble)
        if trouble.failures == self._opens_after:
            log.warning("a host does not answer and is asked less often", host=host, reason=error.reason, error=error.message)

    def _answered(self, host: str) -> None:
        if any(trouble.failures >= self._opens_after for trouble in self._hosts.pop(host, {}).values()):
            log.info("a host answers again", host=host)

    def _pause(self, trouble: _Trouble) -> float:
        return self._backoff.delay(trouble.failures - self._opens_after + 1, self._rand())


# ---- the policies: first pause, growth, cap

BACKGROUND: Final = Backoff(1.0, 2, 60.0)
"""Work that ended by a bug: most likely the same happens again."""
HYPERVISOR: Final = Backoff(0.2, 2, 2.0)
"""The hypervisor's daemon of this host: cheap to ask, and every guest here waits for it."""
EFFECT: Final = Backoff(0.2, 2, 5.0)
"""An effect that the hypervisor or the journal refused: each try is a job of the hypervisor and a write of the journal."""
OTHER_HOST: Final = Backoff(0.4, 2, 1.0)
"""The agent of another host in a migration: a guest may stand still until it answers, and several drivers may ask it."""
SLOT: Final = Backoff(0.5, 2, 5.0)
"""A slot of another host that is taken: it may be free at any moment, and a try is one cheap question."""
STORE: Final = Backoff(1.0, 2, 5.0)
"""A journal or store that cannot be read or written: its disk does not say when it is well again."""
REGISTRATION: Final = Backoff(1.0, 2, 5.0)
"""A coordinator that is away: all of its hosts come back to it at once, and its operator waits for them."""
HOST_LINK: Final = Backoff(0.2, 2, 120.0)
"""The watch of a host: one that is back says so by registering, which ends the pause."""
PROOF: Final = Backoff(1.0, 2, 5.0)
"""The breaker of hosts that register from an address at which they do not answer: their firewall may be mended at any moment."""
CLIENT_WATCH: Final = Backoff(0.2, 2, 2.0)
"""A client's watch of a migration: somebody looks at it."""
