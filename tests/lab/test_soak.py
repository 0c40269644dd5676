"""Back and forth again and again: nothing is lost and nothing is left. The long run is `scripts/bench soak`."""

import os

import pytest

from clusterkit import Cluster, Daemon
from clusterkit.platforms import LabCluster
from tests.scenarios.conversation import Talk, assert_idle, state

pytestmark = pytest.mark.timeout(180)

ROUNDS = 12


def descriptors(daemon: Daemon) -> int:
    return len(os.listdir(f"/proc/{daemon.running().pid}/fd"))


def threads(daemon: Daemon) -> int:
    return len(os.listdir(f"/proc/{daemon.running().pid}/task"))


async def test_back_and_forth(cluster: Cluster) -> None:
    assert isinstance(cluster, LabCluster)
    guest = cluster.start_guest("soak")
    counted = {}
    for number in range(ROUNDS):
        destination = "h1" if number % 2 else "h2"
        source = "h2" if number % 2 else "h1"
        async with Talk(cluster.server if number % 3 else cluster.agents[source].address) as talk:
            migration = await talk.migrate(guest.name, destination)
        assert state(migration) == "succeeded", migration.failure.message
        if number == ROUNDS // 2 - 1:
            counted = {d.name: (descriptors(d), threads(d)) for d in cluster.daemons()}
    after = {d.name: (descriptors(d), threads(d)) for d in cluster.daemons()}
    for name, (files, tasks) in after.items():
        assert files <= counted[name][0] + 3, f"{name} leaks file descriptors: {counted[name][0]} to {files}"
        assert tasks <= counted[name][1] + 3, f"{name} leaks threads: {counted[name][1]} to {tasks}"
    guest.wait_lines(20)
    assert guest.judge().problems() == []
    assert len([q for host in cluster.lab.hosts for q in host.qemu() if q.guest == guest.name]) == 1
    assert os.path.getsize(cluster.path / "h1" / "state" / "journal.sqlite") < 4 << 20
    await assert_idle(cluster)
