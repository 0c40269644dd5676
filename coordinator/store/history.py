"""The changes of the last revisions, kept once for all watches.

A watch has no queue: it is a revision to read next and a wait for news. A reader that is slow costs nothing; when the
changes that it needs next have left the history, it is told so and lists again.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable
from typing import Final

from agent.runtime.errors import DroverError, Reason
from coordinator.store.base import Changes

MAX_REVISIONS: Final = 4096
"""Revisions that are kept …"""
MAX_BYTES: Final = 16 * 1024 * 1024
"""… as long as their keys and values have no more bytes than this together."""


class History:
    """`revision` is the store's revision when this begins; earlier changes are not known."""

    def __init__(self, revision: int, max_revisions: int = MAX_REVISIONS, max_bytes: int = MAX_BYTES) -> None:
        self.last = revision
        self.oldest = revision + 1
        """The oldest revision that a watch can begin with."""
        self.closed = False
        self._max_revisions = max_revisions
        self._max_bytes = max_bytes
        self._kept: deque[Changes] = deque()
        self._bytes = 0
        self._news = asyncio.Event()

    def append(self, base: int, batches: Iterable[Changes]) -> None:
        """The store was at revision `base`, then these changes took place.

        A base beyond what is known means that changes went unseen (a commit whose outcome was not known in time): no watch
        may step over them in silence, so all that are not past them are told to list again.
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
        """Every watch ends, also those that wait."""
        self.closed = True
        self._wake()

    def watch(self, prefix: str, from_revision: int) -> "Watch":
        return Watch(self, prefix, from_revision or self.last + 1)

    async def news(self) -> None:
        """Returns when something was appended, or at the end."""
        await self._news.wait()

    def at(self, revision: int) -> Changes:
        """`oldest` ≤ revision ≤ `last`; the kept revisions have no gap."""
        return self._kept[revision - self.oldest]

    def _wake(self) -> None:
        # A new Event for those who wait next; so nobody needs to sign in or out.
        self._news.set()
        self._news = asyncio.Event()


class Watch(AsyncIterator[Changes]):
    """Iterate over it; see `Store.watch`."""

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
