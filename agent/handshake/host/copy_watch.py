"""Watches a copy at the destination while it waits for its stream, and finds out why a copy failed."""

import contextlib
from collections.abc import Callable
from typing import Final

from agent.handshake.host.attempt import Attempt
from agent.handshake.host.phases import LocalHost, failed, failure_of, follow_guest
from agent.handshake.host.waits import mind
from agent.handshake.machines.destination import DestinationState as Dst
from agent.hypervisor.base import HypervisorError
from agent.hypervisor.interface import Incoming
from agent.runtime.errors import DroverError
from agent.runtime.failure import Failure, causes_first

_WAITS: Final = frozenset({Dst.PREPARING, Dst.PREPARED, Dst.ARMED})
"""States in which the copy exists or is being created, and has not received its whole stream."""


class CopyWatch:
    """The watch over the copies of one host."""

    def __init__(self, host: LocalHost, session_of: Callable[[Attempt], Incoming]) -> None:
        self._host = host
        self._session_of = session_of

    def start(self, attempt: Attempt) -> None:
        """Watch until `stop`. Does nothing if it is watched already."""
        if not attempt.running("guest"):
            attempt.start("guest", follow_guest(self._host, attempt, lambda: self._ended(attempt)))
            attempt.start("mind", mind(self._host, attempt, lambda: attempt.record.state in _WAITS))

    @staticmethod
    def stop(attempt: Attempt) -> None:
        attempt.stop("guest")
        attempt.stop("mind")

    async def cause(self, attempt: Attempt, error: HypervisorError | None = None) -> Failure | None:
        """Return why the copy failed, or None. How its process ended, if known, is nearer to the cause than `error` from Finish."""
        death = await self._host.hypervisor.death(attempt.record.destination_name)
        destroyed = await self._session_of(attempt).destroyed()
        failures = causes_first(failure_of(one, self._host.name) for one in (death, destroyed, error) if one is not None)
        return failures[0] if failures else None

    async def explain(self, attempt: Attempt) -> dict[str, object]:
        """Return the failure to add to the record of a copy that was given up: its process may have died just before, and so far
        only the source has noticed.
        """
        was_there = any(timing.phase == "prepare" for timing in attempt.record.timings)  # else an earlier attempt's copy died
        cause = await self.cause(attempt) if was_there else None
        return failed(attempt, cause) if cause is not None else {}

    async def _ended(self, attempt: Attempt) -> None:
        """Record why the copy ended: no Finish may be under way to report it, and the source sees only that its stream broke."""
        if attempt.record.state in (Dst.PREPARED, Dst.ARMED) and (cause := await self.cause(attempt)) is not None:
            with contextlib.suppress(DroverError):  # the journal failed: then Finish reports it
                await attempt.note(**failed(attempt, cause))
