"""The pure functions of the libvirt driver: flags, limits, errors, URIs, capabilities, requirements."""

from dataclasses import replace
from typing import cast

import pytest

libvirt = pytest.importorskip("libvirt", reason="libvirt-python is not installed")

from agent.hypervisor.base import (  # noqa: E402 - after the skip
    DomainBusy,
    DomainNotFound,
    Exhausted,
    HypervisorError,
    HypervisorUnavailable,
    Incompatible,
    InvalidDocument,
    NoTransfer,
)
from agent.hypervisor.libvirt import errors, host, options, phases  # noqa: E402
from agent.hypervisor.libvirt.domain import progress_of, reason_name  # noqa: E402
from agent.hypervisor.libvirt.incoming import migration_uri  # noqa: E402
from agent.hypervisor.options import OPTIONS, Options, Support  # noqa: E402 - after the skip

MIB = 1 << 20
DEFAULTS = (
    libvirt.VIR_MIGRATE_LIVE
    | libvirt.VIR_MIGRATE_PERSIST_DEST
    | libvirt.VIR_MIGRATE_UNDEFINE_SOURCE
    | libvirt.VIR_MIGRATE_CHANGE_PROTECTION
    | libvirt.VIR_MIGRATE_POSTCOPY
)


def test_the_five_phases_are_there() -> None:
    assert phases.available()


def test_defaults() -> None:
    assert options.flags(Options()) == DEFAULTS


def test_7_every_option_that_the_table_gives_a_flag_is_a_switch_with_a_flag_of_its_own() -> None:
    """A value needs one of libvirt's typed parameters, which no option has yet."""
    named = {name for name, option in OPTIONS.items() if option.libvirt}
    assert named == set(options.FLAGS) == {name for name, support in options.SUPPORT.items() if support is Support.SUPPORTED}
    assert len({*options.FLAGS.values()}) == len(named)


@pytest.mark.parametrize("name", sorted(options.FLAGS))
def test_a_choice_is_honoured_both_ways(name: str) -> None:
    flag = options.FLAGS[name]
    assert options.flags(cast(Options, {name: True})) & flag
    assert not options.flags(cast(Options, {name: False})) & flag


@pytest.mark.parametrize("name", sorted(set(OPTIONS) - set(options.FLAGS)))
def test_an_option_without_support_is_refused_by_name_but_may_be_off(name: str) -> None:
    assert options.SUPPORT[name] is Support.UNSUPPORTED
    with pytest.raises(Incompatible, match=name):
        options.flags(cast(Options, {name: True}))
    assert options.flags(cast(Options, {name: False})) == DEFAULTS


@pytest.mark.parametrize("given", [Options(live=False), Options(paused=True)])
def test_postcopy_is_armed_by_default_only_where_libvirt_allows_it(given: Options) -> None:
    assert not options.flags_for(given, "<domain/>") & libvirt.VIR_MIGRATE_POSTCOPY
    assert options.flags_for(given | {"post_copy": True}, "<domain/>") & libvirt.VIR_MIGRATE_POSTCOPY


def test_a_pause_by_the_user_is_marked_in_the_xml() -> None:
    marked = options.mark("<domain/>", "paused")
    flags = options.flags_for(Options(), marked)
    assert flags & libvirt.VIR_MIGRATE_PAUSED
    assert not flags & libvirt.VIR_MIGRATE_POSTCOPY
    assert options.unmarked(marked) == options.unmarked("<domain/>") == "<domain/>"
    assert options.flags_for(Options(), "<domain/>") == DEFAULTS


def test_6_20_a_transient_guest_stays_transient_by_default() -> None:
    marked = options.mark("<domain/>", "transient", "paused")
    assert options.unmarked(marked) == "<domain/>"
    assert not options.flags_for(Options(), marked) & libvirt.VIR_MIGRATE_PERSIST_DEST
    assert options.flags_for(Options(), marked) & libvirt.VIR_MIGRATE_PAUSED
    assert options.flags_for(Options(persist_destination=True), marked) & libvirt.VIR_MIGRATE_PERSIST_DEST


