"""Guests that libvirt keeps from leaving: it is asked, and nothing is changed by the question."""

from __future__ import annotations

import asyncio
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent.hypervisor.base import DomainBusy, DomainState, HypervisorError, Incompatible, Job, TransferFailed
from agent.hypervisor.options import Options
from tests.kit.lab import Guest, Lab

if os.environ.get("CI") != "true":
    pytest.importorskip("libvirt", reason="libvirt-python is not installed")

from tests.lab.libvirt.sides import Side, Start, becomes

UNSAFE = Options(unsafe=True)


@dataclass(frozen=True)
class Equipped(Guest):
    """A guest with more devices."""

    devices: str = ""

    def xml(self) -> str:
        return super().xml().replace("</devices>", f"{self.devices}</devices>")


def disk(image: Path, inside: str = "") -> str:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(image), "16M"], check=True, timeout=20)
    image.chmod(0o666)
    return (
        f"<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{image}'/>"
        f"<target dev='vda' bus='virtio'/>{inside}</disk>"
    )


def started(lab: Lab, name: str, **changes: str) -> Equipped:
    plain = lab.guest(name, memory_mib=32)
    made = Equipped(**{**vars(plain), **changes})
    lab["h1"].start(made)
    return made


async def refusal(side: Side, guest: Guest, options: Options, kind: type[HypervisorError] = Incompatible) -> str:
    """What both the question and Begin itself say; the guest runs on, held by no job."""
    uuid = str(guest.stable_uuid)
    with pytest.raises(kind) as asked:
        await side.driver.check_leaving(uuid, options, guest.name)
    assert type(asked.value) is kind
    outgoing = side.driver.outgoing(uuid)
    with pytest.raises(kind) as begun:
        await outgoing.begin(options, guest.name)
    await outgoing.close()
    assert str(asked.value) == str(begun.value)

    async def free() -> bool:  # libvirtd notices a closed connection in its own time
        domain = await side.driver.get_domain(uuid)
        return (domain.state, domain.job) == (DomainState.RUNNING, Job.NONE)

    await becomes(free, True)
    return str(asked.value)


async def test_6_15_a_disk_that_is_not_shared(lab: Lab, sides: tuple[Side, Side]) -> None:
    guest = started(lab, "unsafe", devices=disk(lab.path / "unsafe.qcow2"))
    assert "--option unsafe=on" in await refusal(sides[0], guest, Options())
    await sides[0].driver.check_leaving(str(guest.stable_uuid), UNSAFE, guest.name)


async def test_6_15_a_transient_disk(lab: Lab, sides: tuple[Side, Side]) -> None:
    guest = started(lab, "transient", devices=disk(lab.path / "transient.qcow2", "<transient/>"))
    assert "without the transient disk" in await refusal(sides[0], guest, UNSAFE)


async def test_6_15_shared_memory(lab: Lab, sides: tuple[Side, Side]) -> None:
    memory = Path(f"/dev/shm/re-shmem-{os.getpid()}")  # libvirt leaves it behind
    device = f"<shmem name='{memory.name}'><model type='ivshmem-plain'/><size unit='M'>1</size></shmem>"
    try:
        guest = started(lab, "shmem", devices=device)
        assert "detach the shared memory" in await refusal(sides[0], guest, UNSAFE)
    finally:
        memory.unlink(missing_ok=True)


async def test_6_15_a_snapshot(lab: Lab, sides: tuple[Side, Side]) -> None:
    guest = started(lab, "snapshot", devices=disk(lab.path / "snapshot.qcow2"))
    overlay = f"vda,file={lab.path}/snapshot.overlay"
    await asyncio.to_thread(lab["h1"].virsh, "snapshot-create-as", guest.name, "s1", "--disk-only", "--diskspec", overlay)
    assert "virsh snapshot-list" in await refusal(sides[0], guest, UNSAFE)


async def test_6_15_a_definition_that_is_too_large(lab: Lab, sides: tuple[Side, Side]) -> None:
    guest = started(lab, "large", metadata=f"<x:n xmlns:x='urn:x'>{'y' * (600 << 10)}</x:n>")
    assert "shorten its metadata" in await refusal(sides[0], guest, Options())


async def test_6_15_a_guest_that_may_leave_is_left_as_it_is(lab: Lab, sides: tuple[Side, Side]) -> None:
    guest = started(lab, "free")
    uuid = str(guest.stable_uuid)
    before = await sides[0].driver.get_domain(uuid)
    await sides[0].driver.check_leaving(uuid, Options(), guest.name)
    assert await sides[0].driver.get_domain(uuid) == before
    outgoing = sides[0].driver.outgoing(uuid)
    await outgoing.begin(Options(), guest.name)
    with pytest.raises(DomainBusy):  # after libvirt's own wait for its job lock, were it not asked of the job first
        await sides[0].driver.check_leaving(uuid, Options(), guest.name)
    await outgoing.close()


async def test_6_15_a_refused_connection_is_no_lost_libvirtd(lab: Lab, guest: Guest, start: Start) -> None:
    migration = start()
    await migration.prepare()
    lab["h2"].reset_link("mig1")
    try:
        with pytest.raises(TransferFailed, match="firewall"):
            await migration.perform()
    finally:
        lab["h2"].restore_link("mig1")
    assert await migration.source.state(guest) == ("running", "booted")


async def test_6_32_a_guest_that_was_stopped_behind_libvirts_back(lab: Lab, sides: tuple[Side, Side], guest: Guest) -> None:
    uuid = str(guest.stable_uuid)
    await asyncio.to_thread(lab["h1"].virsh, "qemu-monitor-command", guest.name, "--hmp", "stop")
    with pytest.raises(Incompatible, match=r"paused \(unknown\)"):
        await sides[0].driver.check_leaving(uuid, Options(), guest.name)
    assert (await sides[0].driver.get_domain(uuid)).state is DomainState.PAUSED


async def test_6_22_a_paused_guest_with_a_disk_that_has_not_run_since_it_arrived(
    lab: Lab, sides: tuple[Side, Side], start: Start
) -> None:
    still = Options(unsafe=True, post_copy=False)
    guest = started(lab, "unrun", devices=disk(lab.path / "unrun.qcow2"))
    guest.wait_lines(5)
    await start(still | {"paused": True}, guest=guest).run()
    back = start(still, back=True, guest=guest)
    with pytest.raises(Incompatible, match="has not run since it arrived"):
        await sides[1].driver.check_leaving(back.uuid, still, guest.name)
    with pytest.raises(Incompatible, match="has not run since it arrived"):
        await back.outgoing.begin(still, guest.name)
    await back.close()
    assert await sides[1].state(guest) == ("paused", "user")
    lab["h2"].virsh("resume", guest.name)
    lab["h2"].virsh("suspend", guest.name)
    await start(still, back=True, guest=guest).run()
    assert await sides[0].state(guest) == ("paused", "user")
