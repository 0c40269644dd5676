"""What the client returns: frozen, typed, with units. Memory in bytes, rates in bytes per second, times in seconds.

Each value keeps the message that it was made of in `proto`, for what is not spelled out here and for JSON.
"""

from dataclasses import dataclass, field
from datetime import UTC, datetime

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from agent.migration.whereabouts import Whereabouts, whereabouts
from agent.runtime.open_enum import OpenEnum
from drover.agent.v1 import handshake_pb2, migration_pb2


class MigrationState(OpenEnum):
    """Where a migration stands. SUCCEEDED, FAILED and CANCELLED are final."""

    UNSPECIFIED = "unspecified"
    PENDING = "pending"
    ACTIVE = "active"
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    OUTCOME_UNKNOWN = "outcome_unknown"

    @property
    def ended(self) -> bool:
        return self in (MigrationState.SUCCEEDED, MigrationState.FAILED, MigrationState.CANCELLED)

    @property
    def in_doubt(self) -> bool:
        return self is MigrationState.OUTCOME_UNKNOWN


@dataclass(frozen=True)
class Progress:
    """One reading of a transfer, from the hypervisor's own figures. It may go back: see `reason`."""

    iteration: int
    """1 is the first pass over the memory; 0: not said."""
    total_bytes: int
    """Memory of the guest."""
    processed_bytes: int
    """Sent so far; more than `total_bytes` when pages were sent again."""
    remaining_bytes: int
    rate: int
    """Bytes per second on the wire."""
    dirty_rate: int
    """Bytes per second that the guest dirties."""
    downtime: float
    """Seconds: expected while the transfer runs, real when it has ended."""
    elapsed: float
    """Seconds since the transfer began."""
    eta_low: float | None
    """Seconds to the earliest end to expect. None: cannot be said."""
    eta_high: float | None
    """Seconds to the latest end to expect. None: no end in sight at this rate."""
    post_copy: bool
    reason: str
    """Why the estimate went back or cannot be given. Empty: nothing to say."""

    @classmethod
    def from_proto(cls, message: handshake_pb2.Progress) -> "Progress":
        return cls(
            iteration=message.iteration,
            total_bytes=message.total_bytes,
            processed_bytes=message.processed_bytes,
            remaining_bytes=message.remaining_bytes,
            rate=message.bytes_per_second,
            dirty_rate=message.dirty_bytes_per_second,
            downtime=seconds_of(message.downtime),
            elapsed=seconds_of(message.elapsed),
            eta_low=seconds_of(message.eta_low) if message.HasField("eta_low") else None,
            eta_high=seconds_of(message.eta_high) if message.HasField("eta_high") else None,
            post_copy=message.post_copy,
            reason=message.reason,
        )


@dataclass(frozen=True)
class PhaseTiming:
    """How long one phase took on one host, in seconds."""

    phase: str
    start: datetime | None
    duration: float
    hypervisor_duration: float
    """Part of it in calls of the hypervisor."""

    @classmethod
    def from_proto(cls, message: handshake_pb2.PhaseTiming) -> "PhaseTiming":
        return cls(
            phase=message.phase,
            start=time_of(message.start_time) if message.HasField("start_time") else None,
            duration=seconds_of(message.duration),
            hypervisor_duration=seconds_of(message.hypervisor_duration),
        )


@dataclass(frozen=True)
class Failure:
    reason: str
    """UPPER_SNAKE word of `agent.runtime.errors.Reason`."""
    message: str
    """What happened, where the guest runs now, what to do next."""
    metadata: dict[str, str]

    @classmethod
    def from_proto(cls, message: handshake_pb2.Failure) -> "Failure":
        return cls(message.reason, message.message, dict(message.metadata))


