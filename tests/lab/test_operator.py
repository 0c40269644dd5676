"""Requirements R1, R2: a destination that is out of reach after Perform, until it comes back or an operator speaks."""

import json
import os
import subprocess
from collections.abc import Iterator

import pytest

from agent.handshake.machines.failpoints import VARIABLE
from drover.agent.v1 import migration_pb2 as pb
from tests.kit.cluster import Cluster, GuestSpec, cluster
from tests.kit.cluster.platforms import LabCluster
from tests.scenarios.conversation import MIB, Talk, state

pytestmark = pytest.mark.timeout(120)

GUESTS = [GuestSpec("out-of-reach"), GuestSpec("declared-dead"), GuestSpec("fenced")]


@pytest.fixture(name="cluster", scope="module")
def _cluster(_real_hosts: None) -> Iterator[Cluster]:
    settings = {"agent": {"takeover_after_seconds": 5, "lease_seconds": 10}}
    with cluster("libvirt", GUESTS, lab_id=f"op{os.getpid()}", settings=settings) as made:
        yield made


def drover(cluster: Cluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(cluster.drover(*arguments), capture_output=True, text=True, timeout=60)


async def unknown(cluster: Cluster, talk: Talk, guest: str) -> pb.Migration:
    """Start a migration and wait until nobody can say where the guest runs."""
    migration = await talk.start(guest, "h2", bandwidth_bytes_per_second=40 * MIB)
    return await talk.watch(migration.migration_id, lambda m: m.state == pb.MIGRATION_STATE_OUTCOME_UNKNOWN)


async def test_it_ends_by_itself_when_the_link_is_back(cluster: Cluster) -> None:
    assert isinstance(cluster, LabCluster)
    guest = cluster.start_guest("out-of-reach")
    async with Talk(cluster.server) as talk:
        migration = await talk.start(guest.name, "h2", bandwidth_bytes_per_second=40 * MIB)
        await talk.watch(migration.migration_id, lambda m: m.phase == "perform" and m.progress.processed_bytes > 0)
        cluster.lab["h2"].cut_link("mgmt")
        try:
            doubt = await talk.watch(migration.migration_id, lambda m: m.state == pb.MIGRATION_STATE_OUTCOME_UNKNOWN)
            shown = drover(cluster, "migration", "show", migration.migration_id)
        finally:
            cluster.lab["h2"].restore_link("mgmt")
        assert doubt.runs_on == ""
        assert list(doubt.silent_hosts) == ["h2"]
        assert "h1 last reported that the guest is paused (migration) there" in shown.stdout
        assert f"migration resolve {migration.migration_id} --assume-dead h2" in shown.stdout
        assert state(await talk.end(migration.migration_id)) == "succeeded"
    assert cluster.copies(guest.name) == {"h2": "running"}
    guest.wait_lines(5)
    assert guest.judge().problems() == []


async def test_resolved_by_an_operator(cluster: Cluster) -> None:
    """The destination's agent stands still just before it arms, then its whole host loses its power."""
    assert isinstance(cluster, LabCluster)
    guest = cluster.start_guest("declared-dead")
    agent = cluster.agents["h2"]
    agent.environment[VARIABLE] = "destination.finish.journal.before=stop"
    agent.restart()
    agent.environment.clear()
    cluster.wait_known()
    async with Talk(cluster.server) as talk:
        doubt = await unknown(cluster, talk, guest.name)
        answering = drover(cluster, "migration", "resolve", doubt.migration_id, "--assume-dead", "h1", "--reason", "x", "--yes")
        assert answering.returncode == 4
        assert "answers" in answering.stderr
        assert cluster.copies(guest.name)["h1"] == "paused"
        cluster.lab["h2"].crash()
        resolved = drover(
            cluster,
            "migration",
            "resolve",
            doubt.migration_id,
            "--assume-dead",
            "h2",
            "--reason",
            "pulled its plug",
            "--yes",
            "-o",
            "json",
        )
        end = json.loads(resolved.stdout)
        assert resolved.returncode == 0, "the guest runs at the source"
        assert end["state"] == "MIGRATION_STATE_FAILED"
        assert end["runs_on"] == "h1"
        assert end["statement"]["dead_host"] == "h2"
        assert end["statement"]["reason"] == "pulled its plug"
        assert "@" in end["statement"]["said_by"]
    guest.wait_lines(20)
    cluster.lab["h2"].boot()
    cluster.lab["h2"].wait_ready()
    agent.start()
    cluster.wait_known()
    cluster.wait_running_on(guest.name, "h1")
    assert cluster.copies(guest.name) == {"h1": "running"}, "a host that comes back starts nothing"
    assert guest.judge().problems() == []
    async with Talk(cluster.server) as talk:
        assert state(await talk.migrate(guest.name, "h2")) == "succeeded"
