"""What both ends must be able to do before a guest is touched (requirements H4, H5, O1). Pure decisions."""

from collections.abc import Mapping
from typing import Final, Literal

from agent.handshake.host.records import options_from_proto
from agent.hypervisor.base import (
    DomainAmbiguous,
    DomainBusy,
    DomainNotFound,
    Exhausted,
    Features,
    HypervisorError,
    HypervisorUnavailable,
    Incompatible,
    InvalidDocument,
    NoTransfer,
    Requirements,
    Support,
    TransferFailed,
)
from agent.runtime.errors import DroverError, Reason
from agent.runtime.wire import enum_name
from drover.agent.v1 import host_pb2, options_pb2

PROTOCOL_VERSION = 1
"""The handshake that this code speaks; also the oldest that it speaks."""

_NOT_YET = frozenset({"offline"})
"""Options that the handshake cannot honour yet, whatever the driver can: it has no way around Perform."""

_WHERE_ALL_CAN: Final[tuple[Literal["post_copy"], ...]] = ("post_copy",)
"""Options whose default is "on" only where both ends support them."""

_REASONS: Mapping[type[HypervisorError], Reason] = {
    DomainNotFound: Reason.DOMAIN_NOT_FOUND,
    DomainAmbiguous: Reason.DOMAIN_AMBIGUOUS,
    DomainBusy: Reason.DOMAIN_BUSY,
    InvalidDocument: Reason.INVALID_FIELD,
    Incompatible: Reason.INCOMPATIBLE_GUEST,
    Exhausted: Reason.BUSY,
    NoTransfer: Reason.WRONG_PHASE,
    TransferFailed: Reason.TRANSFER_FAILED,
    HypervisorUnavailable: Reason.HYPERVISOR_UNAVAILABLE,
}


def from_hypervisor(error: HypervisorError, host: str, domain: str = "") -> DroverError:
    """The error of a host's hypervisor under Drover's own reason: it names the host and, where one was asked for, the guest, and
    keeps code and message as metadata.
    """
    reason = _REASONS.get(type(error), Reason.HYPERVISOR_FAILED)
    named = {"host": host, "domain": domain} if domain else {"host": host}
    return DroverError(reason, f"{host}: {error}", metadata={**error.native, **named})


def features_to_proto(features: Features) -> options_pb2.MigrationFeatures:
    return options_pb2.MigrationFeatures(
        options={
            name: options_pb2.OptionSupport.Value(f"OPTION_SUPPORT_{support.name}")
            for name, support in features.options.items()
            if name not in _NOT_YET
        },
        uri_transports=features.uri_transports,
        bandwidth=features.bandwidth,
        split_phases=features.split_phases,
        first_port=features.ports[0],
        last_port=features.ports[1],
        bandwidth_unit=features.bandwidth_unit,
        reasons=features.reasons,
    )


def support_of(features: options_pb2.MigrationFeatures, option: str) -> Support:
    """Of an option that it does not name, or of which it says what this version does not know: unsupported."""
    word = enum_name(options_pb2.OptionSupport, features.options.get(option, options_pb2.OPTION_SUPPORT_UNSUPPORTED)).upper()
    return Support.__members__.get(word, Support.UNSUPPORTED)


def check_options(options: options_pb2.Options, features: options_pb2.MigrationFeatures, end: str) -> None:
    """An explicit word that this end cannot honour is an error naming the option and the end.

    Raises:
        DroverError: OPTION_UNSUPPORTED.
    """
    for option, wanted in options_from_proto(options).items():
        support = support_of(features, option)
        if (wanted and support is Support.UNSUPPORTED) or (not wanted and support is Support.ALWAYS_ON):
            why = features.reasons.get(option) or f"there it is {support.value.replace('_', ' ')}"
            raise DroverError(
                Reason.OPTION_UNSUPPORTED,
                f"option {option}={'on' if wanted else 'off'} cannot be honoured by {end}: {why}. "
                "Nothing was done to the guest; leave the option out",
                metadata={"option": option, "end": end, "support": support.value},
            )


def settled(options: options_pb2.Options, *ends: options_pb2.MigrationFeatures) -> options_pb2.Options:
    """The options with an explicit "off" for each that is on by itself, but not where one of these ends lacks it."""
    result = options_pb2.Options()
    result.CopyFrom(options)
    for option in _WHERE_ALL_CAN:
        if not result.HasField(option) and any(support_of(features, option) is Support.UNSUPPORTED for features in ends):
            setattr(result, option, False)
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


def requirements_from_proto(message: host_pb2.GuestRequirements) -> Requirements:
    return Requirements(
        name=message.name,
        uuid=message.uuid,
        memory_bytes=message.memory_bytes,
        vcpus=message.vcpus,
        arch=message.arch,
        machine=message.machine,
        virt_type=message.virt_type,
        cpu=message.cpu,
        host_cpu=message.host_cpu,
    )
