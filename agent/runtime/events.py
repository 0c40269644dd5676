"""What changes in a daemon, as typed events on one bus: the source of the log, and of all who want to know what happens.

Events are values with the ids of what they are about and, where there is one, the reason. They hold no cookie, no XML, no secret.
Whoever changes something publishes; consumers subscribe, and one that falls behind is cut off.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from typing import Final, Literal

import msgspec

from agent.runtime.errors import DroverError, Reason

MOST_WAITING: Final = 4096
"""Events that wait for one consumer at most."""


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind"):
    """Something has changed. `reason` is a code of `Reason`, `message` is for people; both are empty where nothing went wrong."""

    reason: str = ""
    message: str = ""


class RecordChanged(Event, frozen=True, tag="record"):
    """A host's record of an attempt, after the journal has it."""

    migration_id: str
    attempt: int
    role: str
    state: str
    was: str
    """The state before; empty for a new record."""
    peer_host: str
    domain_uuid: str
    waiting_for: str


class MigrationChanged(Event, frozen=True, tag="migration"):
    """The state, the phase or the wait of a migration at its driver, or why it fails."""

    migration_id: str
    attempt: int
    state: str
    phase: str
    source_host: str
    destination_host: str
    domain_uuid: str
    wait_reason: str
    """A `WaitReason` of the wire in lower case; empty: it waits for nothing."""


class SlotChanged(Event, frozen=True, tag="slot"):
    """An incoming slot of this host."""

    migration_id: str
    attempt: int
    change: Literal["taken", "freed"]
    in_use: int
    """After the change."""
    limit: int


class HostChanged(Event, frozen=True, tag="host"):
    """A host, as it says itself or as its coordinator sees it."""

    host: str
    change: Literal["registered", "up", "unreachable", "removed", "hypervisor", "stopping"]


class StatementChanged(Event, frozen=True, tag="statement"):
    """A statement that a host is dead counts from now on, or no longer: the host has answered. `message` is its text."""

    migration_id: str
    change: Literal["made", "refuted"]
    dead_host: str
    said_by: str
    """As whoever made it claims; `CallHandled` tells who called."""


class DriverDecided(Event, frozen=True, tag="decision"):
    """The calls that a driver wants under way are others now. `reason`: why it gives up."""

    migration_id: str
    attempt: int
    calls: tuple[str, ...]
    source_state: str
    destination_state: str


class CallFailed(Event, frozen=True, tag="call failed"):
    """A driver's call to one side."""

    migration_id: str
    attempt: int
    call: str
    side: str


class CallHandled(Event, frozen=True, tag="call"):
    """An RPC that does more than read has ended. `reason`: why it was refused."""

    method: str
    migration_id: str
    right: str
    """That it needs."""
    caller: str
    """As the server sees it."""
    milliseconds: float


class Published(msgspec.Struct, frozen=True):
    """An event on the bus."""

    revision: int
    """Rises by one with each event of this daemon's life."""
    time: float
    """Unix time in seconds."""
    event: Event


class Subscription(AsyncIterator[Published]):
    """The events since it was made, for one consumer. Ends with the bus or when it is closed, after the last event that waits.

    Raises WATCH_TOO_SLOW, after the events that still waited, once `MOST_WAITING` were not read: then it has been cut off.
    """

    def __init__(self) -> None:
        self._waiting: deque[Published] = deque()
        self._news = asyncio.Event()
        self._ended = False
        self._missed = 0
        """Revision of the first event that was left out; 0: none."""

    def take(self, published: Published) -> bool:
        """For the bus. Return whether it takes more."""
        if not self._ended and len(self._waiting) >= MOST_WAITING:
            self._missed = published.revision
            self.close()
        if not self._ended:
            self._waiting.append(published)
            self._news.set()
        return not self._ended

    def close(self) -> None:
        """Take no more events."""
        self._ended = True
        self._news.set()

    async def __anext__(self) -> Published:
        while not self._waiting and not self._ended:
            self._news.clear()
            await self._news.wait()
        if self._waiting:
            return self._waiting.popleft()
        if self._missed:
            text = f"{MOST_WAITING} events waited to be read, so no more were kept from revision {self._missed} on; subscribe again"
            raise DroverError(Reason.WATCH_TOO_SLOW, text, metadata={"revision": str(self._missed)})
        raise StopAsyncIteration


class Bus:
    """Hands each event to every subscription. For the event loop's thread only."""

    def __init__(self) -> None:
        self._revision = 0
        self._subscriptions: list[Subscription] = []
        self._closed = False

    def publish(self, event: Event) -> None:
        """Never waits, never raises."""
        self._revision += 1
        if self._subscriptions:
            published = Published(self._revision, time.time(), event)
            self._subscriptions = [subscription for subscription in self._subscriptions if subscription.take(published)]

    def subscribe(self) -> Subscription:
        """From the next event on. Close it, or it holds `MOST_WAITING` events until it is cut off."""
        subscription = Subscription()
        if self._closed:
            subscription.close()
        self._subscriptions.append(subscription)
        return subscription

    def close(self) -> None:
        """End every subscription, and those that are still to come."""
        self._closed = True
        for subscription in self._subscriptions:
            subscription.close()
