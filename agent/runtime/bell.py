"""Tells any number of waiters that something has changed."""

import asyncio


class Bell:
    """Take `next` before you look at the state, then await it: a change between the look and the wait is not missed."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    @property
    def next(self) -> asyncio.Event:
        """Set at the next ring."""
        return self._event

    def ring(self) -> None:
        rung, self._event = self._event, asyncio.Event()
        rung.set()
