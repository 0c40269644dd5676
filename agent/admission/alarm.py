"""A timer that calls a function at the earliest of the times that it was given."""

import asyncio
from collections.abc import Callable

from agent.runtime.backoff import Clock


class Alarm:
    """Calls `act` once the earliest time has come; `act` gives the next ones."""

    def __init__(self, act: Callable[[], None], clock: Clock) -> None:
        self._act = act
        self._clock = clock
        self._due = float("inf")
        self._timer: asyncio.Task[None] | None = None

    def at(self, time: float) -> None:
        """Set it, if it is not set for an earlier time. Infinite: no time."""
        if time < self._due:
            self.stop()
            self._due = time
            self._timer = asyncio.create_task(self._ring_at(time), name="slots")

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._due, self._timer = float("inf"), None

    async def _ring_at(self, time: float) -> None:
        await self._clock.sleep(max(0.0, time - self._clock.monotonic()))
        self._due, self._timer = float("inf"), None
        self._act()
