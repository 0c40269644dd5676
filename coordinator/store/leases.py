"""The end of each lease, by an injected clock."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from coordinator.store.base import lease_expired


@dataclass
class _Lease:
    ttl: int
    ends: float


class Leases:
    """The leases and their ends. `clock`: monotonic seconds. A lease has ended as soon as the clock reaches its end: the store
    deletes its keys before it answers any later call.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._leases: dict[int, _Lease] = {}

    def start(self, ttls: Mapping[int, int]) -> None:
        """Add these leases (id and ttl in seconds), or renew them, from now on."""
        now = self._clock()
        self._leases.update({lease_id: _Lease(ttl, now + ttl) for lease_id, ttl in ttls.items()})

    def keepalive(self, lease_id: int) -> int:
        now = self._clock()
        lease = self._leases.get(lease_id)
        if lease is None or lease.ends <= now:
            raise lease_expired(lease_id)
        lease.ends = now + lease.ttl
        return lease.ttl

    def due(self) -> list[int]:
        """Return the leases that have ended but are not forgotten yet, in the order of their ends."""
        now = self._clock()
        return sorted((i for i, lease in self._leases.items() if lease.ends <= now), key=lambda i: (self._leases[i].ends, i))

    def forget(self, lease_id: int) -> None:
        self._leases.pop(lease_id, None)

    def next_end(self) -> float | None:
        """Return the seconds until the next lease ends; None if there is no lease."""
        return max(0.0, min(lease.ends for lease in self._leases.values()) - self._clock()) if self._leases else None
