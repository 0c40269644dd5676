"""What the client returns: frozen, typed, with units. Memory in bytes, rates in bytes per second, times in seconds.

`proto` of each value is the message that it was made from: for fields that have no attribute here, and for JSON.
"""

from dataclasses import dataclass, field
from datetime import UTC, datetime

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from agent.migration.whereabouts import Whereabouts, whereabouts
from agent.runtime.open_enum import OpenEnum
from drover.agent.v1 import handshake_pb2, migration_pb2


class MigrationState(OpenEnum):
    """The state of a migration. SUCCEEDED, FAILED and CANCELLED are final."""

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
    """One sample of a transfer, from the hypervisor's own figures. The estimate may get worse: see `reason`."""

    iteration: int
    """1 is the first pass over the memory. 0: unknown."""
    total_bytes: int
    """Memory of the guest."""
    processed_bytes: int
    """Sent so far; more than `total_bytes` if pages were sent again."""
    remaining_bytes: int
    rate: int
    """Bytes per second on the wire."""
    dirty_rate: int
    """Bytes per second that the guest dirties."""
    downtime: float
    """Seconds: expected while the transfer runs, measured once it has ended."""
    elapsed: float
    """Seconds since the transfer started."""
    eta_low: float | None
    """Seconds to the earliest expected end. None: unknown."""
    eta_high: float | None
    """Seconds to the latest expected end. None: the transfer does not end at this rate."""
    post_copy: bool
    reason: str
    """Why the estimate got worse or cannot be given; else empty."""

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
    """Seconds of `duration` spent in calls of the hypervisor."""

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
    """An `agent.runtime.errors.Reason`, or a newer server's reason, in UPPER_SNAKE."""
    message: str
    """What happened, where the guest runs now, what to do next."""
    metadata: dict[str, str]

    @classmethod
    def from_proto(cls, message: handshake_pb2.Failure) -> "Failure":
        return cls(message.reason, message.message, dict(message.metadata))


@dataclass(frozen=True)
class Migration:
    """The state of a migration at one moment."""

    id: str
    state: MigrationState
    phase: str
    """While it is active: "reserve", "begin", "prepare", "perform", "confirm". Empty once it has ended."""
    attempt: int
    domain: str
    """Name of the guest at the source."""
    domain_uuid: str
    source: str
    destination: str
    runs_on: str
    """Host on which the guest runs, as last seen by its hypervisor. Empty: see `whereabouts`."""
    network: str
    """Network that carries the memory."""
    uri: str
    progress: Progress | None
    timings: tuple[PhaseTiming, ...]
    failure: Failure | None
    """The cause, with the host on which it happened."""
    other_failures: tuple[Failure, ...]
    """Other errors of the same migration, such as the effect of the failure on the other host."""
    waiting_for: str
    warnings: tuple[str, ...]
    created: datetime | None
    """When it was accepted, by the wall clock of its driver."""
    age: float | None
    """Seconds between `created` and the server's answer. None: an older server does not send it."""
    age_by_wall_clock: bool
    """`age` is the difference of two readings of the server's wall clock, not measured."""
    committed: datetime | None
    """When the driver learned that the guest runs at the destination."""
    ended: datetime | None
    duration: float
    """Seconds from the request to the end."""
    duration_is_least: bool
    """`duration` is a lower bound: the driver's machine was restarted, or another driver took over, and the time before that is not
    measured."""
    hypervisor_duration: float
    """Seconds of `duration` spent in calls of a hypervisor."""
    driver: str
    """Name of its driver: the coordinator, or the source's agent."""
    revision: int
    proto: migration_pb2.Migration = field(repr=False, compare=False)

    @property
    def whereabouts(self) -> Whereabouts:
        """Where the guest is, as last seen by the hypervisors of both hosts."""
        return whereabouts(self.proto)

    @property
    def overhead(self) -> float:
        """Seconds of `duration` outside calls of the hypervisors: the time that Drover itself took."""
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
    """Return the value's name in lower case without `prefix`; for a value of a newer server, its number: "unknown_99",
    "unknown_minus_1".
    """
    names = {value: name for name, value in enum.items()}  # type: ignore[attr-defined]
    return str(names.get(number, f"UNKNOWN_{number}".replace("-", "MINUS_"))).removeprefix(prefix).lower()
