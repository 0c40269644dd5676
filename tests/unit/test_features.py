"""agent.hypervisor.features: what both ends must be able to do, and how a hypervisor's features and errors are sent."""

import dataclasses

import pytest

from agent.hypervisor import base
from agent.hypervisor.base import Features
from agent.hypervisor.features import (
    PROTOCOL_VERSION,
    check_bandwidth,
    check_options,
    check_protocol,
    settled,
    support_of,
)
from agent.hypervisor.options import Support
from agent.hypervisor.reasons import from_hypervisor
from agent.hypervisor.wire import features_to_proto
from agent.runtime.errors import DroverError, Reason
from drover.agent.v1 import options_pb2

MIB = 1 << 20
FEATURES = Features(
    options={
        "live": Support.ALWAYS_ON,
        "post_copy": Support.SUPPORTED,
        "rdma": Support.UNSUPPORTED,
        "offline": Support.SUPPORTED,
    },
    uri_transports=("tcp", "rdma"),
    ports=(49152, 49215),
    bandwidth=True,
    split_phases=False,
)


def test_features_on_the_wire() -> None:
    wire = features_to_proto(FEATURES)
    assert list(wire.uri_transports) == ["tcp", "rdma"]
    assert (wire.first_port, wire.last_port, wire.bandwidth, wire.split_phases) == (49152, 49215, True, False)
    for option in ("live", "post_copy", "rdma"):
        assert support_of(wire, option) is FEATURES.options[option]


def test_a_missing_option_is_unsupported() -> None:
    wire = features_to_proto(FEATURES)
    assert support_of(wire, "tunnelled") is Support.UNSUPPORTED
    wire.options["tunnelled"] = options_pb2.OPTION_SUPPORT_UNSPECIFIED
    assert support_of(wire, "tunnelled") is Support.UNSUPPORTED


def test_an_option_that_the_handshake_cannot_do_is_unsupported() -> None:
    assert support_of(features_to_proto(FEATURES), "offline") is Support.UNSUPPORTED


@pytest.mark.parametrize(
    ("option", "wanted", "good"),
    [
        ("post_copy", True, True),
        ("post_copy", False, True),
        ("live", True, True),
        ("live", False, False),
        ("rdma", True, False),
        ("rdma", False, True),
        ("tunnelled", True, False),
        ("tunnelled", False, True),
    ],
)
def test_a_choice_is_honoured_or_refused_never_ignored(option: str, wanted: bool, good: bool) -> None:
    options = options_pb2.Options(**{option: wanted})  # type: ignore[arg-type]
    if good:
        check_options(options, features_to_proto(FEATURES), "the source h1")
        return
    with pytest.raises(DroverError) as error:
        check_options(options, features_to_proto(FEATURES), "the source h1")
    assert error.value.reason is Reason.OPTION_UNSUPPORTED
    assert (error.value.metadata["option"], error.value.metadata["end"]) == (option, "the source h1")
    assert f"{option}={'on' if wanted else 'off'}" in error.value.message


def test_no_choice_passes_the_check() -> None:
    check_options(options_pb2.Options(), options_pb2.MigrationFeatures(), "x")


def test_6_30_what_forbids_an_option_is_reported() -> None:
    wire = features_to_proto(dataclasses.replace(FEATURES, options={}, reasons={"post_copy": "the sysctl is 0"}))
    with pytest.raises(DroverError, match="post_copy=on: the sysctl is 0"):
        check_options(options_pb2.Options(post_copy=True), wire, "h1")
    assert settled(options_pb2.Options(live=True), wire) == options_pb2.Options(live=True, post_copy=False)
    assert settled(options_pb2.Options(), features_to_proto(FEATURES)) == options_pb2.Options()


def test_a_limit_that_cannot_be_enforced_is_refused() -> None:
    can, cannot = options_pb2.MigrationFeatures(bandwidth=True), options_pb2.MigrationFeatures()
    check_bandwidth(1, can, "x")
    check_bandwidth(0, cannot, "x")
    with pytest.raises(DroverError, match="h1 cannot enforce") as error:
        check_bandwidth(1, cannot, "h1")
    assert error.value.reason is Reason.BANDWIDTH_UNSUPPORTED


def test_6_07_a_limit_is_rounded_down_to_the_unit_and_refused_below_it() -> None:
    mebibytes = options_pb2.MigrationFeatures(bandwidth=True, bandwidth_unit=MIB)
    assert [check_bandwidth(limit, mebibytes, "x") for limit in (0, MIB, MIB + 1, 3 * MIB - 1)] == [0, MIB, MIB, 2 * MIB]
    for limit in (1, 512 << 10, 1_000_000):
        with pytest.raises(DroverError, match="its lowest limit is 1048576") as error:
            check_bandwidth(limit, mebibytes, "h1")
        assert error.value.reason is Reason.BANDWIDTH_UNSUPPORTED


def test_versions() -> None:
    check_protocol(PROTOCOL_VERSION, PROTOCOL_VERSION, "x")
    check_protocol(0, PROTOCOL_VERSION + 5, "x")
    for oldest, newest in ((PROTOCOL_VERSION + 1, PROTOCOL_VERSION + 2), (0, PROTOCOL_VERSION - 1)):
        with pytest.raises(DroverError, match="h1 supports") as error:
            check_protocol(oldest, newest, "h1")
        assert error.value.reason is Reason.PROTOCOL_MISMATCH


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (base.DomainNotFound("x"), Reason.DOMAIN_NOT_FOUND),
        (base.DomainBusy("x"), Reason.DOMAIN_BUSY),
        (base.Incompatible("x"), Reason.INCOMPATIBLE_GUEST),
        (base.TransferFailed("x"), Reason.TRANSFER_FAILED),
        (base.HypervisorUnavailable("x"), Reason.HYPERVISOR_UNAVAILABLE),
        (base.HypervisorError("x"), Reason.HYPERVISOR_FAILED),
    ],
)
def test_6_14_a_hypervisors_error_names_its_host_and_keeps_its_message(error: base.HypervisorError, reason: Reason) -> None:
    error.native = {"code": "38"}
    ours = from_hypervisor(error, "h2")
    assert (ours.reason, ours.message, ours.metadata) == (reason, "h2: x", {"code": "38", "host": "h2"})
