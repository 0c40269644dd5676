"""The libvirt driver on real libvirt and QEMU: every way to come back, events and questions."""

import asyncio
import os
from dataclasses import replace
from time import perf_counter

import pytest

from agent.hypervisor.base import Domain, DomainNotFound, DomainState, HypervisorUnavailable, Job, TransferFailed
from agent.hypervisor.interface import Outgoing
from agent.hypervisor.options import Options
from tests.kit.lab import Guest, Lab

if os.environ.get("CI") != "true":
    pytest.importorskip("libvirt", reason="libvirt-python is not installed")

from agent.hypervisor.libvirt import LibvirtHypervisor
from tests.lab.libvirt.sides import SLOW, Side, Start, assert_perfect

# --- come back


@pytest.mark.parametrize("fresh", [False, True], ids=["same-handle", "fresh-driver"])
async def test_resume_after_perform_without_finish(
    fresh: bool, lab: Lab, start: Start, sides: tuple[Side, Side], guest: Guest
) -> None:
    migration = start()
    await migration.prepare()
    await migration.perform()
    assert await sides[0].state(guest) == ("paused", "migration")
    assert not (await sides[0].driver.get_named(guest.name)).incoming
    await migration.incoming.abandon()
    if fresh:
        await migration.outgoing.close()  # as its agent's death would
        restarted = LibvirtHypervisor(lab["h1"].libvirt_uri)
        handle: Outgoing = restarted.outgoing(migration.uuid)  # not opened: a handle serves recovery by itself
    else:
        handle = migration.outgoing
    await handle.resume()
    await handle.resume()
    assert (await sides[0].state(guest))[0] == "running"
    await handle.close()
    if fresh:
        await restarted.close()
    assert_perfect(guest)


@pytest.mark.parametrize("undefine", [True, False])
async def test_remove_by_a_fresh_handle(undefine: bool, start: Start, sides: tuple[Side, Side], guest: Guest) -> None:
    migration = start(Options(undefine_source=undefine))
    await migration.prepare()
    armed = migration.arm()
    await migration.perform()
    finished = await armed
    await migration.outgoing.close()
    assert (await sides[0].state(guest)) == ("paused", "migration")
    handle = sides[0].driver.outgoing(migration.uuid)
    for _ in range(2):
        await handle.remove(finished.cookie, migration.options)
    assert (await sides[0].state(guest))[0] == ("absent" if undefine else "shutoff")
    await handle.close()
    assert_perfect(guest)


async def test_remove_after_libvirtd_was_restarted(start: Start, sides: tuple[Side, Side], lab: Lab, guest: Guest) -> None:
    migration = start()
    await migration.prepare()
    armed = migration.arm()
    await migration.perform()
    finished = await armed
    await asyncio.to_thread(lab["h1"].kill_libvirtd)
    with pytest.raises(HypervisorUnavailable):
        await migration.outgoing.remove(finished.cookie, Options())
    await asyncio.to_thread(lab["h1"].start_libvirtd)
    await migration.outgoing.remove(finished.cookie, Options())
    assert await sides[0].state(guest) == ("absent", "")
    assert_perfect(guest)


async def test_libvirtd_killed_during_perform(start: Start, sides: tuple[Side, Side], lab: Lab, guest: Guest) -> None:
    migration = start(bandwidth=SLOW)
    await migration.prepare()
    armed, performing = migration.arm(), migration.perform()
    await migration.flowing()
    await asyncio.to_thread(lab["h1"].kill_libvirtd)
    with pytest.raises(HypervisorUnavailable):
        await performing
    await asyncio.to_thread(lab["h1"].start_libvirtd)
    with pytest.raises(TransferFailed):
        await armed
    domain = await sides[0].driver.get_named(guest.name)
    assert (domain.state, domain.job) == (DomainState.RUNNING, Job.NONE)
    assert await sides[1].state(guest) == ("absent", "")
    assert_perfect(guest)


