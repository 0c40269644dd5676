"""Requirement O7 on real libvirt: what a reboot of a host, and the guest's user, do to a guest on its way."""

import asyncio
import os
from collections.abc import Iterator

import pytest

from tests.kit.cluster import ClusterGuest, GuestSpec
from tests.kit.cluster import cluster as make_cluster
from tests.kit.cluster.platforms import LabCluster
from tests.kit.lab import Host, wait_until
from tests.scenarios.conversation import MIB, Talk, state

pytestmark = pytest.mark.timeout(180)

GUESTS = [GuestSpec("reboots", autostart=True), GuestSpec("paused"), GuestSpec("paused-and-kept")]


@pytest.fixture(name="cluster", scope="module")
def _cluster(_real_hosts: None) -> Iterator[LabCluster]:
    with make_cluster("libvirt", GUESTS, lab_id=f"gub{os.getpid() % 1_000_000}") as made:
        assert isinstance(made, LabCluster)
        yield made


def restart_as_after_boot(host: Host) -> None:
    """libvirtd starts what starts with the host once for each boot, and marks that in its run folder."""
    host.kill_libvirtd()
    (host.path / "run/libvirt/qemu/autostarted").unlink()
    host.start_libvirtd()


async def test_6_2_a_source_that_reboots_does_not_start_a_guest_that_has_left(cluster: LabCluster) -> None:
    guest = cluster.start_guest("reboots")
    async with Talk(cluster.server) as talk:
        migration = await talk.migrate(guest.name, "h2", options={"undefine_source": False})
    assert state(migration) == "succeeded", migration.failure.message
    await asyncio.to_thread(
        wait_until,
        lambda: cluster.definitions(guest.name) == {"h1": "persistent", "h2": "autostart"},
        10.0,
        "the guest to start with its new host",
    )
    await asyncio.to_thread(restart_as_after_boot, cluster.lab["h1"])
    assert cluster.copies(guest.name) == {"h1": "shut", "h2": "running"}
    guest.wait_lines(5)
    assert guest.judge().problems() == []


async def pause_on_the_way(cluster: LabCluster, talk: Talk, guest: ClusterGuest) -> str:
    """The id of a migration in whose transfer the guest's user has paused it."""
    migration = await talk.start(guest.name, "h2", bandwidth_bytes_per_second=10 * MIB)
    await talk.watch(migration.migration_id, lambda m: m.progress.processed_bytes > 0)
    await asyncio.to_thread(cluster.lab["h1"].virsh, "suspend", guest.name)
    return migration.migration_id


async def test_6_21_a_guest_that_its_user_pauses_on_the_way_arrives_paused(cluster: LabCluster) -> None:
    guest = cluster.start_guest("paused")
    async with Talk(cluster.server) as talk:
        migration = await talk.end(await pause_on_the_way(cluster, talk, guest))
    assert state(migration) == "succeeded", migration.failure.message
    assert [warning for warning in migration.warnings if "paused by its user" in warning], list(migration.warnings)
    h2 = cluster.lab["h2"]
    await asyncio.to_thread(wait_until, lambda: h2.domain_state(guest.name) == "paused (user)", 10.0, "the guest to be paused")
    h2.virsh("resume", guest.name)
    guest.wait_lines(5)
    assert guest.judge().problems() == []


async def test_6_21_a_guest_that_its_user_pauses_on_the_way_stays_paused_when_it_stays(cluster: LabCluster) -> None:
    guest = cluster.start_guest("paused-and-kept")
    async with Talk(cluster.server) as talk:
        migration_id = await pause_on_the_way(cluster, talk, guest)
        await talk.cancel(migration_id)
        assert state(await talk.end(migration_id)) == "cancelled"
    h1 = cluster.lab["h1"]
    await asyncio.to_thread(wait_until, lambda: h1.domain_state(guest.name) == "paused (user)", 10.0, "the guest to be paused")
    h1.virsh("resume", guest.name)
    guest.wait_lines(5)
    assert guest.judge().problems() == []
