"""Requirements R1, R2, R6, A6: the daemons die or are restarted in the middle, and the migration ends all the same."""

import os
from collections.abc import Iterator

import pytest

from agent.runtime.errors import DroverError, Reason
from drover.agent.v1 import handshake_pb2, handshake_pb2_grpc
from drover.agent.v1 import migration_pb2 as pb
from tests.kit.cluster import Cluster, GuestSpec
from tests.kit.cluster import cluster as make_cluster
from tests.kit.cluster.platforms import LabCluster
from tests.kit.lab import wait_until
from tests.scenarios.changing import changes_in_post_copy
from tests.scenarios.conversation import MIB, Talk, assert_idle, record_state, state, update

pytestmark = pytest.mark.timeout(120)

FLEET = [GuestSpec(f"fleet-{number}", memory_mib=16, dirty=50) for number in range(10)]
GUESTS = [
    GuestSpec("pre-copy"),
    GuestSpec("retuned", memory_mib=128),
    GuestSpec("post-copy", dirty=2000),
    GuestSpec("full-disk"),
    GuestSpec("changed-postcopy", memory_mib=128),
    *FLEET,
]


@pytest.fixture(name="cluster", scope="module")
def _cluster(_real_hosts: None) -> Iterator[Cluster]:
    settings = {"agent": {"takeover_after_seconds": 3, "lease_seconds": 5, "incoming_limit": 10, "outgoing_limit": 10}}
    with make_cluster("libvirt", GUESTS, lab_id=f"sv{os.getpid()}", settings=settings) as made:
        yield made


@pytest.fixture(name="as_root", scope="module")
def _as_root(_real_hosts: None) -> Iterator[Cluster]:
    """Post-copy needs a QEMU that runs as root."""
    with make_cluster("libvirt", GUESTS, lab_id=f"svp{os.getpid() % 1_000_000}", lab={"setting": "root"}) as made:
        yield made


async def armed(cluster: Cluster, talk: Talk, guest: str, bandwidth: int = 20 * MIB) -> pb.Migration:
    """A migration whose memory flows, and whose destination is armed."""
    migration = await talk.start(guest, "h2", bandwidth_bytes_per_second=bandwidth)
    migration = await talk.watch(migration.migration_id, lambda m: m.progress.processed_bytes > 0)
    async with Talk(cluster.agents["h2"].address) as destination:
        ref = handshake_pb2.AttemptRef(migration_id=migration.migration_id, attempt=1)
        record = (await destination.handshake.get_record(handshake_pb2.GetRecordRequest(ref=ref))).record
    assert record_state(record) == "armed", "Finish is armed while the memory flows"
    return migration


async def both_records(cluster: Cluster, migration_id: str) -> tuple[str, str]:
    states = []
    for host in ("h1", "h2"):
        async with Talk(cluster.agents[host].address) as talk:
            ref = handshake_pb2.AttemptRef(migration_id=migration_id, attempt=1)
            states.append(record_state((await talk.handshake.get_record(handshake_pb2.GetRecordRequest(ref=ref))).record))
    return states[0], states[1]


async def test_coordinator_and_both_agents_killed_during_perform(cluster: Cluster) -> None:
    """libvirt alone ends it, and the restarted agents record it so."""
    await ends_without_daemons(cluster, "pre-copy")


async def test_coordinator_and_both_agents_killed_during_post_copy(as_root: Cluster) -> None:
    await ends_without_daemons(as_root, "post-copy")


async def test_8_7_a_limit_holds_and_is_changed_in_post_copy(as_root: Cluster) -> None:
    await changes_in_post_copy(as_root, forbidden=False)


async def ends_without_daemons(cluster: Cluster, name: str) -> None:
    guest = cluster.start_guest(name)
    async with Talk(cluster.server) as talk:
        migration = await armed(cluster, talk, guest.name)
    if name == "post-copy":
        async with Talk(cluster.agents["h1"].address) as source:
            ref = handshake_pb2.AttemptRef(migration_id=migration.migration_id, attempt=1)
            stub = handshake_pb2_grpc.HandshakeServiceStub(source.channel)
            await source.call(stub.StartPostCopy, handshake_pb2.StartPostCopyRequest(ref=ref))
    for daemon in cluster.daemons():
        daemon.kill()
    wait_until(lambda: cluster.copies(guest.name).get("h2") == "running", 30, "the guest to run at the destination by itself")
    assert cluster.copies(guest.name).get("h1") != "running"
    cluster.start()
    async with Talk(cluster.server) as talk:
        assert state(await talk.end(migration.migration_id)) == "succeeded"
    assert await both_records(cluster, migration.migration_id) == ("removed", "running")
    assert cluster.copies(guest.name) == {"h2": "running"}
    guest.wait_lines(20)
    assert guest.judge().problems() == []
    await assert_idle(cluster)


