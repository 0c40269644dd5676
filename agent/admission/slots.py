"""The incoming slots of a host: a limit that no peer can raise (requirement A1).

Each destination record that has not ended takes a slot. So slots are journalled with the records, counted again after a restart,
and cannot leak: the end of the record frees the slot.
"""

from collections.abc import Sequence
from statistics import median
from typing import Final

from agent.runtime.errors import DroverError, Reason

_TYPICAL_SECONDS: Final = 10.0
"""Assumed duration of a migration until one has arrived on this host."""

_REMEMBERED: Final = 20
"""How many durations are remembered."""


class Slots:
    """The limit, and how long slots were held lately."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._durations: list[float] = []

    def arrived(self, seconds: float) -> None:
        """Remember for how long a slot was held by a migration that succeeded. Others do not count: they end early, and any caller
        can make as many as it likes."""
        self._durations = [*self._durations, seconds][-_REMEMBERED:]

    def check(self, held: Sequence[float]) -> None:
        """Raise BUSY, with the limit and when to try again, if all slots are taken. `held`: for each taken slot, for how many
        seconds it has been held.
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
