"""The libvirt driver on real libvirt and QEMU: post-copy, which needs a QEMU that runs as root on an ordinary kernel."""

import asyncio
import os
from collections.abc import Iterator

import pytest

from agent.hypervisor.base import DomainBusy, DomainState, HypervisorError, HypervisorUnavailable
from agent.hypervisor.options import Options
from tests.kit.lab import Guest, Lab

if os.environ.get("CI") != "true":
    pytest.importorskip("libvirt", reason="libvirt-python is not installed")

from tests.lab.libvirt.sides import SLOW, Side, Start, assert_perfect, becomes


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab.up(f"lvp{os.getpid() % 1_000_000}", hosts=2, setting="root") as up:
        yield up


async def test_postcopy(start: Start, sides: tuple[Side, Side], guest: Guest) -> None:
    migration = start(bandwidth=SLOW)
    await migration.prepare()
    armed, performing = migration.arm(), migration.perform()
    await migration.flowing()
    await migration.outgoing.start_postcopy()
    await becomes(lambda: sides[0].state(guest), ("paused", "post-copy"))
    await becomes(lambda: sides[1].state(guest), ("running", "post-copy"))
    domain = await sides[1].driver.get_named(guest.name)
    assert domain.postcopy
    assert domain.state is DomainState.RUNNING
    assert not domain.incoming
    reading = await migration.outgoing.progress()
    assert reading is not None
    assert reading.postcopy
    with pytest.raises(HypervisorError):
        await migration.outgoing.abort()
    with pytest.raises(DomainBusy):
        await sides[1].driver.incoming(str(guest.stable_uuid)).abandon()
    for handle in (migration.outgoing, sides[0].driver.outgoing(migration.uuid)):
        with pytest.raises(DomainBusy):
            await handle.remove(b"", Options())
        with pytest.raises(DomainBusy):
            await handle.resume()
    await migration.outgoing.set_bandwidth(0)
    await performing
    await migration.outgoing.remove((await armed).cookie, Options())
    assert await sides[0].state(guest) == ("absent", "")
    assert_perfect(guest)


async def test_postcopy_ended_without_its_agent(start: Start, sides: tuple[Side, Side], guest: Guest) -> None:
    migration = start(bandwidth=SLOW)
    await migration.prepare()
    armed, performing = migration.arm(), migration.perform()
    await migration.flowing()
    await migration.outgoing.start_postcopy()
    await performing
    await migration.outgoing.close()
    handle = sides[0].driver.outgoing(migration.uuid)
    await handle.set_bandwidth(0)
    await armed
    await handle.remove(b"", Options())
    assert await sides[0].state(guest) == ("absent", "")
    await handle.close()
    assert_perfect(guest)


async def test_a_guest_that_is_ended_in_postcopy_has_run(start: Start, sides: tuple[Side, Side], lab: Lab, guest: Guest) -> None:
    migration = start(bandwidth=SLOW)
    await migration.prepare()
    armed, performing = migration.arm(), migration.perform()
    await migration.flowing()
    await migration.outgoing.start_postcopy()
    await performing
    assert not armed.done()
    await asyncio.to_thread(lab["h2"].virsh, "destroy", guest.name)
    with pytest.raises(HypervisorUnavailable):
        await armed
    with pytest.raises(DomainBusy):
        await migration.incoming.abandon()
    assert await sides[1].state(guest) == ("shutoff", "destroyed")
