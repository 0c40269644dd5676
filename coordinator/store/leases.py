"""When each lease ends, by a clock that can be given."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from coordinator.store.base import lease_expired


@dataclass
class _Lease:
    ttl: int
    ends: float


class Leases:
    """`clock` gives seconds that never go back. A lease has ended when the clock reaches its end, to the instant: what is
    left to do then (delete its keys) is done before anybody is answered."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._leases: dict[int, _Lease] = {}

    def start(self, ttls: Mapping[int, int]) -> None:
        """These leases live from now on."""
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
        """Those that have ended and are not forgotten yet, the first to end first."""
        now = self._clock()
        return sorted((i for i, lease in self._leases.items() if lease.ends <= now), key=lambda i: (self._leases[i].ends, i))

    def forget(self, lease_id: int) -> None:
        self._leases.pop(lease_id, None)

    def next_end(self) -> float | None:
        """Seconds until the next lease ends; None where there is none."""
        return max(0.0, min(lease.ends for lease in self._leases.values()) - self._clock()) if self._leases else None
