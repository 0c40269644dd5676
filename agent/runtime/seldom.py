"""Rate limit of log lines that peers can provoke. Pure."""

from typing import Final

SECONDS: Final = 10.0
"""Shortest time between two lines of one kind."""


class Seldom:
    """The limit of one kind of line, with the number of lines held back. Times are monotonic, in seconds."""

    def __init__(self) -> None:
        self.held_back = 0
        self._next = float("-inf")

    def due(self, now: float) -> bool:
        """Return whether a line may be written now."""
        return now >= self._next

    def told(self, now: float) -> int:
        """Note that a line is written now. Return how many were held back since the last one."""
        held_back, self.held_back = self.held_back, 0
        self._next = now + SECONDS
        return held_back
