"""What source and destination share: the host that they stand on, and how a request begins or joins a phase."""

import contextlib
import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from agent.errors import DroverError, Reason
from agent.handshake.attempt import Attempt
from agent.handshake.records import Timing
from agent.hypervisor.base import Hypervisor
from drover.agent.v1 import host_pb2, options_pb2

MAX_WAIT: Final = 30.0
"""Longest time in seconds for which a call waits; whoever wants to wait longer calls again."""


@dataclass
class LocalHost:
    """The host on which an engine works."""

    name: str
    hypervisor: Hypervisor
    networks: tuple[host_pb2.Network, ...]
    features: options_pb2.MigrationFeatures
    lease_seconds: float
    takeover_after: float
    draining: bool = False

    def check_not_draining(self) -> None:
        if self.draining:
            raise DroverError(
                Reason.DRAINING,
                f"the agent of {self.name} is stopping and takes no new migration. Nothing was done to the guest",
                retry_after=5.0,
            )


def wait_of(wait: Duration, *, unset: float) -> float:
    """Seconds that a caller wants to wait, at most MAX_WAIT. A field that is not set has neither seconds nor nanos."""
    seconds = wait.seconds + wait.nanos / 1e9
    return min(max(seconds, 0.0), MAX_WAIT) if seconds else unset


def phase_changes(attempt: Attempt, phase: str, request: Message) -> dict[str, Any]:
    """What the record must remember of the request that begins a phase; nothing for one that joins it.

    Raises:
        DroverError: REQUEST_ID_REUSED when the same request id comes with another content.
    """
    request_id = str(getattr(request, "request_id", ""))
    digest = _digest(request)
    record = attempt.record
    known = record.requests.get(phase)
    if known is None:
        return {
            "requests": {**record.requests, phase: digest},
            "request_ids": {**record.request_ids, phase: request_id},
        }
    if request_id and request_id == record.request_ids.get(phase) and digest != known:
        raise DroverError(
            Reason.REQUEST_ID_REUSED,
            f"request id {request_id} was used for another {phase} of this attempt; nothing was changed",
            metadata={"request_id": request_id},
        )
    return {}


def _digest(request: Message) -> str:
    """Of the content, without the id and how long to wait."""
    copy = type(request)()
    copy.CopyFrom(request)
    for name in ("request_id", "wait"):
        if name in copy.DESCRIPTOR.fields_by_name:
            copy.ClearField(name)
    return hashlib.sha256(copy.SerializeToString(deterministic=True)).hexdigest()


@dataclass
class Stopwatch:
    """Times one phase; `timing` can be read when the block has ended."""

    phase: str
    start: float = field(default_factory=time.time)
    _mark: float = field(default_factory=time.perf_counter)
    _seconds: float | None = None

    def stop(self) -> None:
        self._seconds = time.perf_counter() - self._mark

    @property
    def timing(self) -> Timing:
        seconds = self._seconds if self._seconds is not None else time.perf_counter() - self._mark
        return Timing(self.phase, self.start, seconds, seconds)


@contextlib.contextmanager
def timed(phase: str) -> Iterator[Stopwatch]:
    """A call of the hypervisor, timed."""
    watch = Stopwatch(phase)
    try:
        yield watch
    finally:
        watch.stop()
