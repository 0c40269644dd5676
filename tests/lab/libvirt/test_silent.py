"""A QEMU that stands still: what is asked about other guests does not wait for it."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from agent.hypervisor.base import DomainState, Job
from tests.kit.lab import Guest, Lab

if os.environ.get("CI") != "true":
    pytest.importorskip("libvirt", reason="libvirt-python is not installed")

from tests.lab.libvirt.sides import Side, becomes


async def test_6_9_a_silent_guest_does_not_hold_up_the_others(lab: Lab, sides: tuple[Side, Side], guest: Guest) -> None:
    host, driver = lab["h1"], sides[0].driver
    host.start(lab.guest("talkative", memory_mib=32))
    pid = next(qemu.pid for qemu in host.qemu() if qemu.guest == guest.name)
    os.kill(pid, signal.SIGSTOP)
    try:
        asking = asyncio.create_task(
            asyncio.to_thread(host.virsh, "qemu-monitor-command", guest.name, '{"execute":"query-status"}', timeout=60)
        )

        async def silent() -> list[str]:
            async with asyncio.timeout(2):  # what a coordinator grants a host
                found = await driver.list_domains()
            assert [domain.name for domain in found] == sorted([guest.name, "talkative"])
            return [domain.name for domain in found if domain.silent_for]

        await becomes(silent, [guest.name], within=15)
        by_name = {domain.name: domain for domain in await driver.list_domains()}
        assert (by_name[guest.name].state, by_name[guest.name].job) == (DomainState.RUNNING, Job.UNKNOWN)
        async with asyncio.timeout(2):
            asked, _ = await driver.describe(guest.name)
        assert asked.silent_for
        assert (by_name["talkative"].state, by_name["talkative"].job) == (DomainState.RUNNING, Job.NONE)
    finally:
        os.kill(pid, signal.SIGCONT)
    await asking
    await becomes(silent, [])
