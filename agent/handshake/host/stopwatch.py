"""Times a phase and the hypervisor calls in it, by the monotonic clock of this host."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from agent.handshake.host.records import Timing


@dataclass
class Stopwatch:
    """The time of one phase since this object was made, and of the hypervisor calls in it. `timing` can be read at any time."""

    phase: str
    start: float = field(default_factory=time.time)
    _mark: float = field(default_factory=time.perf_counter)
    _asked: float = 0.0
    _asking_since: float | None = None

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        """Time the hypervisor calls in this block, which must not be nested."""
        self._asking_since = time.perf_counter()
        try:
            yield
        finally:
            self._asked += time.perf_counter() - self._asking_since
            self._asking_since = None

    @property
    def timing(self) -> Timing:
        now = time.perf_counter()
        asking = now - self._asking_since if self._asking_since is not None else 0.0
        return Timing(self.phase, self.start, now - self._mark, self._asked + asking)


@contextlib.contextmanager
def timed(phase: str) -> Iterator[Stopwatch]:
    """Time a phase that is one hypervisor call."""
    watch = Stopwatch(phase)
    with watch.asking():
        yield watch
