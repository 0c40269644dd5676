"""The changes of the last revisions, kept once for all watches.

A watch has no queue, only the revision that it reads next. A slow reader costs no memory; when the changes that it needs next have
left the history, its watch raises WATCH_TOO_SLOW and the reader lists again.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable
from typing import Final

from agent.runtime.errors import DroverError, Reason
from coordinator.store.base import Changes

MAX_REVISIONS: Final = 4096
"""Largest number of revisions that are kept, …"""
MAX_BYTES: Final = 16 * 1024 * 1024
"""… and largest size of their keys and values together."""


class History:
    """The history from `revision`, the store's present one, on; earlier changes are unknown."""

    def __init__(self, revision: int, max_revisions: int = MAX_REVISIONS, max_bytes: int = MAX_BYTES) -> None:
        self.last = revision
        self.oldest = revision + 1
        """The oldest revision from which a watch can start."""
        self.closed = False
        self._max_revisions = max_revisions
        self._max_bytes = max_bytes
        self._kept: deque[Changes] = deque()
        self._bytes = 0
        self._news = asyncio.Event()

    def append(self, base: int, batches: Iterable[Changes]) -> None:
        """Add the changes that took place after the store's revision `base`.

        A `base` beyond the last known revision means that changes were missed (a commit whose outcome was not known in time). No
        watch may skip them, so the history is emptied and every watch that has not read past them raises WATCH_TOO_SLOW.
        """
        if base > self.last:
            self._kept.clear()
            self._bytes = 0
            self.last, self.oldest = base, base + 1
        for changes in batches:
            self._kept.append(changes)
            self._bytes += _size(changes)
            self.last = changes.revision
        while len(self._kept) > self._max_revisions or self._bytes > self._max_bytes:
            dropped = self._kept.popleft()
            self._bytes -= _size(dropped)
            self.oldest = dropped.revision + 1
        self._wake()

    def close(self) -> None:
        """End every watch, also those that wait."""
        self.closed = True
        self._wake()

    def watch(self, prefix: str, from_revision: int) -> "Watch":
        return Watch(self, prefix, from_revision or self.last + 1)

    async def news(self) -> None:
        """Return when changes were appended, or the history was closed."""
        await self._news.wait()

    def at(self, revision: int) -> Changes:
        """Return the changes of a revision from `oldest` to `last`; the kept revisions have no gap."""
        return self._kept[revision - self.oldest]

    def _wake(self) -> None:
        # A new Event for the next waiters, so that waiters need not register.
        self._news.set()
        self._news = asyncio.Event()


class Watch(AsyncIterator[Changes]):
    """The iterator of `Store.watch`."""

    def __init__(self, history: History, prefix: str, next_revision: int) -> None:
        self._history = history
        self._prefix = prefix
        self._next = next_revision

    async def __anext__(self) -> Changes:
        history = self._history
        while not history.closed:
            if self._next < history.oldest:
                raise self._too_slow()
            if self._next > history.last:
                await history.news()
                continue
            changes = self._mine(history.at(self._next))
            self._next += 1
            if changes is not None:
                return changes
        raise StopAsyncIteration

    def _mine(self, changes: Changes) -> Changes | None:
        events = tuple(event for event in changes.events if event.key.startswith(self._prefix))
        return Changes(changes.revision, events) if events else None

    def _too_slow(self) -> DroverError:
        return DroverError(
            Reason.WATCH_TOO_SLOW,
            f"the changes of revision {self._next} are no longer kept (the oldest are of {self._history.oldest}): "
            "list again, and watch from the revision after that of the list",
            metadata={
                "revision": str(self._next),
                "oldest_revision": str(self._history.oldest),
                "last_revision": str(self._history.last),
            },
        )


def _size(changes: Changes) -> int:
    return sum(len(event.key) + (len(event.now.value) if event.now is not None else 0) for event in changes.events)
