"""A guest's own settings on real libvirt: in the live and the stored definition, in lists, and through a migration."""

import asyncio
import os
from typing import Any

import pytest

from agent.hypervisor.base import DomainBusy
from agent.hypervisor.guest_settings import GuestSettings
from agent.hypervisor.options import Options
from tests.kit.lab import Guest, Lab

if os.environ.get("CI") != "true":
    pytest.importorskip("libvirt", reason="libvirt-python is not installed")

from agent.hypervisor.libvirt import metadata
from agent.hypervisor.libvirt.watch import Watch
from tests.lab.libvirt.sides import Side, Start, assert_perfect, becomes

GOLD = GuestSettings('gold & "co"', 1 << 20, 9 << 20)


async def settings(side: Side, guest: Guest) -> GuestSettings | None:
    return next(domain.settings for domain in await side.driver.list_domains() if domain.name == guest.name)


async def test_8_4_settings_are_kept_live_and_stored(sides: tuple[Side, Side], lab: Lab, guest: Guest) -> None:
    source, uuid = sides[0], str(guest.stable_uuid)
    assert await settings(source, guest) is None
    assert (await source.driver.set_settings(uuid, GOLD)).settings == GOLD
    assert await settings(source, guest) == GOLD
    assert (await source.driver.describe(guest.name))[0].settings == GOLD
    for stored in ((), ("--inactive",)):
        assert metadata.of_xml(lab["h1"].virsh("dumpxml", guest.name, *stored)) == GOLD
    lab["h1"].virsh("destroy", guest.name)
    assert await settings(source, guest) == GOLD
    off = GuestSettings("silver")
    assert (await source.driver.set_settings(uuid, off)).settings == off
    assert (await source.driver.set_settings(uuid, GuestSettings())).settings is None
    assert await settings(source, guest) is None
    assert metadata.URI not in lab["h1"].virsh("dumpxml", guest.name)


async def test_8_4_another_programs_change_is_seen_and_its_nonsense_ignored(
    sides: tuple[Side, Side], lab: Lab, guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, host = sides[0], lab["h1"]
    assert await settings(source, guest) is None
    reads: list[object] = []
    real = metadata.read

    def read(domain: Any, *flags: int) -> GuestSettings | None:
        reads.append(domain)
        return real(domain, *flags)

    monkeypatch.setattr(metadata, "read", read)
    for text, wanted in (("<settings tenant='x'/>", GuestSettings("x")), ("<settings min_bandwidth='lots'/>", None)):
        host.virsh("metadata", guest.name, metadata.URI, "--key", "mine", "--set", text, "--live")
        await becomes(lambda: settings(source, guest), wanted)
        reads.clear()
        assert await settings(source, guest) == wanted
        assert reads == []  # a list asks nothing more of libvirt
        assert (await source.driver.describe(guest.name))[0].settings == wanted


async def test_8_4_settings_travel_with_the_guest_and_its_stored_definition(
    sides: tuple[Side, Side], lab: Lab, start: Start, guest: Guest
) -> None:
    await sides[0].driver.set_settings(str(guest.stable_uuid), GOLD)
    migration = start()
    await migration.prepare()
    with pytest.raises(DomainBusy):
        await sides[0].driver.set_settings(str(guest.stable_uuid), GuestSettings())
    armed = migration.arm()
    await migration.perform()
    await migration.outgoing.remove((await armed).cookie, Options())
    assert await settings(sides[1], guest) == GOLD
    assert metadata.of_xml(lab["h2"].virsh("dumpxml", guest.name, "--inactive")) == GOLD
    assert_perfect(guest)
    await asyncio.to_thread(lab["h2"].virsh, "destroy", guest.name)
    assert await settings(sides[1], guest) == GOLD


async def test_8_4_settings_are_read_anew_after_libvirtd_was_restarted(sides: tuple[Side, Side], lab: Lab, guest: Guest) -> None:
    await sides[0].driver.set_settings(str(guest.stable_uuid), GOLD)
    assert await settings(sides[0], guest) == GOLD
    await asyncio.to_thread(lab["h1"].stop_libvirtd)
    await asyncio.to_thread(lab["h1"].start_libvirtd)
    lab["h1"].virsh("metadata", guest.name, metadata.URI, "--key", "mine", "--set", "<settings tenant='y'/>", "--live")
    watch: Watch = sides[0].driver._watch

    async def now() -> GuestSettings | None:
        return await settings(sides[0], guest) if watch.link is not None else None

    await becomes(now, GuestSettings("y"), within=15)