async def test_destination_libvirtd_killed_while_armed(start: Start, sides: tuple[Side, Side], lab: Lab, guest: Guest) -> None:
    migration = start(bandwidth=SLOW)
    await migration.prepare()
    armed, performing = migration.arm(), migration.perform()
    await migration.flowing()
    await asyncio.to_thread(lab["h2"].kill_libvirtd)
    with pytest.raises(HypervisorUnavailable):
        await armed
    await asyncio.to_thread(lab["h2"].start_libvirtd)
    with pytest.raises(TransferFailed):
        await performing
    await sides[1].driver.incoming(migration.uuid).abandon()
    assert (await sides[0].state(guest))[0] == "running"
    assert_perfect(guest)


async def test_libvirtd_that_hangs_is_unavailable_in_time(lab: Lab, guest: Guest) -> None:
    driver = LibvirtHypervisor(lab["h1"].libvirt_uri, call_timeout=2.0)
    await driver.open()
    lab["h1"].pause_libvirtd()
    try:
        began = perf_counter()
        for _ in range(2):  # on the open connection, and then on a new one
            with pytest.raises(HypervisorUnavailable, match="within 2 s"):
                await driver.get_named(guest.name)
        assert perf_counter() - began < 15
    finally:
        lab["h1"].resume_libvirtd()
    assert (await driver.get_named(guest.name)).state is DomainState.RUNNING
    await driver.close()


# --- events and questions


async def test_events_tell_a_migration_and_survive_a_restart(start: Start, sides: tuple[Side, Side], lab: Lab, guest: Guest) -> None:
    first, second = sides[0].driver.events(), sides[0].driver.events()
    await start().run()

    async def until(kind: str) -> list[str]:
        seen: list[str] = []
        async with asyncio.timeout(10):
            while not seen or seen[-1] != kind:
                seen.append((await anext(first)).kind)
        return seen

    seen = await until("job-completed")
    assert "iteration" in seen
    assert "suspended" in seen
    assert (await anext(second)).uuid == str(guest.stable_uuid)
    await asyncio.to_thread(lab["h1"].restart_libvirtd)
    await until("reconnected")
    await start(back=True).run()
    await until("resumed")


async def test_incompatible_guests_are_named(sides: tuple[Side, Side], guest: Guest) -> None:
    driver = sides[1].driver
    _, needs = await sides[0].driver.describe(str(guest.stable_uuid))
    assert needs.memory_bytes == 64 << 20
    assert needs.machine.startswith("pc-q35-")
    (machine,) = await driver.incompatibilities(replace(needs, machine="pc-q35-99.9"))
    assert "pc-q35-99.9 is not supported by QEMU" in machine
    assert "is the newest" in machine
    (arch,) = await driver.incompatibilities(replace(needs, arch="sparc"))
    assert "sparc" in arch
    (kind,) = await driver.incompatibilities(replace(needs, virt_type="xen"))
    assert "xen" in kind
    cpu = needs.cpu.replace("</cpu>", "<feature policy='require' name='avx512f'/></cpu>")
    (missing,) = await driver.incompatibilities(replace(needs, cpu=cpu))
    assert "avx512f" in missing


async def test_list_and_absent_domains(sides: tuple[Side, Side], guest: Guest) -> None:
    (listed,) = await sides[0].driver.list_domains()
    domain = replace(listed, running_version="", installed_version="")
    assert domain == await sides[0].driver.get_named(guest.name)
    assert domain == Domain(guest.name, str(guest.stable_uuid), DomainState.RUNNING, "booted", 64 << 20, 1, persistent=True)
    with pytest.raises(DomainNotFound):
        await sides[0].driver.get_named("nobody")
    with pytest.raises(DomainNotFound):
        await sides[0].driver.get_domain("00000000-0000-0000-0000-000000000001")


async def test_unreachable_libvirtd_is_unavailable() -> None:
    with pytest.raises(HypervisorUnavailable):
        await LibvirtHypervisor("qemu:///system?socket=/nonexistent/libvirt-sock").open()
