"""The pauses before retries, which grow up to a cap, with full jitter; their clock, which tests replace; and the policies of all
retries. `breaker` is for hosts that many tasks call.

The model is `stamina`. The library itself does not fit: its jitter is added below the cap and vanishes at it, its only clock is the
event loop's, and it neither starts anew after a success (a watch that ran for a day) nor lets an event end a pause."""

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol


class Clock(Protocol):
    """The source of time and of pauses."""

    def monotonic(self) -> float:
        """Return a time in seconds that never goes back."""

    async def sleep(self, seconds: float) -> None: ...


class SystemClock:
    def monotonic(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


SYSTEM_CLOCK: Final = SystemClock()


@dataclass(frozen=True)
class Backoff:
    """The pauses between tries, in seconds: random, below a ceiling that starts at `first` and grows by `factor` up to `cap`."""

    first: float
    factor: float
    cap: float

    def ceiling(self, failures: int) -> float:
        """Return the longest pause after that number of failures (at least 1)."""
        try:
            return min(self.cap, self.first * self.factor ** (failures - 1))
        except OverflowError:
            return self.cap

    def delay(self, failures: int, random: float) -> float:
        """Return the pause after that number of failures, for `random` in [0, 1): full jitter, which avoids waves of tries."""
        return random * self.ceiling(failures)


class Pauses:
    """The pauses of one thing that is tried until it succeeds."""

    def __init__(self, backoff: Backoff, clock: Clock = SYSTEM_CLOCK, rand: Callable[[], float] = random.random) -> None:
        self.failures = 0
        self._backoff = backoff
        self._clock = clock
        self._rand = rand

    async def pause(self, *ends: asyncio.Event) -> None:
        """Wait after a failure, or until one of `ends` is set."""
        self.failures += 1
        sleep = self._clock.sleep(self._backoff.delay(self.failures, self._rand()))
        if not ends:
            await sleep
            return
        tasks = {asyncio.ensure_future(sleep), *(asyncio.ensure_future(end.wait()) for end in ends)}
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
        for task in done:
            task.result()

    def succeeded(self) -> None:
        """Start with the first pause again."""
        self.failures = 0


# ---- the policies: first pause, growth, cap

BACKGROUND: Final = Backoff(1.0, 2, 60.0)
"""Background work that ended by a bug, which most likely happens again."""
HYPERVISOR: Final = Backoff(0.2, 2, 2.0)
"""This host's hypervisor daemon: a call is cheap, and every guest here waits for it."""
EFFECT: Final = Backoff(0.2, 2, 5.0)
"""An effect that the hypervisor or the journal refused: each try is a job of the hypervisor and a write of the journal."""
OTHER_HOST: Final = Backoff(0.4, 2, 1.0)
"""The agent of another host in a migration: a guest may be paused until it answers, and several drivers may call it."""
CANDIDATE: Final = Backoff(4.0, 2, 60.0)
"""The breaker of a peer that may be chosen for a guest: each try without an answer holds up the choice, and others may be chosen."""
ANSWERED: Final = Backoff(0.4, 1, 0.4)
"""The agent of another host, after an answer that the next one may change: a phase has ended, or a decision was made."""
SLOT: Final = Backoff(0.5, 2, 5.0)
"""Both slots of a migration that waits, after an error; a busy host is waited for in its queue instead."""
STORE: Final = Backoff(1.0, 2, 5.0)
"""A journal or store that cannot be read or written: no event reports its recovery."""
REGISTRATION: Final = Backoff(1.0, 2, 5.0)
"""A coordinator that is away: all of its hosts return at once, and its operator waits for them."""
HOST_LINK: Final = Backoff(0.2, 2, 120.0)
"""The watch of a host: one that returns registers itself, which ends the pause."""
PROOF: Final = Backoff(1.0, 2, 5.0)
"""The breaker of hosts that register an address at which they do not answer: their firewall may be corrected at any moment."""
CLIENT_WATCH: Final = Backoff(0.2, 2, 2.0)
"""A client's watch of a migration, which a person may follow."""
