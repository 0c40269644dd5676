"""What libvirt's capabilities and the kernel say that a host can do."""

import os
from pathlib import Path

import pytest

if os.environ.get("CI") != "true":
    pytest.importorskip("libvirt", reason="libvirt-python is not installed")

from agent.hypervisor.libvirt.host import parse_capabilities
from agent.hypervisor.libvirt.postcopy import SYSCTL, read_sysctl, refusal


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
def test_6_30_the_user_of_qemu_is_read_from_what_libvirt_says(secmodel: str, uid: int | None) -> None:
    assert parse_capabilities(_capabilities(secmodel)).qemu_uid == uid


@pytest.mark.parametrize(
    ("sysctl", "uid", "words"),
    [
        ("1", 64055, ()),
        ("1", None, ()),
        ("0", 0, ()),
        ("0", 987654, (f"{SYSCTL} is 0", "uid 987654", f"sysctl -w {SYSCTL}=1")),
        ("0", None, (f"{SYSCTL} is 0", "ordinary user")),
        ("", 0, (f"no {SYSCTL}",)),
    ],
)
def test_6_30_post_copy_needs_the_sysctl_or_root(sysctl: str, uid: int | None, words: tuple[str, ...]) -> None:
    why = refusal(sysctl, uid)
    assert bool(why) == bool(words)
    assert all(word in why for word in words), why


def test_6_30_a_kernel_without_the_sysctl(tmp_path: Path) -> None:
    assert read_sysctl(tmp_path / "none") == ""
    (tmp_path / "sysctl").write_text("1\n")
    assert read_sysctl(tmp_path / "sysctl") == "1"
