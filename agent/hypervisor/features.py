"""What both ends must be able to do before a guest is touched (requirements H4, H5, O1). Pure decisions."""

from agent.hypervisor.options import OPTIONS, Support, shown
from agent.hypervisor.wire import options_from_proto
from agent.runtime.errors import DroverError, Reason
from agent.runtime.wire import enum_name
from drover.agent.v1 import options_pb2

PROTOCOL_VERSION = 1
"""The handshake that this code speaks; also the oldest that it speaks."""


def support_of(features: options_pb2.MigrationFeatures, option: str) -> Support:
    """Of an option that it does not name, or of which it says what this version does not know: unsupported."""
    word = enum_name(options_pb2.OptionSupport, features.options.get(option, options_pb2.OPTION_SUPPORT_UNSUPPORTED)).upper()
    return Support.__members__.get(word, Support.UNSUPPORTED)


def check_options(options: options_pb2.Options, features: options_pb2.MigrationFeatures, end: str) -> None:
    """An explicit choice that this end cannot honour is an error that names the option and the end.

    Raises:
        DroverError: OPTION_UNSUPPORTED.
    """
    for option, chosen in options_from_proto(options).items():
        support = support_of(features, option)
        if (chosen and support is Support.UNSUPPORTED) or (not chosen and support is Support.ALWAYS_ON):
            why = features.reasons.get(option) or f"there it is {support.value.replace('_', ' ')}"
            raise DroverError(
                Reason.OPTION_UNSUPPORTED,
                f"option {option}={shown(chosen)} cannot be honoured by {end}: {why}. "
                "Nothing was done to the guest; leave the option out",
                metadata={"option": option, "end": end, "support": support.value},
            )


def settled(options: options_pb2.Options, *ends: options_pb2.MigrationFeatures) -> options_pb2.Options:
    """The options with an explicit "off" for each that is on by itself, but not where one of these ends lacks it."""
    result = options_pb2.Options()
    result.CopyFrom(options)
    chosen = options_from_proto(options)
    for name, option in OPTIONS.items():
        if option.only_if_both and name not in chosen and any(support_of(end, name) is Support.UNSUPPORTED for end in ends):
            setattr(result, name, False)
    return result


def check_bandwidth(bandwidth: int, features: options_pb2.MigrationFeatures, end: str) -> int:
    """The limit that this end enforces, in bytes per second: the one asked for, rounded down to what it can. 0 is no limit.

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
            f"{end} cannot limit a transfer to {bandwidth} bytes per second: its least is {unit} ({unit / (1 << 20):g} MiB/s). "
            "Nothing was done to the guest; give a higher limit, or none",
            metadata={"end": end, "least": str(unit)},
        )
    return bandwidth - bandwidth % unit


def check_protocol(oldest: int, newest: int, end: str) -> None:
    """Both ends must speak a common version of the handshake (requirement H6)."""
    if not oldest <= PROTOCOL_VERSION <= newest:
        raise DroverError(
            Reason.PROTOCOL_MISMATCH,
            f"{end} speaks handshake versions {oldest} to {newest}, and {PROTOCOL_VERSION} is needed: upgrade its agent",
            metadata={"end": end},
        )
