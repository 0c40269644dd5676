"""What is said of waits, causes and places on real hosts (issue 6, lines 8, 13 and 14; requirements R2, R7)."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.runtime.errors import Reason
from drover.agent.v1 import migration_pb2 as pb
from tests.kit.cluster import GuestSpec, cluster
from tests.kit.cluster.platforms import LabCluster
from tests.kit.lab.domain import FIRMWARE
from tests.scenarios.conversation import MIB, Talk, assert_idle, state

pytestmark = pytest.mark.timeout(150)

GUESTS = [
    GuestSpec(name)
    for name in (
        "dies-cancelled",
        "dies",
        "copy-dies",
        "copy-destroyed",
        "copy-terminated",
        "walled",
        "walled-cancelled",
        "copy-stopped",
        "stopped",
        "idle",
    )
]
PORTS = "49152:49215"
FULL = {
    False: "write master key file for domain: check whether the disk with libvirt's folder there, /var/lib/libvirt, is full",
    True: "_VARS.fd.new': No space left on device: free some space on that disk",
}
"""What libvirt says on a full disk of a guest without and with firmware variables, and what would help."""


@pytest.fixture(name="cluster", scope="module")
def _cluster(_real_hosts: None) -> Iterator[LabCluster]:
    with cluster("libvirt", GUESTS, lab_id=f"tr{os.getpid()}", lab={"disk_mib": 16}) as made:
        assert isinstance(made, LabCluster)
        yield made


def drover(cluster: LabCluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(cluster.drover(*arguments), capture_output=True, text=True, timeout=90)


async def flowing(talk: Talk, guest: str) -> str:
    """The id of a migration of the guest to h2 whose memory flows, slowly."""
    migration = await talk.start(guest, "h2", bandwidth_bytes_per_second=4 * MIB)
    await talk.watch(migration.migration_id, lambda m: m.phase == "perform" and m.progress.processed_bytes > 0)
    return migration.migration_id


@pytest.mark.parametrize("cancelled", [True, False])
async def test_6_13_a_guest_whose_qemu_dies_runs_nowhere_whatever_was_asked(cluster: LabCluster, cancelled: bool) -> None:
    """Chaos seed 90210, round 29; and h2, which has the waiting copy then, is not where the guest runs."""
    guest = cluster.start_guest("dies-cancelled" if cancelled else "dies")
    async with Talk(cluster.server) as talk:
        migration_id = await flowing(talk, guest.name)
        cluster.lab["h1"].signal_qemu(guest.name)
        if cancelled:
            await talk.cancel(migration_id)
        end = await talk.end(migration_id)
    assert (state(end), end.failure.reason, end.runs_on) == ("failed", Reason.GUEST_CRASHED, "")
    watched = drover(cluster, "migration", "watch", migration_id)
    assert watched.returncode == 5
    assert f'"{guest.name}" runs nowhere: its QEMU on h1 died' in watched.stderr
    assert f'"{guest.name}" runs nowhere' in drover(cluster, "migration", "show", migration_id).stdout
    await assert_idle(cluster)


async def test_6_14_the_death_of_the_copy_is_told_by_its_host_and_the_echo_second(cluster: LabCluster) -> None:
    guest = cluster.start_guest("copy-dies")
    async with Talk(cluster.server) as talk:
        migration_id = await flowing(talk, guest.name)
        cluster.lab["h2"].signal_qemu(guest.name)
        end = await talk.end(migration_id)
    assert (state(end), end.runs_on) == ("failed", "h1")
    assert end.failure.message.startswith(f"h2: the QEMU of {guest.name} died")
    assert [other.message[:4] for other in end.other_failures] == ["h1: "]
    shown = drover(cluster, "migration", "show", migration_id).stdout
    assert shown.index(f"h2: the QEMU of {guest.name} died") < shown.index("also ")
    error = json.loads(drover(cluster, "migration", "watch", migration_id, "-o", "json").stderr)["error"]
    assert error["message"].startswith(f"h2: the QEMU of {guest.name} died")
    assert error["guest"] == f'"{guest.name}" runs on h1'
    assert error["also"][0].startswith("h1: ")
    assert cluster.copies(guest.name) == {"h1": "running"}


async def test_6_14_a_copy_that_somebody_destroyed_is_told_by_its_host_and_the_echo_second(cluster: LabCluster) -> None:
    guest = cluster.guest("copy-destroyed")
    async with Talk(cluster.server) as talk:
        migration_id = await flowing(talk, guest.name)
        cluster.lab["h2"].virsh("destroy", guest.name)
        end = await talk.end(migration_id)
    told = f"h2: the copy of {guest.name} was destroyed while it waited for its memory, and not by Drover"
    assert (state(end), end.runs_on) == ("failed", "h1")
    assert end.failure.message.startswith(told)
    assert [other.message[:4] for other in end.other_failures] == ["h1: "]
    shown = drover(cluster, "migration", "show", migration_id).stdout
    assert shown.index(told) < shown.index("also ")
    error = json.loads(drover(cluster, "migration", "watch", migration_id, "-o", "json").stderr)["error"]
    assert error["message"].startswith(told)
    assert error["also"][0].startswith("h1: ")
    assert cluster.copies(guest.name) == {"h1": "running"}
    await assert_idle(cluster)


async def test_6_13_a_copy_that_a_signal_ends_has_not_run(cluster: LabCluster) -> None:
    """As a host that shuts down ends every QEMU: libvirt calls it shut off, as a guest that its user shut down after it came."""
    guest = cluster.guest("copy-terminated")
    async with Talk(cluster.server) as talk:
        migration_id = await flowing(talk, guest.name)
        cluster.lab["h2"].signal_qemu(guest.name, signal.SIGTERM)
        end = await talk.end(migration_id)
    assert (state(end), end.runs_on) == ("failed", "h1")
    assert cluster.copies(guest.name) == {"h1": "running"}
    await assert_idle(cluster)


@pytest.mark.parametrize("firmware", [False, True])
async def test_6_14_a_full_disk_of_the_destination_is_told_by_its_host(cluster: LabCluster, firmware: bool) -> None:
    """libvirt's own folder there; a guest's firmware variables are made in it too, where the hosts share none."""
    if firmware and not FIRMWARE[0].exists():
        pytest.skip("ovmf is not installed")
    h1, disk = cluster.lab["h1"], cluster.lab["h2"].disks["libvirt"]
    variables = Path("/var/lib/libvirt/qemu/nvram/full_VARS.fd") if firmware else None
    guest = cluster.lab.guest("full", memory_mib=64, nvram=variables)
    h1.start(guest, persistent=True)
    try:
        async with Talk(cluster.server) as talk:
            disk.fill()
            try:
                end = await talk.migrate(guest.name, "h2")
            finally:
                disk.free()
            assert (state(end), end.runs_on) == ("failed", "h1")
            assert end.failure.message.startswith("h2: ")
            assert FULL[firmware] in end.failure.message
            shown = drover(cluster, "migration", "show", end.migration_id).stdout
            assert f": {end.failure.message}" in next(line for line in shown.splitlines() if line.startswith("failure "))
            error = json.loads(drover(cluster, "migration", "watch", end.migration_id, "-o", "json").stderr)["error"]
            assert error["message"].startswith(end.failure.message)
            assert error["guest"] == '"full" runs on h1'
            assert cluster.copies(guest.name) == {"h1": "running"}
            await assert_idle(cluster)
            assert state(await talk.migrate(guest.name, "h2")) == "succeeded"
    finally:
        for host in cluster.lab.hosts:
            host.end(guest.name)


async def test_6_14_storage_is_not_copied_and_that_is_told_before(cluster: LabCluster) -> None:
    """So no disk of the destination can become full by it."""
    guest = cluster.start_guest("idle")
    refused = drover(cluster, "migrate", guest.name, "--to", "h2", "--option", "copy_storage=on")
    assert refused.returncode == 4, refused.stderr
    assert "cannot do option copy_storage=on" in refused.stderr
    assert cluster.copies(guest.name) == {"h1": "running"}


@pytest.mark.parametrize("cancelled", [True, False])
async def test_6_8_a_firewall_that_drops_the_migration_port(cluster: LabCluster, cancelled: bool) -> None:
    guest = cluster.start_guest("walled-cancelled" if cancelled else "walled")
    wall = ["INPUT", "-p", "tcp", "-d", cluster.lab["h2"].addresses["mig1"], "--dport", PORTS, "-j", "DROP"]
    async with Talk(cluster.server) as talk:
        migration = await talk.start(guest.name, "h2", network="mig1")
        await talk.watch(migration.migration_id, lambda m: m.phase == "prepare")
        cluster.lab["h2"].exec(["iptables", "-I", *wall])
        try:
            waits = await talk.watch(migration.migration_id, lambda m: "without an answer" in m.waiting_for)
            for part in ("h2 to answer at tcp://10.92.0.2:", "a firewall?", "given up after 20 s"):
                assert part in waits.waiting_for
            if cancelled:
                ended = drover(cluster, "migration", "cancel", migration.migration_id)
                assert ended.returncode == 0, ended.stderr
            end = await talk.end(migration.migration_id)
        finally:
            cluster.lab["h2"].exec(["iptables", "-D", *wall])
    assert (state(end), end.runs_on) == ("cancelled" if cancelled else "failed", "h1")
    assert cancelled or end.failure.message.startswith("h1: h2 has not answered at tcp://10.92.0.2:")
    guest.wait_lines(5)
    assert cluster.copies(guest.name) == {"h1": "running"}
    await assert_idle(cluster)


async def standing_still(talk: Talk, migration_id: str) -> pb.Migration:
    """What is told of a migration one of whose QEMUs is stopped."""
    told = await talk.watch(migration_id, lambda m: "is stopped; `kill -CONT" in m.waiting_for)
    still = await talk.watch(migration_id, lambda m: "nothing was sent for" in m.progress.reason)
    assert not still.progress.HasField("eta_low"), "it promises no end"
    return told


async def test_6_8_a_qemu_that_stands_still_is_told_and_promises_no_end(cluster: LabCluster) -> None:
    guest = cluster.start_guest("stopped")
    async with Talk(cluster.server) as talk:
        migration_id = await flowing(talk, guest.name)
        cluster.lab["h1"].signal_qemu(guest.name, signal.SIGSTOP)
        try:
            assert f"h1: the QEMU of {guest.name}" in (await standing_still(talk, migration_id)).waiting_for
            await talk.cancel(migration_id)
            stuck = await talk.watch(migration_id, lambda m: m.state == pb.MIGRATION_STATE_CANCELLING and bool(m.waiting_for))
            assert stuck.runs_on == "h1"
        finally:
            cluster.lab["h1"].signal_qemu(guest.name, signal.SIGCONT)
        end = await talk.end(migration_id)
    assert (state(end), end.runs_on) == ("cancelled", "h1")
    guest.wait_lines(5)
    assert guest.judge().problems() == []


@pytest.mark.parametrize("agent", ["as it was", "restarted"])
async def test_6_08_a_copy_whose_qemu_is_stopped_is_ended_when_it_is_given_up(cluster: LabCluster, agent: str) -> None:
    """Nobody lets it go on: it has never run, and libvirt kills a process that is stopped."""
    guest = cluster.guest("copy-stopped")
    h2 = cluster.lab["h2"]
    async with Talk(cluster.server) as talk:
        migration_id = await flowing(talk, guest.name)
        h2.signal_qemu(guest.name, signal.SIGSTOP)
        assert f"copy on h2 to take its stream: the QEMU of {guest.name}" in (await standing_still(talk, migration_id)).waiting_for
        if agent == "restarted":
            cluster.agents["h2"].kill()
            cluster.agents["h2"].start()
        await talk.cancel(migration_id)
        given_up = await talk.watch(migration_id, lambda m: "destroying the copy" in m.waiting_for)
        assert "a process that is stopped is killed within 15 s" in given_up.waiting_for
        end = await talk.end(migration_id)
    assert (state(end), end.runs_on) == ("cancelled", "h1")
    assert cluster.copies(guest.name) == {"h1": "running"}
    assert h2.qemu() == []
    guest.wait_lines(5)
    assert guest.judge().problems() == []
    await assert_idle(cluster)


async def test_6_8_a_guest_whose_qemu_is_stopped_is_refused_with_the_reason(cluster: LabCluster) -> None:
    guest = cluster.start_guest("idle")
    cluster.lab["h1"].signal_qemu(guest.name, signal.SIGSTOP)
    try:
        refused = drover(cluster, "migrate", guest.name, "--to", "h2")
    finally:
        cluster.lab["h1"].signal_qemu(guest.name, signal.SIGCONT)
    assert refused.returncode == 4, refused.stderr
    assert f"the QEMU of {guest.name} (process " in refused.stderr
    assert "kill -CONT" in refused.stderr
    await assert_idle(cluster)
    async with Talk(cluster.server) as talk:
        assert state(await talk.migrate(guest.name, "h2")) == "succeeded"
