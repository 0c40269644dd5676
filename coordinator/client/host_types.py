"""What the client returns of hosts, their slots and their guests; see `coordinator.client.types`."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime

from agent.runtime.open_enum import OpenEnum
from coordinator.client.convert import FromWire, wire
from drover.agent.v1 import admission_pb2, host_pb2
from drover.coordinator.v1 import host_pb2 as cluster_pb2


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


@dataclass(frozen=True, kw_only=True)
class Network(FromWire):
    name: str
    address: str
    """IP address of the host on this network."""
    roles: tuple[str, ...]
    """"migration" (the memory of guests may travel here), "management"."""
    line_rate: int = wire("line_bytes_per_second")
    """Bytes per second. 0: unknown."""


@dataclass(frozen=True, kw_only=True)
class Interface(FromWire):
    """A network interface of a host."""

    name: str
    addresses: tuple[str, ...]
    """With their prefix, such as "10.92.0.1/24"."""
    mtu: int
    line_rate: int = wire("line_bytes_per_second")
    """Bytes per second. 0: unknown."""
    up: bool
    """It is up and has a carrier."""


@dataclass(frozen=True, kw_only=True)
class SettingsChange(FromWire):
    """Who changed the settings of a host, when and why."""

    changed_by: str
    """Such as "root@admin1"."""
    changed: datetime | None = wire("change_time")
    """By the wall clock of the host."""
    comment: str


@dataclass(frozen=True, kw_only=True)
class Slot(FromWire):
    """A slot of a host that a migration has, or a migration that waits for one."""

    migration_id: str
    direction: str
    """"incoming" or "outgoing"."""
    kind: str
    """"prepared" or "transferring"; of a waiter, the least kind that it asks for."""
    waiting: bool
    epoch: int
    """Number of the slot, never given twice by its host. 0: it waits."""
    peer: str = wire("peer_host")
    """Host on the other side."""
    importance: str
    """"low", "medium", "high"; "unspecified" is medium."""
    cost: int
    """Units of the limit that it takes."""
    position: int
    """Place in the queue, from 1. 0: it has the slot."""
    since: datetime | None = wire("since_time")
    """Since when it waits or has the slot, by the wall clock of the host."""
    age: float | None
    """Seconds since `since`, measured by the host. None: it does not say."""
    expires: datetime | None = wire("expire_time")
    """When it ends unless it is renewed. None: with the attempt that holds it."""
    estimate_low: float | None
    """Seconds until its turn, at the earliest. None: unknown, or it has the slot."""
    estimate_high: float | None
    proto: admission_pb2.SlotHolder = field(repr=False, compare=False)


@dataclass(frozen=True, kw_only=True)
class Host(FromWire):
    """A host, as reported by its agent (by its last report, while it is unreachable)."""

    name: str = wire("host.name")
    state: HostState
    address: str = wire("agent_address")
    """Address of its agent."""
    last_seen: datetime | None = wire("last_seen_time")
    driver: str = wire("host.driver")
    hypervisor: str = wire("host.hypervisor")
    """Such as "QEMU 7.2.22"."""
    agent_version: str = wire("host.agent_version")
    incoming_in_use: int = wire("host.incoming_in_use")
    incoming_limit: int = wire("host.incoming_limit")
    """Most incoming transfers at once, in units of cost. 0: it is closed for guests that come in."""
    incoming_queue: int = wire("host.incoming_queue")
    """Migrations that wait for an incoming slot."""
    outgoing_in_use: int = wire("host.outgoing_in_use")
    outgoing_limit: int = wire("host.outgoing_limit")
    """Most outgoing transfers at once. 0: no guest leaves."""
    outgoing_queue: int = wire("host.outgoing_queue")
    prepared_limit: int = wire("host.prepared_limit")
    """Most migrations in each direction that are prepared beside those that transfer."""
    unit_memory: int = wire("host.unit_memory_bytes")
    """Memory in bytes of a guest that costs one unit. 0: every guest costs one."""
    cordoned: bool = wire("host.settings.cordoned")
    """It is not chosen for a migration to any host."""
    settings_change: SettingsChange | None = wire("host.settings_change")
    """The last change of its limits. None: never."""
    cordon_change: SettingsChange | None = wire("host.cordon_change")
    """The last change of `cordoned`."""
    interfaces: tuple[Interface, ...] = wire("host.interfaces")
    networks: tuple[Network, ...] = wire("host.networks")
    option_support: dict[str, str] = wire("host.migration_features.options")
    """For each option "supported", "always_on" or "unsupported"."""
    option_reasons: dict[str, str] = wire("host.migration_features.reasons")
    """For each option that this host cannot use though its driver has it: why not."""
    uri_transports: tuple[str, ...] = wire("host.migration_features.uri_transports")
    bandwidth: bool = wire("host.migration_features.bandwidth")
    """The host can limit the rate of a transfer."""
    split_phases: bool = wire("host.migration_features.split_phases")
    draining: bool = wire("host.draining")
    last_seen_age: float | None
    """Seconds between the host's last message and the coordinator's answer. None: the server does not send it."""
    last_seen_by_wall_clock: bool
    """`last_seen_age` is the difference of two readings of the coordinator's wall clock, not measured."""
    unreachable_reason: str
    """Why it is unreachable; empty if it is up."""
    clock_skew: float | None
    """Seconds by which its wall clock is ahead of the coordinator's; negative: behind. None: unknown."""
    proto: cluster_pb2.ClusterHost = field(repr=False, compare=False)

    @classmethod
    def of_agent(cls, host: host_pb2.Host, address: str) -> "Host":
        """Return the host from the answer of its own agent at `address`."""
        return cls.from_proto(cluster_pb2.ClusterHost(host=host, agent_address=address, state=cluster_pb2.HOST_STATE_UP))


@dataclass(frozen=True, kw_only=True)
class Domain(FromWire):
    """A guest on a host."""

    host: str
    name: str = wire("domain.name")
    uuid: str = wire("domain.uuid")
    state: DomainState = wire("domain.state")
    state_reason: str = wire("domain.reason")
    memory_bytes: int = wire("domain.memory_bytes")
    vcpus: int = wire("domain.vcpus")
    persistent: bool = wire("domain.persistent")
    job: str = wire("domain.job")
    """The migration job that holds it: "none", "outgoing", "incoming", or "unknown" while its process does not answer."""
    silent_for: float = wire("domain.silence")
    """Seconds since its process stopped answering; 0 if it answers."""
    running_version: str = wire("domain.running_version")
    """Version of the hypervisor that runs it. Empty: unknown."""
    installed_version: str = wire("domain.installed_version")
    """Version of the hypervisor that its next start would use."""
    tenant: str = wire("domain.settings.tenant")
    """Tenant to which it belongs. Empty: none."""
    min_bandwidth: int = wire("domain.settings.min_bandwidth_bytes_per_second")
    """Bytes per second that its migrations are guaranteed. 0: none."""
    max_bandwidth: int = wire("domain.settings.max_bandwidth_bytes_per_second")
    """Most bytes per second of its migrations. 0: no limit of its own."""
    proto: cluster_pb2.PlacedDomain = field(repr=False, compare=False)


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
        """Return the guests of a host from the answer of its own agent."""
        return cls(tuple(Domain.from_proto(cluster_pb2.PlacedDomain(host=host, domain=domain)) for domain in domains))

    def __iter__(self) -> Iterator[Domain]:
        return iter(self.domains)

    def __len__(self) -> int:
        return len(self.domains)
