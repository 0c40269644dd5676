"""The incoming slots of a host: a limit that no peer can raise (requirement A1).

A slot is taken by a destination record that has not ended, so it is journalled with it, counted again after a restart, and
cannot leak: what ends the record frees the slot.
"""

from collections.abc import Sequence
from statistics import median
from typing import Final

from agent.runtime.errors import DroverError, Reason

_TYPICAL_SECONDS: Final = 10.0
"""How long a migration is taken to last while none has arrived on this host."""

_REMEMBERED: Final = 20


class Slots:
    """Counts and remembers; decides nothing but whether there is room."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._durations: list[float] = []

    def arrived(self, seconds: float) -> None:
        """Learn how long a slot is held by a migration that takes place. What is refused, given up or never began says nothing
        about that, and anybody may give up as often as he likes."""
        self._durations = [*self._durations, seconds][-_REMEMBERED:]

    def check(self, held: Sequence[float]) -> None:
        """`held`: for each slot that is taken, since how many seconds.

        Raises BUSY, with the limit and when to try again, where all slots are taken.
        """
        if len(held) < self.limit:
            return
        typical = median(self._durations) if self._durations else _TYPICAL_SECONDS
        retry_after = max(1.0, typical - max(held, default=0.0))
        raise DroverError(
            Reason.BUSY,
            f"all {self.limit} incoming slots of the destination are taken. Nothing was done to the guest; "
            f"try again in about {retry_after:.0f} s, or choose another host",
            metadata={"limit": "incoming", "limit_value": str(self.limit), "in_use": str(len(held))},
            retry_after=retry_after,
        )
