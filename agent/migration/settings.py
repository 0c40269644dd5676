"""What may be changed of a migration while it waits or runs. Pure: how its settings begin, change, and limit its transfer."""

from google.protobuf.field_mask_pb2 import FieldMask

from agent.handshake.drive.plan import Limits
from agent.hypervisor.features import check_bandwidth, max_downtime_of
from agent.runtime.errors import invalid_field
from agent.runtime.masks import masked
from agent.runtime.wire import MOST_RATE
from drover.agent.v1 import host_pb2, options_pb2
from drover.agent.v1 import migration_pb2 as pb


def settings_of(spec: pb.MigrationSpec, guest: host_pb2.DomainSettings, default: int = 0) -> pb.MigrationSettings:
    """Return the settings with which a migration starts: its own word, else the guest's, else the network's `default` limit.
    Where the guest's least and most contradict the migration's own, they give way to it."""
    least, most = spec.min_bandwidth_bytes_per_second, spec.bandwidth_bytes_per_second
    if not least and guest.min_bandwidth_bytes_per_second:
        least = min(guest.min_bandwidth_bytes_per_second, most or guest.min_bandwidth_bytes_per_second)
    if not most and (given := guest.max_bandwidth_bytes_per_second or default):
        most = max(given, least)
    settings = pb.MigrationSettings(
        importance=spec.importance or pb.IMPORTANCE_MEDIUM,
        bandwidth_bytes_per_second=most,
        min_bandwidth_bytes_per_second=least,
    )
    if spec.HasField("max_downtime"):
        settings.max_downtime.CopyFrom(spec.max_downtime)
    return settings


def bound_rates(migration: pb.Migration) -> None:
    """Lower rates that no request may have: an older version has stored them, or a host's record has them."""
    for message in (migration.spec, migration.settings):
        for name in ("bandwidth_bytes_per_second", "min_bandwidth_bytes_per_second"):
            if getattr(message, name) > MOST_RATE:
                setattr(message, name, MOST_RATE)


def updated(before: pb.MigrationSettings, given: pb.MigrationSettings, mask: FieldMask) -> pb.MigrationSettings:
    """Return the settings with the masked fields of `given`. Raises INVALID_FIELD for an empty mask or an unknown field."""
    after: pb.MigrationSettings = masked(before, given, mask)
    after.importance = after.importance or pb.IMPORTANCE_MEDIUM
    return after


def check(settings: pb.MigrationSettings, features: options_pb2.MigrationFeatures, end: str) -> None:
    """Check settings against what the source can enforce.

    Raises:
        DroverError: INVALID_FIELD, BANDWIDTH_UNSUPPORTED. Nothing may have been changed before.
    """
    least, most = settings.min_bandwidth_bytes_per_second, settings.bandwidth_bytes_per_second
    if most and least > most:
        text = f"the least bandwidth, {least} bytes per second, is above the most, {most}. Nothing was changed"
        raise invalid_field("min_bandwidth_bytes_per_second", text)
    check_bandwidth(most, features, end)
    check_bandwidth(least, features, end)
    if settings.HasField("max_downtime"):
        max_downtime_of(settings.max_downtime)


def check_downtime_kept(before: pb.MigrationSettings, after: pb.MigrationSettings) -> None:
    """Raise INVALID_FIELD for a reset of the longest pause of a transfer that runs: no hypervisor tells its default then."""
    if before.HasField("max_downtime") and not after.HasField("max_downtime"):
        raise invalid_field("max_downtime", "cannot be reset while the transfer runs; give a value. Nothing was changed")


def limits_of(migration: pb.Migration) -> Limits:
    """Return the limits of the migration's transfer: the smaller of its own limit and its share among others."""
    return Limits.of(migration.settings, migration.network_choice, migration.allotted_bytes_per_second)
