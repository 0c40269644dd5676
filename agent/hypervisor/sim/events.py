"""Domain events for any number of readers, each with a bounded queue that loses the oldest."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from weakref import WeakSet

from agent.hypervisor.base import DomainEvent

BEHIND = 256


class Subscription(AsyncIterator[DomainEvent]):
    """One reader, from the moment that it is made; ends when the hypervisor is closed."""

    def __init__(self) -> None:
        self._queue: deque[DomainEvent] = deque(maxlen=BEHIND)
        self._ready = asyncio.Event()
        self._closed = False

    def put(self, event: DomainEvent) -> None:
        self._queue.append(event)
        self._ready.set()

    def close(self) -> None:
        self._closed = True
        self._ready.set()

    async def __anext__(self) -> DomainEvent:
        while not self._queue:
            if self._closed:
                raise StopAsyncIteration
            self._ready.clear()
            await self._ready.wait()
        return self._queue.popleft()


class Hub:
    """Holds its readers weakly: one that is forgotten costs nothing."""

    def __init__(self) -> None:
        self._readers: WeakSet[Subscription] = WeakSet()

    def subscribe(self) -> Subscription:
        reader = Subscription()
        self._readers.add(reader)
        return reader

    def publish(self, event: DomainEvent) -> None:
        for reader in list(self._readers):
            reader.put(event)

    def close(self) -> None:
        for reader in list(self._readers):
            reader.close()