@pytest.mark.parametrize(("limit", "mebibytes"), [(0, 0), (MIB, 1), (2 * MIB - 1, 1), (10**9, 953)])
def test_limits_round_down(limit: int, mebibytes: int) -> None:
    assert options.mebibytes(limit) == mebibytes


@pytest.mark.parametrize("limit", [-1, 1, MIB - 1])
def test_limits_that_cannot_be_enforced(limit: int) -> None:
    with pytest.raises(Incompatible, match=str(limit)):
        options.mebibytes(limit)


@pytest.mark.parametrize(
    ("code", "domain", "message", "wanted"),
    [
        (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_FROM_QEMU, "", DomainNotFound),
        (libvirt.VIR_ERR_INTERNAL_ERROR, libvirt.VIR_FROM_RPC, "client socket is closed", HypervisorUnavailable),
        (libvirt.VIR_ERR_SYSTEM_ERROR, libvirt.VIR_FROM_RPC, "End of file", HypervisorUnavailable),
        (libvirt.VIR_ERR_INTERNAL_ERROR, libvirt.VIR_FROM_QEMU, "unexpectedly closed the monitor", HypervisorError),
        (libvirt.VIR_ERR_OPERATION_INVALID, libvirt.VIR_FROM_QEMU, "domain 'x' is already active", DomainBusy),
        (libvirt.VIR_ERR_OPERATION_INVALID, libvirt.VIR_FROM_QEMU, "domain is not running", HypervisorError),
        (libvirt.VIR_ERR_OPERATION_TIMEOUT, libvirt.VIR_FROM_QEMU, "cannot acquire state change lock", DomainBusy),
        (libvirt.VIR_ERR_MIGRATE_UNSAFE, libvirt.VIR_FROM_QEMU, "", Incompatible),
        (libvirt.VIR_ERR_XML_DETAIL, libvirt.VIR_FROM_DOMAIN, "Document is empty", InvalidDocument),
        (libvirt.VIR_ERR_INTERNAL_ERROR, libvirt.VIR_FROM_QEMU, "missing name element in migration data", InvalidDocument),
        (libvirt.VIR_ERR_OPERATION_INVALID, libvirt.VIR_FROM_QEMU, "domain is not being migrated", NoTransfer),
    ],
)
def test_error_classes(code: int, domain: int, message: str, wanted: type[HypervisorError]) -> None:
    assert errors.class_of(code, domain, message, alive=False) is wanted


@pytest.mark.parametrize(
    ("code", "domain", "message", "wanted"),
    [
        (libvirt.VIR_ERR_SYSTEM_ERROR, libvirt.VIR_FROM_RPC, "unable to connect to server at '10.92.0.2:49152'", HypervisorError),
        (libvirt.VIR_ERR_INTERNAL_ERROR, libvirt.VIR_FROM_QEMU, "Unable to find an unused port in range 'migration'", Exhausted),
        (libvirt.VIR_ERR_OPERATION_INVALID, libvirt.VIR_FROM_QEMU, "domain has active block job", DomainBusy),
    ],
)
def test_6_15_error_classes_while_libvirtd_is_alive(code: int, domain: int, message: str, wanted: type[HypervisorError]) -> None:
    assert errors.class_of(code, domain, message, alive=True) is wanted


def test_6_15_a_refusal_contains_advice() -> None:
    assert "--option unsafe=on" in errors.advised("Unsafe migration: Migration without shared storage is unsafe")
    assert errors.advised("something else") == "something else"


@pytest.mark.parametrize(
    ("uri", "address", "wanted"),
    [
        ("", "10.0.0.1", "tcp://10.0.0.1"),
        ("", "fd00::1", "tcp://[fd00::1]"),
        ("tcp://10.0.0.1:49152", "10.0.0.1", "tcp://10.0.0.1:49152"),
        ("tcp://[fd00::1]:49153", "fd00::1", "tcp://[fd00::1]:49153"),
        ("tcp://[FD00:0::1]/", "fd00::1", "tcp://[fd00::1]"),
        ("tcp://10.0.0.1", "10.0.0.1", "tcp://10.0.0.1"),
    ],
)
def test_migration_uri(uri: str, address: str, wanted: str) -> None:
    assert str(migration_uri(uri, address, (49152, 49215))) == wanted


