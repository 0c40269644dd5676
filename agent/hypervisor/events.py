"""Domain events of one driver for any number of consumers. Each consumer has a bounded queue; a full queue drops the oldest."""

import asyncio
import weakref
from collections import deque

from agent.hypervisor.base import DomainEvent

BACKLOG = 256
"""Most events that wait for one consumer; a slower consumer loses the oldest."""


class EventStream:
    """Events for one consumer: an async iterator that ends when the driver closes, and is dropped with its last reference."""

    def __init__(self) -> None:
        self._events: deque[DomainEvent] = deque(maxlen=BACKLOG)
        self.lost = False
        """At least one event was dropped because the consumer was too slow."""
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
    """Distributor of each event to every consumer of one driver."""

    def __init__(self) -> None:
        self._streams: weakref.WeakSet[EventStream] = weakref.WeakSet()

    def stream(self) -> EventStream:
        """Add a consumer: it receives the events from now on."""
        stream = EventStream()
        self._streams.add(stream)
        return stream

    def put(self, event: DomainEvent) -> None:
        for stream in list(self._streams):
            stream.put(event)

    def close(self) -> None:
        for stream in list(self._streams):
            stream.close()
