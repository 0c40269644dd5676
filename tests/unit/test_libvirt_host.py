"""What a host can do, according to libvirt's capabilities and the kernel."""

import os
from pathlib import Path

import pytest

if os.environ.get("CI") != "true":
    pytest.importorskip("libvirt", reason="libvirt-python is not installed")

from agent.hypervisor.libvirt.host import cpu_difference, given_cpu, parse_capabilities
from agent.hypervisor.libvirt.postcopy import SYSCTL, read_sysctl, refusal
from agent.hypervisor.libvirt.unrun import has_disk, is_fixed
from agent.hypervisor.libvirt.versions import started_version


def _capabilities(secmodel: str) -> str:
    return f"<capabilities><host><uuid>u</uuid>{secmodel}</host></capabilities>"


@pytest.mark.parametrize(
    ("secmodel", "uid"),
    [
        ("<secmodel><model>dac</model><baselabel type='kvm'>+64055:+103</baselabel></secmodel>", 64055),
        ("<secmodel><model>none</model></secmodel><secmodel><model>dac</model><baselabel>+0:+0</baselabel></secmodel>", 0),
        ("<secmodel><model>apparmor</model></secmodel>", None),
        ("<secmodel><model>dac</model><baselabel>libvirt-qemu:kvm</baselabel></secmodel>", None),
        ("", None),
    ],
)
def test_6_30_the_user_of_qemu_is_read_from_the_capabilities(secmodel: str, uid: int | None) -> None:
    assert parse_capabilities(_capabilities(secmodel)).qemu_uid == uid


@pytest.mark.parametrize(
    ("sysctl", "uid", "parts"),
    [
        ("1", 64055, ()),
        ("1", None, ()),
        ("0", 0, ()),
        ("0", 987654, (f"{SYSCTL} is 0", "uid 987654", f"sysctl -w {SYSCTL}=1")),
        ("0", None, (f"{SYSCTL} is 0", "ordinary user")),
        ("", 0, (f"no {SYSCTL}",)),
    ],
)
def test_6_30_post_copy_needs_the_sysctl_or_root(sysctl: str, uid: int | None, parts: tuple[str, ...]) -> None:
    why = refusal(sysctl, uid)
    assert bool(why) == bool(parts)
    assert all(part in why for part in parts), why


def test_6_30_a_kernel_without_the_sysctl(tmp_path: Path) -> None:
    assert read_sysctl(tmp_path / "none") == ""
    (tmp_path / "sysctl").write_text("1\n")
    assert read_sysctl(tmp_path / "sysctl") == "1"


_DOMAIN_CAPABILITIES = """<domainCapabilities><cpu><mode name='host-model' supported='yes'><model>EPYC</model><vendor>AMD</vendor>
<feature policy='require' name='avx2'/><feature policy='disable' name='vme'/></mode></cpu></domainCapabilities>"""


class _Connection:
    def __init__(self, xml: str) -> None:
        self.xml = xml

    def getDomainCapabilities(self, *_: object) -> str:  # noqa: N802 - libvirt's name
        return self.xml


def test_6_33_the_cpu_that_qemu_gives_is_read_from_the_domain_capabilities() -> None:
    assert given_cpu(_Connection(_DOMAIN_CAPABILITIES), "x86_64", "pc", "qemu") == "+avx2 -vme model=EPYC vendor=AMD"
    assert given_cpu(_Connection(_DOMAIN_CAPABILITIES.replace("yes", "no")), "x86_64", "pc", "kvm") == ""


@pytest.mark.parametrize(
    ("theirs", "ours", "parts"),
    [
        ("+avx2 model=EPYC", "+avx2 model=EPYC", ()),
        ("+avx2 +avx512f model=EPYC", "+avx2 model=EPYC", ("+avx512f only at the source", "nothing only here")),
        ("model=EPYC", "model=Skylake-Client", ("model=EPYC only at the source", "model=Skylake-Client only here")),
        ("", "model=EPYC", ("the source host does not tell",)),
        ("model=EPYC", "", ("this host does not tell",)),
        ("", "", ("does not tell",)),
        (" ".join(f"+f{number}" for number in range(20)), "+x", ("and 12 more",)),
    ],
)
def test_6_33_the_difference_of_two_host_cpus_is_named(theirs: str, ours: str, parts: tuple[str, ...]) -> None:
    difference = cpu_difference("host-passthrough", theirs, ours)
    assert bool(difference) == bool(parts)
    assert all(part in difference for part in parts), difference


def test_6_33_the_running_version_is_the_one_started_last(tmp_path: Path) -> None:
    log = tmp_path / "web1.log"
    assert started_version(log) == ""
    start = "2026-11-25 18:58:59.4+0000: starting up libvirt version: 9.0.0, package: 9.0.0-4, qemu version: {}, kernel: 6\n"
    log.write_text(start.format("7.2.22Debian 1:7.2+dfsg-7") + "qemu version: 1.0\n" + start.format("10.0.2") + "LC_ALL=C\n")
    assert started_version(log) == "10.0.2"


@pytest.mark.parametrize(
    ("version", "fixed"), [("7.2.22", False), ("9.2.0", False), ("10.0.0", True), ("10.0.2", True), ("11", True)]
)
def test_6_22_versions_of_qemu_that_can_hand_over_inactive_disks(version: str, fixed: bool) -> None:
    assert is_fixed(version) is fixed


@pytest.mark.parametrize(
    ("inside", "has"),
    [
        ("<devices><disk><source file='/a'/></disk></devices>", True),
        ("<devices><disk device='cdrom'/></devices>", False),
        ("<os><nvram>/vars</nvram></os>", True),
        ("<devices/>", False),
    ],
)
def test_6_22_elements_that_qemu_opens_as_an_image(inside: str, has: bool) -> None:
    assert has_disk(f"<domain>{inside}</domain>") is has
