"""What the client returns: frozen, typed, with units. Memory in bytes, rates in bytes per second, times in seconds.

Each value keeps the message that it was made of in `proto`, for what is not spelled out here and for JSON.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from agent.open_enum import OpenEnum
from agent.whereabouts import Whereabouts, whereabouts
from drover.agent.v1 import handshake_pb2, host_pb2, migration_pb2, options_pb2
from drover.coordinator.v1 import host_pb2 as cluster_pb2


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


class HostState(OpenEnum):
    UNSPECIFIED = "unspecified"
    UP = "up"
    UNREACHABLE = "unreachable"


class DomainState(OpenEnum):
    UNSPECIFIED = "unspecified"
    RUNNING = "running"
    PAUSED = "paused"
    SHUTOFF = "shutoff"
    CRASHED = "crashed"
    OTHER = "other"


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
            downtime=_seconds(message.downtime),
            elapsed=_seconds(message.elapsed),
            eta_low=_seconds(message.eta_low) if message.HasField("eta_low") else None,
            eta_high=_seconds(message.eta_high) if message.HasField("eta_high") else None,
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
            start=_time(message.start_time) if message.HasField("start_time") else None,
            duration=_seconds(message.duration),
            hypervisor_duration=_seconds(message.hypervisor_duration),
        )


@dataclass(frozen=True)
class Failure:
    reason: str
    """UPPER_SNAKE word of `agent.errors.Reason`."""
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
    committed: datetime | None
    """When the guest was known to run at the destination."""
    ended: datetime | None
    duration: float
    """Seconds from the request to the end (or to now)."""
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
            state=MigrationState(_word(migration_pb2.MigrationState, message.state, "MIGRATION_STATE_")),
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
            created=_time(message.create_time) if message.HasField("create_time") else None,
            committed=_time(message.commit_time) if message.HasField("commit_time") else None,
            ended=_time(message.end_time) if message.HasField("end_time") else None,
            duration=_seconds(message.duration),
            hypervisor_duration=_seconds(message.hypervisor_duration),
            driver=message.driver,
            revision=message.revision,
            proto=message,
        )


@dataclass(frozen=True)
class Network:
    name: str
    address: str
    """The host's IP address on it."""
    roles: tuple[str, ...]
    """"migration" (the memory of guests may travel here), "management"."""
    line_rate: int
    """Bytes per second; 0: not known."""


@dataclass(frozen=True)
class Host:
    """A host, as its agent sees it (the last word of it, while it is unreachable)."""

    name: str
    state: HostState
    address: str
    """Of its agent."""
    last_seen: datetime | None
    driver: str
    hypervisor: str
    """Such as "QEMU 7.2.22"."""
    agent_version: str
    incoming_in_use: int
    incoming_limit: int
    """Most migrations that it takes at once."""
    networks: tuple[Network, ...]
    option_support: dict[str, str]
    """For each option "supported", "always_on" or "unsupported"."""
    option_reasons: dict[str, str]
    """For an option that this host lacks though its driver has it: what forbids it."""
    uri_transports: tuple[str, ...]
    bandwidth: bool
    """A limit on the rate can be enforced."""
    split_phases: bool
    draining: bool
    proto: cluster_pb2.ClusterHost = field(repr=False, compare=False)

    @classmethod
    def of_agent(cls, host: host_pb2.Host, address: str) -> "Host":
        """From the word of the host's own agent, which has just answered at that address."""
        return cls.from_proto(cluster_pb2.ClusterHost(host=host, agent_address=address, state=cluster_pb2.HOST_STATE_UP))

    @classmethod
    def from_proto(cls, message: cluster_pb2.ClusterHost) -> "Host":
        host, features = message.host, message.host.migration_features
        return cls(
            name=host.name,
            state=HostState(_word(cluster_pb2.HostState, message.state, "HOST_STATE_")),
            address=message.agent_address,
            last_seen=_time(message.last_seen_time) if message.HasField("last_seen_time") else None,
            driver=host.driver,
            hypervisor=host.hypervisor,
            agent_version=host.agent_version,
            incoming_in_use=host.incoming_in_use,
            incoming_limit=host.incoming_limit,
            networks=tuple(Network(n.name, n.address, tuple(n.roles), n.line_bytes_per_second) for n in host.networks),
            option_support={
                name: _word(options_pb2.OptionSupport, support, "OPTION_SUPPORT_") for name, support in features.options.items()
            },
            option_reasons=dict(features.reasons),
            uri_transports=tuple(features.uri_transports),
            bandwidth=features.bandwidth,
            split_phases=features.split_phases,
            draining=host.draining,
            proto=message,
        )


@dataclass(frozen=True)
class Domain:
    """A guest on a host."""

    host: str
    name: str
    uuid: str
    state: DomainState
    state_reason: str
    memory_bytes: int
    vcpus: int
    persistent: bool
    job: str
    """A migration job that holds it: "none", "outgoing", "incoming", or "unknown" while its process does not answer."""
    silent_for: float
    """Seconds for which its process has not answered; 0 where it does."""
    running_version: str
    """Version of the hypervisor that runs it; empty where that is not told."""
    installed_version: str
    """Version that its next start would run."""
    proto: cluster_pb2.PlacedDomain = field(repr=False, compare=False)

    @classmethod
    def from_proto(cls, message: cluster_pb2.PlacedDomain) -> "Domain":
        domain = message.domain
        return cls(
            host=message.host,
            name=domain.name,
            uuid=domain.uuid,
            state=DomainState(_word(host_pb2.DomainState, domain.state, "DOMAIN_STATE_")),
            state_reason=domain.reason,
            memory_bytes=domain.memory_bytes,
            vcpus=domain.vcpus,
            persistent=domain.persistent,
            job=domain.job or "none",
            silent_for=domain.silence.ToNanoseconds() / 1e9,
            running_version=domain.running_version,
            installed_version=domain.installed_version,
            proto=message,
        )


@dataclass(frozen=True)
class DomainList:
    """Guests, by name, and the hosts that did not answer (whose guests are missing)."""

    domains: tuple[Domain, ...]
    unreachable_hosts: tuple[str, ...] = ()

    @classmethod
    def from_proto(cls, pages: Iterable[cluster_pb2.ListDomainsResponse]) -> "DomainList":
        pages = list(pages)
        domains = [Domain.from_proto(domain) for page in pages for domain in page.domains]
        domains.sort(key=lambda domain: (domain.name, domain.host))
        return cls(tuple(domains), tuple(host for page in pages for host in page.unreachable_hosts))

    @classmethod
    def of_agent(cls, host: str, domains: Iterable[host_pb2.Domain]) -> "DomainList":
        """From the word of the host's own agent."""
        return cls(tuple(Domain.from_proto(cluster_pb2.PlacedDomain(host=host, domain=domain)) for domain in domains))

    def __iter__(self) -> Iterator[Domain]:
        return iter(self.domains)

    def __len__(self) -> int:
        return len(self.domains)


def _seconds(duration: Duration) -> float:
    return duration.ToNanoseconds() / 1e9


def _time(timestamp: Timestamp) -> datetime:
    return timestamp.ToDatetime(tzinfo=UTC)


def _word(enum: type, number: int, prefix: str) -> str:
    """The value's name as a word of ours; of a value that only a newer server knows, its number: "unknown_99"."""
    names = {value: name for name, value in enum.items()}  # type: ignore[attr-defined]
    return str(names.get(number, f"UNKNOWN_{number}")).removeprefix(prefix).lower()
