"""Domain events for any number of consumers of one driver, each with a bounded queue that loses the oldest."""

import asyncio
import weakref
from collections import deque

from agent.hypervisor.base import DomainEvent

BACKLOG = 256
"""Events that a consumer may be behind; one that is slower loses the oldest."""


class EventStream:
    """One consumer's view: an async iterator that ends with its driver, and is forgotten with its last reference."""

    def __init__(self) -> None:
        self._events: deque[DomainEvent] = deque(maxlen=BACKLOG)
        self.lost = False
        """It was too slow once."""
        self._changed = asyncio.Event()
        self._closed = False

    def put(self, event: DomainEvent) -> None:
        self.lost |= len(self._events) == BACKLOG
        self._events.append(event)
        self._changed.set()

    def close(self) -> None:
        self._closed = True
        self._changed.set()

    def __aiter__(self) -> "EventStream":
        return self

    async def __anext__(self) -> DomainEvent:
        while not self._events:
            if self._closed:
                raise StopAsyncIteration
            self._changed.clear()
            await self._changed.wait()
        return self._events.popleft()


class Fanout:
    """Hands each event to every consumer of one driver."""

    def __init__(self) -> None:
        self._streams: weakref.WeakSet[EventStream] = weakref.WeakSet()

    def stream(self) -> EventStream:
        """A new consumer, from now on."""
        stream = EventStream()
        self._streams.add(stream)
        return stream

    def put(self, event: DomainEvent) -> None:
        for stream in list(self._streams):
            stream.put(event)

    def close(self) -> None:
        for stream in list(self._streams):
            stream.close()
