"""How the lab's hosts are configured: Debian's own way, or with a QEMU that runs as root."""

import os
import pwd
import re
import shutil
from pathlib import Path

import pytest

from tests.kit.lab import Lab, LabError
from tests.kit.lab.settings import SETTINGS

pytestmark = [pytest.mark.timeout(40), pytest.mark.usefixtures("_real_hosts")]

LAB_ID = f"ls{os.getpid() % 10_000_000}"


def test_6_35_a_stock_host_runs_qemu_unprivileged() -> None:
    """As Debian configures it: QEMU without capabilities, in a /dev of its own, and libvirt remembers who owned its files."""
    with Lab.up(f"{LAB_ID}s", hosts=1, setting="stock") as lab:
        host = lab["h1"]
        assert "user =" not in (host.path / "etc/libvirt/qemu.conf").read_text()
        kernel = Path(shutil.copy(lab.kernel, host.path / "var/lib/libvirt/images/kernel"))
        guest = lab.guest("stock", memory_mib=32, kernel=kernel)
        host.start(guest)
        guest.wait_lines(5)
        [qemu] = host.qemu()
        status = Path(f"/proc/{qemu.pid}/status").read_text()
        assert re.search(rf"^Uid:\t{pwd.getpwnam('libvirt-qemu').pw_uid}\b", status, re.MULTILINE)
        assert re.search(r"^CapEff:\t0+$", status, re.MULTILINE)
        assert os.stat(f"/proc/{qemu.pid}/ns/mnt") != os.stat(f"/proc/{host.libvirtd_pid}/ns/mnt")
        assert kernel.owner() == guest.serial_log.owner() == "libvirt-qemu"
        assert os.getxattr(kernel, "trusted.libvirt.security.dac") == b"+0:+0"
        host.destroy_all()
        assert kernel.owner() == "root"


def test_6_35_the_setting_of_a_lab_is_found_again() -> None:
    with Lab.up(f"{LAB_ID}t", hosts=1, setting="stock"):
        assert Lab.attach(f"{LAB_ID}t").setting is SETTINGS["stock"]
    with pytest.raises(LabError, match="there is no lab setting 'suse'; there are stock, root"):
        Lab.up(f"{LAB_ID}t", setting="suse")
