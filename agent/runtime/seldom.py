"""Lines of a log that others can provoke: how often they are written does not depend on how often that is done. Pure."""

from typing import Final

SECONDS: Final = 10.0
"""Between two lines of one kind, at least."""


class Seldom:
    """When the next line of one kind may be written, and how many were held back meanwhile. Times are monotonic, in seconds."""

    def __init__(self) -> None:
        self.held_back = 0
        self._next = float("-inf")

    def due(self, now: float) -> bool:
        """Whether a line may be written now."""
        return now >= self._next

    def told(self, now: float) -> int:
        """A line is written now: how many were held back since the one before."""
        held_back, self.held_back = self.held_back, 0
        self._next = now + SECONDS
        return held_back
