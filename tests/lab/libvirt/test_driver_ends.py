"""The libvirt driver on real libvirt and QEMU: every way to end early."""

import asyncio
import os

import pytest

from agent.hypervisor.base import DomainBusy, Job, TransferFailed
from agent.hypervisor.options import Options
from tests.kit.lab import Guest, Lab

if os.environ.get("CI") != "true":
    pytest.importorskip("libvirt", reason="libvirt-python is not installed")

from tests.lab.libvirt.sides import SLOW, Side, Start, assert_perfect, becomes

# --- ended early


@pytest.mark.parametrize("early", [True, False], ids=["armed", "not-armed"])
async def test_abort_while_memory_flows(early: bool, start: Start, sides: tuple[Side, Side], guest: Guest) -> None:
    migration = start(bandwidth=SLOW)
    await migration.prepare()
    armed = migration.arm() if early else None
    performing = migration.perform()
    await migration.flowing()
    await migration.outgoing.abort()
    with pytest.raises(TransferFailed):
        await performing
    if armed:
        with pytest.raises(TransferFailed):
            await armed
    else:
        await migration.incoming.abandon()
    assert await sides[1].state(guest) == ("absent", "")
    assert (await sides[0].state(guest))[0] == "running"
    await migration.outgoing.abort()  # nothing to abort is no error
    await migration.close()
    await start().run()
    assert_perfect(guest)


async def test_abort_at_once_is_not_lost(start: Start, guest: Guest) -> None:
    migration = start(bandwidth=SLOW)
    await migration.prepare()
    performing = migration.perform()
    await asyncio.sleep(0)  # the call is on its way, libvirt knows nothing of it
    await migration.outgoing.abort()
    with pytest.raises(TransferFailed):
        await performing
    assert_perfect(guest)


@pytest.mark.parametrize("fresh", [False, True], ids=["same-handle", "fresh-handle"])
@pytest.mark.parametrize("state", ["prepared", "armed", "flowing"])
async def test_abandon(state: str, fresh: bool, start: Start, sides: tuple[Side, Side], guest: Guest) -> None:
    migration = start(bandwidth=SLOW)
    await migration.prepare()
    armed = migration.arm() if state != "prepared" else None
    performing = migration.perform() if state == "flowing" else None
    if performing:
        await migration.flowing()
    elif armed:
        await asyncio.sleep(0.3)
        assert not armed.done()
    domain = await sides[1].driver.get_named(guest.name)
    assert domain.incoming
    assert domain.job is Job.INCOMING
    handle = sides[1].driver.incoming(migration.uuid) if fresh else migration.incoming
    await handle.abandon()
    await handle.abandon()
    if armed:
        with pytest.raises(TransferFailed):
            await armed
    if performing:
        with pytest.raises(TransferFailed):
            await performing
    assert await sides[1].state(guest) == ("absent", "")
    await migration.outgoing.resume()
    assert (await sides[0].state(guest))[0] == "running"
    await handle.close()
    assert_perfect(guest)


async def test_definition_that_was_there_before_stays(start: Start, sides: tuple[Side, Side], lab: Lab, guest: Guest) -> None:
    lab["h2"].define(guest.with_(metadata="<x:mine xmlns:x='urn:test'/>"))
    migration = start()
    await migration.prepare()
    armed = migration.arm()
    await asyncio.sleep(0.2)
    await migration.incoming.abandon()
    with pytest.raises(TransferFailed):
        await armed
    assert (await sides[1].state(guest))[0] == "shutoff"
    assert "urn:test" in lab["h2"].virsh("dumpxml", guest.name)


async def test_closing_undoes(start: Start, sides: tuple[Side, Side], guest: Guest) -> None:
    migration = start()
    await migration.prepare()
    await migration.incoming.close()
    await becomes(lambda: sides[1].state(guest), ("absent", ""))
    assert (await sides[0].driver.get_named(guest.name)).job is Job.OUTGOING
    await migration.outgoing.close()
    assert (await sides[0].driver.get_named(guest.name)).job is Job.NONE
    assert_perfect(guest)


async def test_closing_while_memory_flows_aborts(start: Start, sides: tuple[Side, Side], guest: Guest) -> None:
    migration = start(bandwidth=SLOW)
    await migration.prepare()
    performing = migration.perform()
    await migration.flowing()
    await migration.outgoing.close()
    with pytest.raises(TransferFailed):
        await performing
    assert (await sides[0].driver.get_named(guest.name)).job is Job.NONE
    assert_perfect(guest)


async def test_resume_refuses_a_copy_that_arrives(start: Start, sides: tuple[Side, Side]) -> None:
    migration = start()
    await migration.prepare()
    handle = sides[1].driver.outgoing(migration.uuid)
    with pytest.raises(DomainBusy):
        await handle.resume()
    await handle.close()


async def test_abandon_refuses_a_guest_that_runs(sides: tuple[Side, Side], guest: Guest) -> None:
    handle = sides[0].driver.incoming(str(guest.stable_uuid))
    with pytest.raises(DomainBusy):
        await handle.abandon()
    await handle.close()
    assert_perfect(guest)


@pytest.mark.parametrize("restarted", [False, True], ids=["same-libvirtd", "libvirtd-restarted"])
async def test_remove_refuses_a_guest_that_came_back(
    restarted: bool, start: Start, sides: tuple[Side, Side], lab: Lab, guest: Guest
) -> None:
    await start().run()
    await start(back=True).run()
    if restarted:
        await asyncio.to_thread(lab["h1"].restart_libvirtd)
    handle = sides[0].driver.outgoing(str(guest.stable_uuid))
    with pytest.raises(DomainBusy):
        await handle.remove(b"", Options())
    await handle.close()
    assert_perfect(guest)


async def test_remove_refuses_a_copy_that_arrives(start: Start, sides: tuple[Side, Side]) -> None:
    migration = start()
    await migration.prepare()
    handle = sides[1].driver.outgoing(migration.uuid)
    with pytest.raises(DomainBusy):
        await handle.remove(b"", Options())
    await handle.close()


async def test_second_migration_of_a_guest_is_refused(start: Start) -> None:
    await start().prepare()
    with pytest.raises(DomainBusy):
        await start().prepare()
