"""What belongs to a guest beside its running copy, on real libvirt: its stored definition, its removal, a pause by its user."""

import asyncio
import os
import subprocess
from pathlib import Path

import pytest

from agent.hypervisor.base import HypervisorError
from agent.hypervisor.options import Options
from tests.kit.lab import Guest, Lab

if os.environ.get("CI") != "true":
    pytest.importorskip("libvirt", reason="libvirt-python is not installed")

from tests.lab.libvirt.sides import SLOW, Side, Start, assert_perfect, becomes

EDITED = "<title>next boot</title>"


def edit(lab: Lab, guest: Guest) -> None:
    """An edit for the next boot: a title, and twice the memory."""
    stored = lab["h1"].virsh("dumpxml", "--inactive", guest.name)
    memory, edited = guest.memory_mib * 1024, guest.memory_mib * 2048
    stored = stored.replace("</uuid>", f"</uuid>{EDITED}", 1).replace(f">{memory}<", f">{edited}<")
    lab["h1"].virsh("define", "/dev/stdin", stdin=stored)


@pytest.mark.parametrize("name", ["", "another-name"])
async def test_6_20_a_stored_definition_is_stored_at_the_destination(
    name: str, start: Start, sides: tuple[Side, Side], lab: Lab, guest: Guest
) -> None:
    edit(lab, guest)
    arrived = await start(name=name).run()
    stored, runs = (lab["h2"].virsh("dumpxml", *words, arrived.name) for words in (["--inactive"], []))
    assert arrived.name == (name or guest.name)
    assert EDITED in stored
    assert f">{guest.memory_mib * 2048}<" in stored
    assert f"<name>{arrived.name}</name>" in stored
    assert EDITED not in runs
    lab["h2"].restart_libvirtd()
    assert EDITED in lab["h2"].virsh("dumpxml", "--inactive", arrived.name), "it is on the disk, too"
    assert_perfect(guest)


async def test_6_20_a_transfer_that_fails_leaves_no_definition(
    start: Start, sides: tuple[Side, Side], lab: Lab, guest: Guest
) -> None:
    edit(lab, guest)
    migration = start(bandwidth=SLOW)
    await migration.prepare()
    armed, performing = migration.arm(), migration.perform()
    await migration.flowing()
    await migration.outgoing.abort()
    await asyncio.wait({armed, performing})
    assert await sides[1].state(guest) == ("absent", "")
    assert (await sides[0].state(guest))[0] == "running"
    assert EDITED in lab["h1"].virsh("dumpxml", "--inactive", guest.name)


@pytest.mark.parametrize(
    ("options", "persistent"), [(Options(), False), (Options(persist_destination=True), True)], ids=["unsaid", "asked-for"]
)
async def test_6_20_a_transient_guest_is_transient_at_the_destination(
    options: Options, persistent: bool, start: Start, sides: tuple[Side, Side], lab: Lab, guest: Guest
) -> None:
    lab["h1"].virsh("undefine", guest.name)
    assert await sides[0].driver.stored(str(guest.stable_uuid)) is None
    arrived = await start(options).run()
    assert arrived.persistent is persistent
    assert_perfect(guest)


async def test_6_20_a_late_finish_stores_it_as_well(start: Start, sides: tuple[Side, Side], lab: Lab, guest: Guest) -> None:
    edit(lab, guest)
    migration = start(name="late-name")
    await migration.prepare()
    performed = await migration.perform()
    finished = await migration.incoming.finish(
        migration.begun.domain_xml, performed.cookie, Options(), "late-name", migration.stored
    )
    await migration.outgoing.remove(finished.cookie, Options())
    assert EDITED in lab["h2"].virsh("dumpxml", "--inactive", "late-name")


async def test_6_20_a_definition_whose_file_is_held_is_not_reported_removed(
    start: Start, sides: tuple[Side, Side], lab: Lab, guest: Guest
) -> None:
    folder = lab["h1"].path / "etc/libvirt/qemu"
    migration = start()
    await migration.prepare()
    armed = migration.arm()
    await migration.perform()
    finished = await armed
    hold(folder, True)
    try:
        with pytest.raises(HypervisorError, match=f"{guest.name}.xml"):
            await migration.outgoing.remove(finished.cookie, Options())
        with pytest.raises(HypervisorError, match=f"{guest.name}.xml"):
            await sides[0].driver.outgoing(migration.uuid).remove(b"", Options())
    finally:
        hold(folder, False)
    await sides[0].driver.outgoing(migration.uuid).remove(b"", Options())
    lab["h1"].restart_libvirtd()
    assert await sides[0].state(guest) == ("absent", "")


def hold(folder: Path, held: bool) -> None:
    """Make the files of a folder such that nobody can remove them."""
    lab_files = subprocess.run(["chattr", "+i" if held else "-i", str(folder)], capture_output=True, text=True, check=False)
    if lab_files.returncode:
        pytest.skip(f"this file system has no immutable files: {lab_files.stderr.strip()}")


async def test_6_2_autostart_is_set_and_read_back(sides: tuple[Side, Side], lab: Lab, guest: Guest) -> None:
    driver, uuid = sides[0].driver, str(guest.stable_uuid)
    for wanted in (True, True, False):
        await driver.set_autostart(uuid, wanted)
        stored = await driver.stored(uuid)
        assert stored is not None
        assert stored.autostart is wanted
    lab["h1"].virsh("undefine", guest.name)
    await driver.set_autostart(uuid, True)  # a transient guest has none
    assert await driver.stored(uuid) is None


async def test_6_21_a_pause_by_the_user_is_told_from_the_switch_over(
    start: Start, sides: tuple[Side, Side], lab: Lab, guest: Guest
) -> None:
    migration = start(bandwidth=SLOW)
    await migration.prepare()
    armed, performing = migration.arm(), migration.perform()
    await migration.flowing()
    await asyncio.to_thread(lab["h1"].virsh, "suspend", guest.name)

    async def told() -> bool:
        return migration.outgoing.paused_by_user

    await becomes(told, True)
    await performing
    await armed
    assert (await sides[1].state(guest))[0] == "running", "libvirt itself loses it"
    await sides[1].driver.suspend(migration.uuid)
    assert await sides[1].state(guest) == ("paused", "user")


async def test_6_21_the_switch_over_is_no_pause_by_the_user(start: Start, lab: Lab, guest: Guest) -> None:
    migration = start()
    await migration.run()
    assert not migration.outgoing.paused_by_user
    assert "custom" not in lab["h2"].virsh("dominfo", guest.name), "QEMU was not asked behind libvirt's back"


async def test_6_21_a_transfer_of_a_paused_guest_is_aborted_at_once(
    start: Start, sides: tuple[Side, Side], lab: Lab, guest: Guest
) -> None:
    migration = start(bandwidth=SLOW)
    await migration.prepare()
    armed, performing = migration.arm(), migration.perform()
    await migration.flowing()
    await asyncio.to_thread(lab["h1"].virsh, "suspend", guest.name)

    async def told() -> bool:
        return migration.outgoing.paused_by_user

    await becomes(told, True)
    async with asyncio.timeout(3):
        await migration.outgoing.abort()
        await asyncio.wait({armed, performing})
    assert (await sides[1].state(guest))[0] == "absent"
    await migration.outgoing.resume()
    assert (await sides[0].state(guest))[0] == "running"
