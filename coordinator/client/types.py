"""What the client returns: frozen, typed, with units. Memory in bytes, rates in bytes per second, times in seconds.

`proto` of each value is the message that it was made from: for fields that have no attribute here, and for JSON.
"""

from dataclasses import dataclass, field
from datetime import datetime

from agent.migration.whereabouts import Whereabouts, whereabouts
from agent.runtime.open_enum import OpenEnum
from coordinator.client.convert import FromWire, wire
from drover.agent.v1 import migration_pb2


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


@dataclass(frozen=True, kw_only=True)
class Progress(FromWire):
    """One sample of a transfer, from the hypervisor's own figures. The estimate may get worse: see `reason`."""

    iteration: int
    """1 is the first pass over the memory. 0: unknown."""
    total_bytes: int
    """Memory of the guest."""
    processed_bytes: int
    """Sent so far; more than `total_bytes` if pages were sent again."""
    remaining_bytes: int
    rate: int = wire("bytes_per_second")
    """Bytes per second on the wire."""
    dirty_rate: int = wire("dirty_bytes_per_second")
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


@dataclass(frozen=True, kw_only=True)
class PhaseTiming(FromWire):
    """How long one phase took on one host, in seconds."""

    phase: str
    start: datetime | None = wire("start_time")
    duration: float
    hypervisor_duration: float
    """Seconds of `duration` spent in calls of the hypervisor."""


@dataclass(frozen=True, kw_only=True)
class Failure(FromWire):
    reason: str
    """An `agent.runtime.errors.Reason`, or a newer server's reason, in UPPER_SNAKE."""
    message: str
    """What happened, where the guest runs now, what to do next."""
    metadata: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Wait(FromWire):
    """What a migration waits for, with its figures."""

    reason: str
    """A `WaitReason` of the wire, such as "slot", "outgoing_slot" or "any_host"."""
    host: str
    """Host whose limit or answer it waits for."""
    limit: str
    """Name of the limit. Empty: it waits for none."""
    limit_value: int
    in_use: int
    """Units of the limit that are taken."""
    holders: tuple[str, ...]
    """Migrations that hold it, at most 8."""
    position: int
    """Place in the queue, from 1. 0: it is in no queue."""
    queue_length: int
    estimate_low: float | None
    """Likely seconds until its turn, at least. None: unknown."""
    estimate_high: float | None
    alternative_hosts: tuple[str, ...]
    """Hosts that could take the guest now."""


@dataclass(frozen=True, kw_only=True)
class Migration(FromWire):
    """The state of a migration at one moment."""

    id: str = wire("migration_id")
    state: MigrationState
    phase: str
    """While it is active: "reserve", "begin", "prepare", "perform", "confirm". Empty once it has ended."""
    attempt: int
    domain: str = wire("domain_name", "spec.domain")
    """Name of the guest at the source."""
    domain_uuid: str
    source: str = wire("source_host", "spec.source_host")
    destination: str = wire("destination_host", "spec.destination_host")
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
    wait_reason: str
    """The reason of `waiting_for` as a code, such as "slot" or "host_unreachable"; "unspecified": none."""
    wait: Wait | None
    """What it waits for, with figures. None: nothing."""
    warnings: tuple[str, ...]
    created: datetime | None = wire("create_time")
    """When it was accepted, by the wall clock of its driver."""
    age: float | None
    """Seconds between `created` and the server's answer. None: an older server does not send it."""
    age_by_wall_clock: bool
    """`age` is the difference of two readings of the server's wall clock, not measured."""
    committed: datetime | None = wire("commit_time")
    """When the driver learned that the guest runs at the destination."""
    ended: datetime | None = wire("end_time")
    slot_duration: float | None
    """Seconds from the request until it had its slot. None: it has none yet, or another driver took it."""
    duration: float
    """Seconds from the request to the end."""
    duration_is_least: bool
    """`duration` is a lower bound: the driver's machine was restarted, or another driver took over, and the time before that is not
    measured."""
    hypervisor_duration: float
    """Seconds of `duration` spent in calls of a hypervisor."""
    tenant: str
    """Tenant of the guest. Empty: none."""
    importance: str = wire("settings.importance")
    bandwidth: int = wire("settings.bandwidth_bytes_per_second")
    """Most bytes per second. 0: no limit."""
    min_bandwidth: int = wire("settings.min_bandwidth_bytes_per_second")
    """Least bytes per second that it is guaranteed. 0: none."""
    max_downtime: float | None = wire("settings.max_downtime")
    """Longest pause at the switch-over. None: the hypervisor's default."""
    slot_wait: float | None = wire("settings.slot_wait")
    """Seconds for which it may wait for its slots, from the request on. None: it does not wait."""
    applied_bandwidth: int = wire("applied_bandwidth_bytes_per_second")
    """Limit of the transfer as the source's hypervisor reports it. 0: no limit, or no transfer yet."""
    applied_max_downtime: float | None
    """Longest pause as the source's hypervisor reports it. None: not read."""
    driver: str
    """Name of its driver: the coordinator, or the source's agent."""
    revision: int
    proto: migration_pb2.Migration = field(repr=False, compare=False)

    @property
    def whereabouts(self) -> Whereabouts:
        """Where the guest is, as last seen by the hypervisors of both hosts."""
        return whereabouts(self.proto)

    @property
    def waited_in_vain(self) -> bool:
        """Whether it failed while it waited for its slots, whatever the reason: its guest was not touched."""
        had_slot = self.proto.HasField("slot_duration")
        return self.state is MigrationState.FAILED and self.proto.HasField("slot_wait") and not had_slot

    @property
    def overhead(self) -> float:
        """Seconds of `duration` that Drover itself took: without calls of the hypervisors and without a wait for the slot."""
        waited = self.slot_duration if self.proto.HasField("slot_wait") else None
        return max(0.0, self.duration - self.hypervisor_duration - (waited or 0.0))