@pytest.mark.parametrize(
    ("uri", "address"),
    [
        ("rdma://10.0.0.1:49152", "10.0.0.1"),
        ("unix:///tmp/x", "10.0.0.1"),
        ("tcp://10.0.0.2:49152", "10.0.0.1"),
        ("tcp://10.0.0.1:22", "10.0.0.1"),
        ("tcp://10.0.0.1:99999", "10.0.0.1"),
        ("tcp://10.0.0.1:49152?x=y", "10.0.0.1"),
        ("tcp://user@10.0.0.1:49152", "10.0.0.1"),
        ("", ""),
    ],
)
def test_migration_uri_that_this_host_does_not_serve(uri: str, address: str) -> None:
    with pytest.raises(Incompatible):
        migration_uri(uri, address, (49152, 49215))


CAPABILITIES = """\
<capabilities>
  <host><uuid>u-1</uuid><migration_features><live/><uri_transports><uri_transport>tcp</uri_transport>
    <uri_transport>rdma</uri_transport></uri_transports></migration_features></host>
  <guest><os_type>hvm</os_type><arch name='x86_64'>
    <machine maxCpus='255'>pc-i440fx-7.2</machine><machine canonical='pc-q35-7.2' maxCpus='288'>q35</machine>
    <machine maxCpus='288'>pc-q35-6.10</machine><domain type='qemu'/></arch></guest>
</capabilities>"""

DOMAIN = """\
<domain type='qemu'><name>g</name><uuid>u-2</uuid><memory unit='KiB'>65536</memory><vcpu>2</vcpu>
<os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type></os><cpu mode='custom'><model>qemu64</model></cpu></domain>"""


def test_capabilities_and_requirements() -> None:
    capabilities = host.parse_capabilities(CAPABILITIES)
    assert capabilities.host_uuid == "u-1"
    assert capabilities.uri_transports == ("tcp",)  # those of the host that the driver supports
    needs = host.parse_requirements(DOMAIN)
    assert (needs.memory_bytes, needs.vcpus, needs.arch) == (64 * MIB, 2, "x86_64")
    assert needs.cpu == "<cpu mode='custom'><model>qemu64</model></cpu>".replace("'", '"')
    assert host.incompatibilities(capabilities, needs, "QEMU 7.2") == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"machine": "pc-q35-9.9"},
            "machine type pc-q35-9.9 is not supported by QEMU 7.2 here (pc-q35-7.2 is the newest)",
        ),
        ({"machine": "virt-9.9"}, "machine type virt-9.9 is not supported by QEMU 7.2 here"),
        ({"arch": "sparc"}, "architecture sparc is not supported by QEMU 7.2 here"),
        ({"virt_type": "kvm"}, "virtualization type kvm is not available here for x86_64"),
        ({"vcpus": 289}, "machine type pc-q35-7.2 has at most 288 virtual CPUs here, but the guest has 289"),
    ],
)
def test_misfits_are_plain_sentences(change: dict[str, object], sentence: str) -> None:
    needs = replace(host.parse_requirements(DOMAIN), **change)  # type: ignore[arg-type]
    assert host.incompatibilities(host.parse_capabilities(CAPABILITIES), needs, "QEMU 7.2") == [sentence]


def test_a_cpu_that_cannot_be_read_is_a_misfit() -> None:
    needs = replace(host.parse_requirements(DOMAIN), cpu="<cpu mode='custom'")
    assert host.compare_cpu(None, needs).startswith("the description of the guest's CPU cannot be read: ")


def test_progress_units() -> None:
    reading = progress_of({"time_elapsed": 1500, "memory_dirty_rate": 10, "memory_page_size": 4096, "downtime": 300})
    assert (reading.elapsed, reading.dirty_rate, reading.downtime) == (1.5, 40960, 0.3)


def test_reason_names() -> None:
    paused, running = libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_RUNNING
    assert reason_name(paused, libvirt.VIR_DOMAIN_PAUSED_MIGRATION) == "migration"
    assert reason_name(running, libvirt.VIR_DOMAIN_RUNNING_POSTCOPY_FAILED) == "post-copy failed"
    assert reason_name(paused, 999) == "999"
