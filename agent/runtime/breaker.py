"""A circuit breaker for hosts that do not answer."""

import contextlib
import random
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field

from agent.runtime.backoff import SYSTEM_CLOCK, Backoff, Clock
from agent.runtime.errors import DroverError, Reason
from agent.runtime.events import BreakerChanged, Bus


@dataclass
class _Trouble:
    message: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    failures: int = 0
    open_until: float = float("-inf")


class Breaker:
    """Shared by all tasks that call the same hosts. Counts failures by host and reason, and publishes its changes.

    Opens after `opens_after` failures in a row: calls then fail at once with the last error. After a pause one call goes through;
    its failure makes the next pause longer, and any answer closes the breaker."""

    def __init__(
        self,
        backoff: Backoff,
        reasons: Collection[Reason],
        bus: Bus,
        clock: Clock = SYSTEM_CLOCK,
        rand: Callable[[], float] = random.random,
        *,
        opens_after: int = 3,
        size: int = 1024,
    ) -> None:
        """`reasons`: those that count as no answer. `size`: most hosts that are counted; the oldest is dropped first."""
        self._backoff = backoff
        self._reasons = reasons
        self._bus = bus
        self._clock = clock
        self._rand = rand
        self._opens_after = opens_after
        self._size = size
        self._hosts: dict[str, dict[Reason, _Trouble]] = {}

    @contextlib.contextmanager
    def guard(self, host: str) -> Iterator[None]:
        """Wrap one call to a host. Raises its last error, without running the block, while the breaker is open."""
        self._check(host)
        try:
            yield
        except DroverError as error:
            if error.reason in self._reasons:
                self._failed(host, error)
            else:
                self._answered(host)
            raise
        self._answered(host)

    def is_open(self, host: str) -> bool:
        """Return whether a call would fail at once."""
        now = self._clock.monotonic()
        return any(now < trouble.open_until for trouble in self._hosts.get(host, {}).values())

    def _check(self, host: str) -> None:
        now = self._clock.monotonic()
        troubles = self._hosts.get(host, {})
        for reason, trouble in troubles.items():
            if now < trouble.open_until:
                left = trouble.open_until - now
                raise DroverError(reason, trouble.message, metadata=trouble.metadata, retry_after=left)
        for reason, trouble in troubles.items():
            if trouble.failures >= self._opens_after:
                trouble.open_until = now + self._pause(trouble)  # this call goes through, concurrent ones do not
                self._bus.publish(BreakerChanged(host, change="half_open", reason=reason))

    def _failed(self, host: str, error: DroverError) -> None:
        if host not in self._hosts and len(self._hosts) >= self._size:
            del self._hosts[next(iter(self._hosts))]
        trouble = self._hosts.setdefault(host, {}).setdefault(error.reason, _Trouble())
        trouble.message, trouble.metadata = error.message, error.metadata
        trouble.failures += 1
        if trouble.failures >= self._opens_after:
            trouble.open_until = self._clock.monotonic() + self._pause(trouble)
        if trouble.failures == self._opens_after:
            self._bus.publish(BreakerChanged(host, change="opened", reason=error.reason, message=error.message))

    def _answered(self, host: str) -> None:
        for reason, trouble in self._hosts.pop(host, {}).items():
            if trouble.failures >= self._opens_after:
                self._bus.publish(BreakerChanged(host, change="closed", reason=reason))

    def _pause(self, trouble: _Trouble) -> float:
        return self._backoff.delay(trouble.failures - self._opens_after + 1, self._rand())
