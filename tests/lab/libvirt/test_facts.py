"""What the driver says that a host can, read from real libvirt."""

import asyncio
import os

import pytest

from agent.hypervisor.base import Support
from labkit import Lab

if os.environ.get("CI") != "true":
    pytest.importorskip("libvirt", reason="libvirt-python is not installed")

from agent.hypervisor.libvirt import postcopy
from tests.lab.libvirt.sides import Side


async def test_6_30_post_copy_by_the_user_of_qemu(lab: Lab, sides: tuple[Side, Side]) -> None:
    host, driver = lab["h2"], sides[1].driver
    conf = host.path / "etc/libvirt/qemu.conf"
    before = conf.read_text()
    others = "".join(line for line in before.splitlines(keepends=True) if not line.startswith("user "))
    try:
        for user, forbidden in (("root", False), ("nobody", postcopy.read_sysctl() != "1")):
            conf.write_text(f'user = "{user}"\n{others}')
            await asyncio.to_thread(host.restart_libvirtd)
            features = (await driver.info()).features
            assert features.options["post_copy"] is (Support.UNSUPPORTED if forbidden else Support.SUPPORTED)
            assert (postcopy.SYSCTL in features.reasons.get("post_copy", "")) is forbidden
    finally:
        conf.write_text(before)
        await asyncio.to_thread(host.restart_libvirtd)
