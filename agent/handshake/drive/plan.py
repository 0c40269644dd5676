"""The parameters of one migration's phases, fixed before the first of them."""

from dataclasses import dataclass

from drover.agent.v1 import host_pb2, migration_pb2, options_pb2


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
    bandwidth: int
    options: options_pb2.Options
    requirements: host_pb2.GuestRequirements | None
    network_choice: migration_pb2.NetworkChoice
    """With the addresses of both hosts: the source sends from the one, the destination listens on the other."""
    destination_features: options_pb2.MigrationFeatures
