"""The parameters of one migration's phases, fixed before the first of them."""

from dataclasses import dataclass, field

from drover.agent.v1 import handshake_pb2, host_pb2, migration_pb2, options_pb2


@dataclass(frozen=True)
class Limits:
    """Limits of a transfer that may be changed while it runs."""

    bandwidth: int = 0
    """Most bytes per second. 0: no limit."""
    max_downtime: float = 0.0
    """Longest pause of the guest at the switch-over, in seconds. 0: the hypervisor's default."""
    claim: handshake_pb2.BandwidthClaim = field(default_factory=handshake_pb2.BandwidthClaim)
    """What the source needs to know of its settings and its network if it takes over."""

    @property
    def none(self) -> bool:
        """Whether nothing is limited."""
        return not (self.bandwidth or self.max_downtime)

    @classmethod
    def of(cls, settings: migration_pb2.MigrationSettings, network: migration_pb2.NetworkChoice, share: int = 0) -> "Limits":
        """Return the limits of a migration with these settings, on that network, and that share of the bandwidth; 0: it was given
        none."""
        most = [limit for limit in (settings.bandwidth_bytes_per_second, share) if limit]
        claim = handshake_pb2.BandwidthClaim(
            max_bytes_per_second=settings.bandwidth_bytes_per_second,
            min_bytes_per_second=settings.min_bandwidth_bytes_per_second,
            importance=settings.importance,
        )
        if network.HasField("rules"):
            claim.network = network.network
            claim.network_rules.CopyFrom(network.rules)
        return cls(min(most, default=0), settings.max_downtime.ToNanoseconds() / 1e9, claim)


@dataclass(frozen=True)
class Plan:
    """The parameters of the phases up to Perform; a driver that takes over after Perform needs none."""

    domain_name: str
    domain_uuid: str
    destination_name: str
    source_host: str
    source_agent: str
    destination_host: str
    destination_agent: str
    network: str
    uri: str
    settings: migration_pb2.MigrationSettings
    """As they were when it was planned."""
    options: options_pb2.Options
    requirements: host_pb2.GuestRequirements | None
    network_choice: migration_pb2.NetworkChoice
    """With the addresses of both hosts: the source sends from the one, the destination listens on the other."""
    destination_features: options_pb2.MigrationFeatures
