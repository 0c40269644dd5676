"""Checks that both ends support a migration before a guest is touched (requirements H4, H5, O1). Pure decisions."""

from google.protobuf.duration_pb2 import Duration

from agent.hypervisor.options import OPTIONS, Support, shown
from agent.hypervisor.wire import options_from_proto
from agent.runtime.errors import DroverError, Reason, invalid_field
from agent.runtime.wire import enum_name
from drover.agent.v1 import options_pb2

PROTOCOL_VERSION = 1
"""Version of the handshake that this code supports; it supports no older one."""


LEAST_DOWNTIME = 0.001
"""Shortest pause at the switch-over, in seconds, that can be asked for."""


def support_of(features: options_pb2.MigrationFeatures, option: str) -> Support:
    """Return a host's support for an option; UNSUPPORTED where it is missing, or has a value that this version does not know."""
    name = enum_name(options_pb2.OptionSupport, features.options.get(option, options_pb2.OPTION_SUPPORT_UNSUPPORTED)).upper()
    return Support.__members__.get(name, Support.UNSUPPORTED)


def check_options(options: options_pb2.Options, features: options_pb2.MigrationFeatures, end: str) -> None:
    """Check that an end supports every option that the user chose.

    Raises:
        DroverError: OPTION_UNSUPPORTED, naming the option and the end.
    """
    for option, chosen in options_from_proto(options).items():
        support = support_of(features, option)
        if (chosen and support is Support.UNSUPPORTED) or (not chosen and support is Support.ALWAYS_ON):
            why = features.reasons.get(option) or f"it is {support.value.replace('_', ' ')} there"
            raise DroverError(
                Reason.OPTION_UNSUPPORTED,
                f"{end} cannot do option {option}={shown(chosen)}: {why}. Nothing was done to the guest; leave the option out",
                metadata={"option": option, "end": end, "support": support.value},
            )


def settled(options: options_pb2.Options, *ends: options_pb2.MigrationFeatures) -> options_pb2.Options:
    """Return the options with an explicit "off" for each that is on by default only if both ends support it, where one end does
    not."""
    result = options_pb2.Options()
    result.CopyFrom(options)
    chosen = options_from_proto(options)
    for name, option in OPTIONS.items():
        if option.only_if_both and name not in chosen and any(support_of(end, name) is Support.UNSUPPORTED for end in ends):
            setattr(result, name, False)
    return result


def check_bandwidth(bandwidth: int, features: options_pb2.MigrationFeatures, end: str) -> int:
    """Return the limit that this end will enforce, in bytes per second: the given one, rounded down to its unit. 0 is no limit.

    Raises:
        DroverError: BANDWIDTH_UNSUPPORTED for one that cannot be enforced; it is never ignored (requirement H5).
    """
    if bandwidth and not features.bandwidth:
        raise DroverError(
            Reason.BANDWIDTH_UNSUPPORTED,
            f"{end} cannot enforce a bandwidth limit. Nothing was done to the guest; leave the limit out",
            metadata={"end": end},
        )
    unit = features.bandwidth_unit or 1
    if 0 < bandwidth < unit:
        raise DroverError(
            Reason.BANDWIDTH_UNSUPPORTED,
            f"{end} cannot limit a transfer to {bandwidth} bytes per second; its lowest limit is {unit} "
            f"({unit / (1 << 20):g} MiB/s). Nothing was done to the guest; give a higher limit, or none",
            metadata={"end": end, "least": str(unit)},
        )
    return bandwidth - bandwidth % unit


def max_downtime_of(message: Duration) -> float:
    """Return the longest pause at the switch-over in seconds. Raises INVALID_FIELD below one millisecond, which is no limit that a
    hypervisor has."""
    seconds = message.ToNanoseconds() / 1e9
    if seconds < LEAST_DOWNTIME:
        raise invalid_field("max_downtime", f"must be at least {LEAST_DOWNTIME:g} s")
    return seconds


def check_protocol(oldest: int, newest: int, end: str) -> None:
    """Raise PROTOCOL_MISMATCH unless that end supports this version of the handshake (requirement H6)."""
    if not oldest <= PROTOCOL_VERSION <= newest:
        raise DroverError(
            Reason.PROTOCOL_MISMATCH,
            f"{end} supports handshake versions {oldest} to {newest}, but {PROTOCOL_VERSION} is needed: upgrade the older agent",
            metadata={"end": end},
        )
