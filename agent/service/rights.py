"""The right that each RPC needs. A method that is not in the table is not served. For now every caller has every right."""

from collections.abc import Mapping
from enum import StrEnum
from typing import Final


class Right(StrEnum):
    READ = "read"
    """Read, without any change."""
    MIGRATE = "migrate"
    """Start, steer and cancel migrations."""
    OPERATE = "operate"
    """State that a host is dead, remove hosts, and change limits, networks and settings of guests."""
    PEER = "peer"
    """Carry out the phases of a migration, and claim a host for a coordinator."""
    REGISTER = "register"
    """Add a host to the cluster."""


RIGHTS: Final[Mapping[str, Right]] = {
    "/drover.agent.v1.HandshakeService/ReserveSlot": Right.PEER,
    "/drover.agent.v1.HandshakeService/Begin": Right.PEER,
    "/drover.agent.v1.HandshakeService/Prepare": Right.PEER,
    "/drover.agent.v1.HandshakeService/Perform": Right.PEER,
    "/drover.agent.v1.HandshakeService/Finish": Right.PEER,
    "/drover.agent.v1.HandshakeService/Confirm": Right.PEER,
    "/drover.agent.v1.HandshakeService/Abort": Right.PEER,
    "/drover.agent.v1.HandshakeService/Abandon": Right.PEER,
    "/drover.agent.v1.HandshakeService/StartPostCopy": Right.MIGRATE,
    "/drover.agent.v1.HandshakeService/SetBandwidth": Right.MIGRATE,
    "/drover.agent.v1.HandshakeService/SetMaxDowntime": Right.MIGRATE,
    "/drover.agent.v1.HandshakeService/GetRecord": Right.READ,
    "/drover.agent.v1.HandshakeService/WatchRecord": Right.READ,
    "/drover.agent.v1.HandshakeService/ListRecords": Right.READ,
    "/drover.agent.v1.AdmissionService/AcquireSlot": Right.PEER,
    "/drover.agent.v1.AdmissionService/ReleaseSlot": Right.PEER,
    "/drover.agent.v1.AdmissionService/ListSlots": Right.READ,
    "/drover.agent.v1.HostService/GetHost": Right.READ,
    "/drover.agent.v1.HostService/WatchHost": Right.PEER,
    "/drover.agent.v1.HostService/ListDomains": Right.READ,
    "/drover.agent.v1.HostService/GetDomain": Right.READ,
    "/drover.agent.v1.HostService/UpdateHost": Right.OPERATE,
    "/drover.agent.v1.HostService/UpdateDomain": Right.OPERATE,
    "/drover.agent.v1.MigrationService/StartMigration": Right.MIGRATE,
    "/drover.agent.v1.MigrationService/GetMigration": Right.READ,
    "/drover.agent.v1.MigrationService/ListMigrations": Right.READ,
    "/drover.agent.v1.MigrationService/WatchMigration": Right.READ,
    "/drover.agent.v1.MigrationService/DescribeOptions": Right.READ,
    "/drover.agent.v1.MigrationService/WatchMigrations": Right.READ,
    "/drover.agent.v1.MigrationService/CancelMigration": Right.MIGRATE,
    "/drover.agent.v1.MigrationService/UpdateMigration": Right.MIGRATE,
    "/drover.agent.v1.MigrationService/ResolveMigration": Right.OPERATE,
    "/drover.coordinator.v1.HostService/RegisterHost": Right.REGISTER,
    "/drover.coordinator.v1.HostService/GetHost": Right.READ,
    "/drover.coordinator.v1.HostService/ListHosts": Right.READ,
    "/drover.coordinator.v1.HostService/RemoveHost": Right.OPERATE,
    "/drover.coordinator.v1.HostService/ListDomains": Right.READ,
    "/drover.coordinator.v1.HostService/UpdateHost": Right.OPERATE,
    "/drover.coordinator.v1.HostService/ListSlots": Right.READ,
    "/drover.coordinator.v1.HostService/UpdateDomain": Right.OPERATE,
    "/drover.coordinator.v1.NetworkService/CreateNetwork": Right.OPERATE,
    "/drover.coordinator.v1.NetworkService/GetNetwork": Right.READ,
    "/drover.coordinator.v1.NetworkService/ListNetworks": Right.READ,
    "/drover.coordinator.v1.NetworkService/UpdateNetwork": Right.OPERATE,
    "/drover.coordinator.v1.NetworkService/DeleteNetwork": Right.OPERATE,
    "/drover.coordinator.v1.NetworkService/GrantRole": Right.OPERATE,
    "/drover.coordinator.v1.NetworkService/RevokeRole": Right.OPERATE,
    "/grpc.health.v1.Health/Check": Right.READ,
    "/grpc.health.v1.Health/List": Right.READ,
    "/grpc.health.v1.Health/Watch": Right.READ,
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo": Right.READ,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Right.READ,
}
"""By full method name."""