async def test_8_7_a_change_is_saved_without_the_source_and_applied_once_it_is_back(cluster: Cluster) -> None:
    guest = cluster.start_guest("retuned")
    async with Talk(cluster.server) as talk:
        migration = await armed(cluster, talk, guest.name, bandwidth=4 * MIB)
        cluster.agents["h1"].kill()
        with pytest.raises(DroverError) as error:
            await update(talk, migration.migration_id, bandwidth_bytes_per_second=6 * MIB)
        assert (error.value.reason, error.value.metadata["saved"]) == (Reason.HOST_UNREACHABLE, "yes")
        assert (await talk.get(migration.migration_id)).settings.bandwidth_bytes_per_second == 6 * MIB
        cluster.agents["h1"].start()
        await talk.watch(migration.migration_id, lambda m: m.applied_bandwidth_bytes_per_second == 6 * MIB)
        await talk.watch(migration.migration_id, lambda m: 5 * MIB < m.progress.bytes_per_second < 7 * MIB)
        assert (await update(talk, migration.migration_id, bandwidth_bytes_per_second=0)).applied_bandwidth_bytes_per_second == 0
        assert state(await talk.end(migration.migration_id)) == "succeeded"
    guest.wait_lines(5)
    assert guest.judge().problems() == []
    await assert_idle(cluster)


async def test_upgrade_during_ten_migrations(cluster: Cluster) -> None:
    """Agents and coordinator are restarted one after the other (SIGTERM) while ten guests move."""
    guests = [cluster.start_guest(spec.name) for spec in FLEET]
    async with Talk(cluster.server) as talk:
        moving = [await talk.start(guest.name, "h2", bandwidth_bytes_per_second=2 * MIB) for guest in guests]
    for daemon in (cluster.agents["h1"], cluster.agents["h2"], cluster.coordinator):
        assert daemon.stop() == 0, "an orderly stop"
        daemon.start()
    cluster.wait_known()
    async with Talk(cluster.server) as talk:
        ends = [await talk.end(migration.migration_id) for migration in moving]
    assert [(end.domain_name, state(end), end.failure.message) for end in ends] == [(g.name, "succeeded", "") for g in guests]
    for guest in guests:
        assert cluster.copies(guest.name) == {"h2": "running"}
        guest.wait_lines(5)
        assert guest.judge().problems() == []
    await assert_idle(cluster)


async def test_a_journal_on_a_full_disk(cluster: Cluster) -> None:
    """Work is refused with a clear error, no guest is harmed, and it works again once the disk does."""
    assert isinstance(cluster, LabCluster)
    guest = cluster.start_guest("full-disk")
    agent, host = cluster.agents["h2"], cluster.lab["h2"]
    folder = str(cluster.state_dir("h2"))
    agent.stop()
    host.exec(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", folder])
    try:
        agent.start()
        cluster.wait_known()
        host.exec(["sh", "-c", f"! dd if=/dev/zero of={folder}/filler bs=4k 2>/dev/null"])
        async with Talk(cluster.server) as talk:
            with pytest.raises(DroverError) as refusal:
                await talk.start(guest.name, "h2")
            assert refusal.value.reason is Reason.JOURNAL_UNAVAILABLE, refusal.value.message
            assert folder in refusal.value.message
            assert cluster.copies(guest.name) == {"h1": "running"}
            host.exec(["rm", f"{folder}/filler"])
            assert state(await talk.migrate(guest.name, "h2")) == "succeeded"
        guest.wait_lines(5)
        assert guest.judge().problems() == []
    finally:
        agent.stop()
        host.exec(["umount", folder])
        agent.start()
        cluster.wait_known()


async def test_a_journal_that_is_read_only(cluster: Cluster) -> None:
    """The agent does not start on it, and says which file and what to do; its guests are not touched."""
    assert isinstance(cluster, LabCluster)
    agent, host = cluster.agents["h2"], cluster.lab["h2"]
    folder = str(cluster.state_dir("h2"))
    agent.stop()
    host.exec(["mount", "--bind", folder, folder])
    try:
        host.exec(["mount", "-o", "remount,bind,ro", folder])
        with pytest.raises(RuntimeError, match="ended with status") as refusal:
            agent.start()
        assert folder in str(refusal.value)
        assert "Traceback" not in str(refusal.value)
    finally:
        host.exec(["umount", folder])
        agent.start()
        cluster.wait_known()


async def test_a_journal_that_was_damaged(cluster: Cluster) -> None:
    """An agent whose journal is damaged does not start, and says which file and what to do."""
    agent = cluster.agents["h2"]
    journal = cluster.state_dir("h2") / "journal.sqlite"
    agent.stop()
    whole = journal.read_bytes()
    try:
        journal.write_bytes(whole[: len(whole) // 2] if len(whole) > 8192 else b"damaged" * 1000)
        with pytest.raises(RuntimeError, match="ended with status") as refusal:
            agent.start()
        assert str(journal) in str(refusal.value)
        assert "Traceback" not in str(refusal.value)
    finally:
        journal.write_bytes(whole)
        agent.start()
        cluster.wait_known()
