"""The bus of a daemon: a typed event for each change, for the log and other consumers.

An event holds the ids of its subject and, if something failed, the reason; no cookie, XML or secret. A slow consumer is cut off."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from typing import Final, Literal

import msgspec

from agent.runtime.errors import DroverError, Reason

MOST_WAITING: Final = 4096
"""Most events that wait for one consumer."""


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind"):
    """A change. `reason` is a code of `Reason`, `message` is for a person; both are empty if nothing failed."""

    reason: str = ""
    message: str = ""


class RecordChanged(Event, frozen=True, tag="record"):
    """A host's record of an attempt has changed, durably."""

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
    """The state, phase, wait or failure of a migration has changed at its driver."""

    migration_id: str
    attempt: int
    state: str
    phase: str
    source_host: str
    destination_host: str
    domain_uuid: str
    wait_reason: str
    """A `WaitReason` of the wire in lower case; empty: none."""


class SlotChanged(Event, frozen=True, tag="slot"):
    """A slot of this host was taken or freed, or has changed its kind."""

    migration_id: str
    direction: str
    """"incoming" or "outgoing"."""
    slot_kind: Literal["prepared", "transferring"]
    """Of a slot that was freed: the one that it had."""
    change: Literal["taken", "changed", "freed"]
    in_use: int
    """Units of the limit that are taken after the change."""
    limit: int


class HostChanged(Event, frozen=True, tag="host"):
    """A host has changed, by its own agent or its coordinator."""

    host: str
    change: Literal["registered", "up", "unreachable", "removed", "hypervisor", "networks", "stopping"]


class NetworkChanged(Event, frozen=True, tag="network"):
    """A network of the cluster has changed. `message`: its ranges."""

    network: str
    change: Literal["created", "changed", "removed", "role granted", "role revoked"]


class BreakerChanged(Event, frozen=True, tag="breaker"):
    """A host is called less often, as its calls fail for that reason (opened); one call finds out whether it answers again (half
    open); it answers (closed)."""

    host: str
    """Its name, or the address of its agent."""
    change: Literal["opened", "half_open", "closed"]


class StatementChanged(Event, frozen=True, tag="statement"):
    """A statement that a host is dead was made, or was refuted by the host's answer. `message` is its text."""

    migration_id: str
    change: Literal["made", "refuted"]
    dead_host: str
    said_by: str
    """Unverified claim of its author; `CallHandled` has the caller."""


class DriverDecided(Event, frozen=True, tag="decision"):
    """A driver has decided to make other calls. `reason`: why it gives up."""

    migration_id: str
    attempt: int
    calls: tuple[str, ...]
    source_state: str
    destination_state: str


class CallFailed(Event, frozen=True, tag="call failed"):
    """A driver's call to one side has failed."""

    migration_id: str
    attempt: int
    call: str
    side: str


class CallHandled(Event, frozen=True, tag="call"):
    """An RPC that does more than read has ended. `reason`: why it was refused."""

    method: str
    migration_id: str
    right: str
    """The right that it needs."""
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
    """The events since its creation, for one consumer. Ends when it or the bus is closed, after the last event that waits.

    Raises WATCH_TOO_SLOW, after the events that still wait, if it was cut off because `MOST_WAITING` were not read."""

    def __init__(self) -> None:
        self._waiting: deque[Published] = deque()
        self._news = asyncio.Event()
        self.ended = False
        self._missed = 0
        """Revision of the first event that was dropped; 0: none."""

    def take(self, published: Published) -> bool:
        """Add an event, for the bus. Return whether it accepts more."""
        if not self.ended and len(self._waiting) >= MOST_WAITING:
            self._missed = published.revision
            self.close()
        if not self.ended:
            self._waiting.append(published)
            self._news.set()
        return not self.ended

    def close(self) -> None:
        """Accept no more events."""
        self.ended = True
        self._news.set()

    async def __anext__(self) -> Published:
        while not self._waiting and not self.ended:
            self._news.clear()
            await self._news.wait()
        if self._waiting:
            return self._waiting.popleft()
        if self._missed:
            text = f"{MOST_WAITING} events were not read, so those from revision {self._missed} on were dropped; subscribe again"
            raise DroverError(Reason.WATCH_TOO_SLOW, text, metadata={"revision": str(self._missed)})
        raise StopAsyncIteration


class Bus:
    """Hands each event to every subscription. For the event loop's thread only."""

    def __init__(self) -> None:
        self._revision = 0
        self._subscriptions: list[Subscription] = []
        self._closed = False

    def publish(self, event: Event) -> None:
        """Hand the event to all subscriptions. Never waits, never raises."""
        self._revision += 1
        if self._subscriptions:
            published = Published(self._revision, time.time(), event)
            self._subscriptions = [subscription for subscription in self._subscriptions if subscription.take(published)]

    def subscribe(self) -> Subscription:
        """Return a subscription from the next event on. Close it, or it holds events until it is cut off."""
        subscription = Subscription()
        if self._closed:
            subscription.close()
        self._subscriptions = [*(each for each in self._subscriptions if not each.ended), subscription]
        return subscription

    def close(self) -> None:
        """Close every subscription, and later ones at once."""
        self._closed = True
        for subscription in self._subscriptions:
            subscription.close()
