"""Whether the driver of an attempt still gives signs of life: its calls and its watches."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Final

from agent.handshake.host.records import AttemptRecord

MAX_WAIT: Final = 30.0
"""Longest time in seconds for which a call waits; a caller that wants to wait longer calls again."""

_DRIVERS: Final = 4
"""How many names of drivers are remembered, besides those in the record: a driver that was restarted has a new name."""


def driver_of(request_id: str) -> str:
    """Return the name of the driver that made a request: a request id is that name, "-" and a number. Empty without an id."""
    return request_id.rpartition("-")[0]


class SignsOfLife:
    """Calls under way, and the timer of a silent driver. `record` returns that of the attempt."""

    def __init__(self, record: Callable[[], AttemptRecord]) -> None:
        self.calls = 0
        """Calls and watches of anybody that are under way."""
        self._record = record
        self._of_drivers = 0
        """How many of `calls` come from a known driver: one of which a call was accepted before."""
        self._drivers: list[str] = []
        self._silence: tuple[float, Callable[[], None]] | None = None
        self._silent_at = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def on_silence(self, seconds: float, act: Callable[[], None]) -> None:
        """Call `act` once the driver has given no sign of life (see `called`) for so many seconds."""
        self._silence = (seconds, act)
        self._silent_at = time.monotonic() + seconds
        self._rearm()

    def end(self) -> None:
        """Stop waiting for silence: the attempt has ended, or the agent stops."""
        self._disarm()
        self._silence = None

    def _rearm(self) -> None:
        """Restart the timer. A call under way may turn out to be a new driver's, so it adds the time that a call can last."""
        self._disarm()
        if self._silence is not None and not self._of_drivers and not self._record().final:
            silent_at = self._silent_at + (MAX_WAIT if self.calls else 0.0)
            self._timer = asyncio.get_running_loop().call_later(silent_at - time.monotonic(), self._silence[1])

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    @contextlib.contextmanager
    def called(self, request_id: str) -> Iterator[None]:
        """Count a call (or a driver's watch) as under way.

        A sign of life of the driver is a call that is accepted, or one from a driver of which a call was accepted before. Other
        calls that are refused do not count: anybody may make them.
        """
        driver = driver_of(request_id)
        is_known = is_sign = self.is_driver(driver)
        self.calls += 1
        self._of_drivers += is_known
        self._rearm()
        try:
            yield
            is_sign = True
            if driver:
                self._drivers = [*(other for other in self._drivers if other != driver), driver][-_DRIVERS:]
        finally:
            self.calls -= 1
            self._of_drivers -= is_known
            if is_sign and self._silence is not None:
                self._silent_at = time.monotonic() + self._silence[0]
            self._rearm()

    def is_driver(self, driver: str) -> bool:
        """Return whether a request of that driver was accepted here. Drivers' names are secret: no answer contains one."""
        return bool(driver) and (driver in self._drivers or driver in map(driver_of, self._record().request_ids.values()))
