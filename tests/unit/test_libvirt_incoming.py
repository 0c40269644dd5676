"""agent.hypervisor.libvirt.incoming: libvirt's status file identifies a copy whose QEMU does not answer."""

import os
from pathlib import Path

import pytest

if os.environ.get("CI") != "true":
    pytest.importorskip("libvirt", reason="libvirt-python is not installed")

from agent.hypervisor.libvirt.incoming import arrives

STATUS = "<domstatus state='paused' reason='migration' pid='7'><job type='none' async='{job}' phase='prepare'/></domstatus>"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (STATUS.format(job="migration in"), True),
        (STATUS.format(job="migration out"), False),
        ("<domstatus state='running' reason='booted' pid='7'/>", False),
        ("<domstatus", False),
        (None, False),
    ],
)
def test_6_08_only_an_incoming_copy_is_destroyed_while_its_qemu_is_stopped(tmp_path: Path, text: str | None, expected: bool) -> None:
    (tmp_path / "qemu").mkdir()
    if text is not None:
        (tmp_path / "qemu" / "vm1.xml").write_text(text)
    assert arrives("vm1", tmp_path) is expected
    assert not arrives("vm1", None)
