"""Back and forth again and again: nothing is lost and nothing is left. The long run is `scripts/bench soak`."""

import os
from contextlib import AsyncExitStack

import pytest

from tests.kit.cluster import Cluster, Daemon
from tests.kit.cluster.platforms import LabCluster
from tests.scenarios.conversation import Talk, assert_idle, state

pytestmark = pytest.mark.timeout(180)

ROUNDS = 12

SLACK = 3
"""Idle connections and threads that may have come by chance."""


def descriptors(daemon: Daemon) -> int:
    return len(os.listdir(f"/proc/{daemon.running().pid}/fd"))


def threads(daemon: Daemon) -> int:
    return len(os.listdir(f"/proc/{daemon.running().pid}/task"))


async def test_back_and_forth(cluster: Cluster) -> None:
    assert isinstance(cluster, LabCluster)
    guest = cluster.start_guest("soak")
    counted = {}
    async with AsyncExitStack() as stack:
        coordinator = await stack.enter_async_context(Talk(cluster.server))
        agents = {name: await stack.enter_async_context(Talk(agent.address)) for name, agent in cluster.agents.items()}
        for number in range(ROUNDS):
            source, destination = ("h2", "h1") if number % 2 else ("h1", "h2")
            migration = await (coordinator if number % 3 else agents[source]).migrate(guest.name, destination)
            assert state(migration) == "succeeded", migration.failure.message
            if number == ROUNDS // 2 - 1:
                counted = {d.name: (descriptors(d), threads(d)) for d in cluster.daemons()}
        after = {d.name: (descriptors(d), threads(d)) for d in cluster.daemons()}
    for name, (files, tasks) in after.items():
        assert files <= counted[name][0] + SLACK, f"{name} leaks file descriptors: {counted[name][0]} to {files}"
        assert tasks <= counted[name][1] + SLACK, f"{name} leaks threads: {counted[name][1]} to {tasks}"
    guest.wait_lines(20)
    assert guest.judge().problems() == []
    assert len([q for host in cluster.lab.hosts for q in host.qemu() if q.guest == guest.name]) == 1
    assert os.path.getsize(cluster.state_dir("h1") / "journal.sqlite") < 4 << 20
    await assert_idle(cluster)
