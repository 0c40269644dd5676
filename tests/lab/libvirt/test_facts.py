"""What the driver says that a host can, read from real libvirt."""

import asyncio
import os
import re
import shutil
from dataclasses import replace

import pytest

from agent.hypervisor.base import HypervisorUnavailable
from agent.hypervisor.options import Support
from tests.kit.lab import Guest, Lab
from tests.kit.lab.domain import EMULATOR

if os.environ.get("CI") != "true":
    pytest.importorskip("libvirt", reason="libvirt-python is not installed")

from agent.hypervisor.libvirt import postcopy
from tests.lab.libvirt.sides import Side, Start, assert_perfect, becomes


async def test_6_30_post_copy_by_the_user_of_qemu(lab: Lab, sides: tuple[Side, Side]) -> None:
    host, driver = lab["h2"], sides[1].driver
    conf = host.path / "etc/libvirt/qemu.conf"
    before = conf.read_text()
    others = "".join(line for line in before.splitlines(keepends=True) if not line.startswith("user "))

    async def said() -> tuple[Support, bool] | None:
        try:
            features = (await driver.info()).features
        except HypervisorUnavailable:
            return None
        return features.options["post_copy"], postcopy.SYSCTL in features.reasons.get("post_copy", "")

    try:
        for user, forbidden in (("root", False), ("nobody", postcopy.read_sysctl() != "1")):
            conf.write_text(f'user = "{user}"\n{others}')
            await asyncio.to_thread(host.restart_libvirtd)
            expected = (Support.UNSUPPORTED if forbidden else Support.SUPPORTED, forbidden)
            await becomes(said, expected, within=60)  # libvirtd probes every QEMU again, as the other user
    finally:
        conf.write_text(before)
        await asyncio.to_thread(host.restart_libvirtd)


async def test_6_33_a_cpu_of_the_host(lab: Lab, sides: tuple[Side, Side]) -> None:
    source, destination = (side.driver for side in sides)
    guest = lab.guest("maximum", memory_mib=32)
    xml = re.sub(r"<cpu .*</cpu>", "<cpu mode='maximum'/>", guest.xml(), flags=re.DOTALL)
    lab["h1"].virsh("create", "/dev/stdin", stdin=xml)
    _, needs = await source.describe(guest.name)
    assert "model=" in needs.host_cpu
    assert await destination.incompatibilities(needs) == []
    (difference,) = await destination.incompatibilities(replace(needs, host_cpu=f"{needs.host_cpu} +of-another-qemu"))
    assert "+of-another-qemu only at the source" in difference


async def test_6_33_a_guest_whose_qemu_was_replaced_leaves_and_returns(lab: Lab, sides: tuple[Side, Side], start: Start) -> None:
    binary = lab.path / "usr/bin/qemu"
    binary.parent.mkdir(parents=True)
    (lab.path / "usr/lib").symlink_to("/usr/lib")  # it looks for its modules and firmware beside itself
    (lab.path / "usr/share").symlink_to("/usr/share")
    shutil.copy2(EMULATOR, binary)
    guest = lab.guest("replaced", memory_mib=32).with_(emulator=str(binary))
    lab["h1"].start(guest, persistent=True)
    guest.wait_lines(5)
    newer = binary.with_name("qemu.new")
    newer.write_bytes(binary.read_bytes() + b"\0")  # another file, as an upgrade makes it
    newer.chmod(0o755)
    newer.replace(binary)
    listed = {domain.name: domain for domain in await sides[0].driver.list_domains()}
    assert re.fullmatch(r"[\d.]+", listed[guest.name].running_version)
    await start(guest=guest).run()
    assert await sides[1].state(guest) == ("running", "migrated")
    await start(back=True, guest=guest).run()
    assert await sides[0].state(guest) == ("running", "migrated")
    assert_perfect(guest)


async def test_6_33_both_versions_are_listed(sides: tuple[Side, Side], guest: Guest) -> None:
    (listed,) = await sides[0].driver.list_domains()
    assert listed.running_version == listed.installed_version == (await sides[0].driver.info()).hypervisor.removeprefix("QEMU ")
