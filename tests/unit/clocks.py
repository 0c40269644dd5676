"""Clocks for `agent.runtime.backoff`: one that runs quicker, and one that does not run by itself."""

import asyncio
import time


class QuickClock:
    """Sleeps for a fraction of the time; measures the real one."""

    def __init__(self, by: float = 20) -> None:
        self._by = by

    def monotonic(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds / self._by)


QUICK = QuickClock()


class FakeClock:
    """Every sleep is over at once, and moves the time on. `slept` has them in order."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)


class StoppedClock(FakeClock):
    """No sleep ends; `now` is moved by the test."""

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        await asyncio.Event().wait()
