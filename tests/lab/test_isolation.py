"""Requirements N1, S3: no hypervisor port is open to the network, and memory travels on the migration network only."""

from tests.kit.cluster import Cluster
from tests.kit.cluster.platforms import PORT, LabCluster
from tests.scenarios.conversation import MIB, Talk, state


async def test_memory_travels_on_the_migration_network_only(cluster: Cluster) -> None:
    assert isinstance(cluster, LabCluster)
    guest = cluster.start_guest("counted")
    before = {name: cluster.lab["h1"].counters(name).sent for name in ("mgmt", "mig1", "mig2")}
    async with Talk(cluster.server) as talk:
        migration = await talk.migrate(guest.name, "h2")
    assert state(migration) == "succeeded", migration.failure.message
    sent = {name: cluster.lab["h1"].counters(name).sent - before[name] for name in before}
    assert sent["mig1"] >= 50 * MIB
    assert sent["mig1"] >= migration.progress.processed_bytes
    assert sent["mgmt"] < MIB // 4, "the handshake alone"
    assert sent["mig2"] < MIB // 4


async def test_a_named_network_carries_it(cluster: Cluster) -> None:
    assert isinstance(cluster, LabCluster)
    guest = cluster.start_guest("named-network")
    before = {name: cluster.lab["h1"].counters(name).sent for name in ("mgmt", "mig2")}
    async with Talk(cluster.server) as talk:
        by_name = await talk.migrate(guest.name, "h2", network="mig2")
        assert state(by_name) == "succeeded", by_name.failure.message
        assert cluster.lab["h1"].counters("mig2").sent - before["mig2"] >= 50 * MIB
        back = await talk.migrate(guest.name, "h1", network="mgmt")
    assert state(back) == "succeeded", back.failure.message
    assert "no migration role" in back.warnings[0]


async def test_the_destination_listens_on_that_address_only_and_no_daemon_on_tcp(cluster: Cluster) -> None:
    assert isinstance(cluster, LabCluster)
    guest = cluster.start_guest("listening")
    addresses = cluster.lab["h2"].addresses
    async with Talk(cluster.server) as talk:
        migration = await talk.start(guest.name, "h2", bandwidth_bytes_per_second=40 * MIB)
        await talk.watch(migration.migration_id, lambda m: m.phase == "perform")
        listening = [entry for entry in cluster.lab["h2"].listening() if entry[1] != PORT]
        assert {address for address, _ in listening} <= {addresses["mig1"]}, "QEMU listens there, libvirtd nowhere"
        assert state(await talk.end(migration.migration_id)) == "succeeded"
    for host in cluster.lab.hosts:
        assert [port for _, port in host.listening()] == [PORT], "the agent's port and nothing else"