@dataclass(frozen=True)
class Migration:
    """A migration at one moment."""

    id: str
    state: MigrationState
    phase: str
    """Under way: "reserve", "begin", "prepare", "perform", "confirm". Empty once it has ended."""
    attempt: int
    domain: str
    """Name of the guest at the source."""
    domain_uuid: str
    source: str
    destination: str
    runs_on: str
    """Host on which the guest runs, as its hypervisor said last. Empty: see `whereabouts`."""
    network: str
    """Network that carries the memory."""
    uri: str
    progress: Progress | None
    timings: tuple[PhaseTiming, ...]
    failure: Failure | None
    """The cause, with the host that has it."""
    other_failures: tuple[Failure, ...]
    """What else was said of it, such as its echo at the other host."""
    waiting_for: str
    warnings: tuple[str, ...]
    created: datetime | None
    """When it was accepted, by the wall clock of its driver."""
    age: float | None
    """Seconds since then, as the server measured when it answered. None: an older server does not tell."""
    age_by_wall_clock: bool
    """It was not measured, but is the difference of two readings of the server's wall clock."""
    committed: datetime | None
    """When the guest was known to run at the destination."""
    ended: datetime | None
    duration: float
    """Seconds from the request to the end."""
    duration_is_least: bool
    """It took at least that: its driver's machine was restarted meanwhile, or another driver took over, and what was before is not
    measured."""
    hypervisor_duration: float
    """Seconds of it in calls of a hypervisor."""
    driver: str
    """Who drives it: name of the coordinator, or of the source's agent."""
    revision: int
    proto: migration_pb2.Migration = field(repr=False, compare=False)

    @property
    def whereabouts(self) -> Whereabouts:
        """Where the guest is, from what the hypervisors of both hosts said last."""
        return whereabouts(self.proto)

    @property
    def overhead(self) -> float:
        """Seconds of `duration` outside calls of the hypervisors: what Drover itself took."""
        return max(0.0, self.duration - self.hypervisor_duration)

    @classmethod
    def from_proto(cls, message: migration_pb2.Migration) -> "Migration":
        failure = message.failure
        return cls(
            id=message.migration_id,
            state=MigrationState(word_of(migration_pb2.MigrationState, message.state, "MIGRATION_STATE_")),
            phase=message.phase,
            attempt=message.attempt,
            domain=message.domain_name or message.spec.domain,
            domain_uuid=message.domain_uuid,
            source=message.source_host or message.spec.source_host,
            destination=message.destination_host or message.spec.destination_host,
            runs_on=message.runs_on,
            network=message.network,
            uri=message.uri,
            progress=Progress.from_proto(message.progress) if message.HasField("progress") else None,
            timings=tuple(PhaseTiming.from_proto(timing) for timing in message.timings),
            failure=Failure.from_proto(failure) if message.HasField("failure") else None,
            other_failures=tuple(Failure.from_proto(other) for other in message.other_failures),
            waiting_for=message.waiting_for,
            warnings=tuple(message.warnings),
            created=time_of(message.create_time) if message.HasField("create_time") else None,
            committed=time_of(message.commit_time) if message.HasField("commit_time") else None,
            ended=time_of(message.end_time) if message.HasField("end_time") else None,
            age=seconds_of(message.age) if message.HasField("age") else None,
            duration=seconds_of(message.duration),
            age_by_wall_clock=message.age_by_wall_clock,
            duration_is_least=message.duration_is_least,
            hypervisor_duration=seconds_of(message.hypervisor_duration),
            driver=message.driver,
            revision=message.revision,
            proto=message,
        )


def seconds_of(duration: Duration) -> float:
    return duration.ToNanoseconds() / 1e9


def time_of(timestamp: Timestamp) -> datetime:
    return timestamp.ToDatetime(tzinfo=UTC)


def word_of(enum: type, number: int, prefix: str) -> str:
    """The value's name as a word of ours; of a value that only a newer server knows, its number: "unknown_99", "unknown_minus_1"."""
    names = {value: name for name, value in enum.items()}  # type: ignore[attr-defined]
    return str(names.get(number, f"UNKNOWN_{number}".replace("-", "MINUS_"))).removeprefix(prefix).lower()
