"""Paths that cannot carry a guest are found before it is touched, and IPv6 works from end to end. On networks of its own."""

import asyncio
import os
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from drover.agent.v1 import migration_pb2 as pb
from tests.kit.cluster import cluster as make_cluster
from tests.kit.cluster.platforms import LabCluster
from tests.kit.lab.hosts import Host
from tests.scenarios.conversation import MIB, Talk, state
from tests.scenarios.guests import GUESTS
from tests.scenarios.settings import SETTINGS

ADDRESSES = {"mig1": "10.92.0.2", "mig2": "fd00:93::2"}


@pytest.fixture(scope="module", name="cluster")
def _cluster(_real_hosts: None) -> Iterator[LabCluster]:
    settings = {**SETTINGS, "ipv6": ["mig2"]}
    with make_cluster("libvirt", [GUESTS["counted"]], networks=2, lab_id=f"pa{os.getpid()}", settings=settings) as made:
        assert isinstance(made, LabCluster)
        yield made


@pytest.fixture
async def talk(cluster: LabCluster) -> AsyncIterator[Talk]:
    cluster.guest("counted")
    async with Talk(cluster.server) as talk:
        yield talk
    cluster.end_guests()
    for host in cluster.lab:
        for network in ADDRESSES:
            host.close_ports(network, 0, 0, None)
            host.swallow_big_packets(network, None)
            host.set_mtu(network, 1500)


@pytest.fixture
def h1(cluster: LabCluster) -> Host:
    return cluster.lab["h1"]


@pytest.fixture
def h2(cluster: LabCluster) -> Host:
    return cluster.lab["h2"]


async def refused(talk: Talk, cluster: LabCluster, network: str, *texts: str, **spec: Any) -> pb.Migration:
    """Migrate over a network whose path is bad; return what is told of it."""
    began = time.monotonic()
    migration = await talk.migrate("counted", "h2", network=network, **spec)
    took = time.monotonic() - began
    assert state(migration) == "failed"
    assert migration.failure.reason == "PATH_NOT_PROVED", migration.failure.message
    for text in (f"to {'[' + ADDRESSES[network] + ']' if ':' in ADDRESSES[network] else ADDRESSES[network]}:", *texts):
        assert text in migration.failure.message, migration.failure.message
    assert cluster.copies("counted") == {"h1": "running"}
    assert not any(timing.phase in ("begin", "prepare") and timing.hypervisor_duration.nanos for timing in migration.timings)
    assert took < 2.5, f"{took:.2f} s"
    print(f"{took:.2f} s: {migration.failure.message}")
    return migration


@pytest.mark.parametrize("network", ["mig1", "mig2"])
async def test_8_5_a_firewall_that_drops_is_found_within_a_second(cluster: LabCluster, talk: Talk, h2: Host, network: str) -> None:
    h2.close_ports(network, 49152, 49215)
    began = time.monotonic()
    await refused(talk, cluster, network, ":49215 on h2", "packets are dropped on the way")
    assert time.monotonic() - began < 1.6, "a second for the path, and the migration around it on a busy machine"


async def test_8_5_the_command_line_tells_it(cluster: LabCluster, talk: Talk, h2: Host) -> None:
    h2.close_ports("mig1", 49152, 49215)
    command = cluster.drover("migrate", "counted", "--to", "h2", "--network", "mig1")
    refusal = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=30, check=False)
    assert refusal.returncode == 4
    assert "from 10.92.0.1 on h1 to 10.92.0.2:49215 on h2" in refusal.stderr
    assert "stays on h1; let the firewalls on h2" in refusal.stderr


@pytest.mark.parametrize("network", ["mig1", "mig2"])
async def test_8_5_a_firewall_that_refuses(cluster: LabCluster, talk: Talk, h2: Host, network: str) -> None:
    h2.close_ports(network, 49152, 49215, "reject with tcp reset")
    await refused(talk, cluster, network, "connection refused", "let the firewall of h2 pass")


async def test_8_5_routes_by_which_the_memory_would_take_another_network(cluster: LabCluster, talk: Talk, h1: Host) -> None:
    h1.exec(["ip", "route", "add", "10.92.0.2/32", "via", "10.91.0.2"])
    try:
        await refused(talk, cluster, "mig1", "leaves by mgmt (10.91.0.1), and not by mig1 (10.92.0.1)", "ip route get 10.92.0.2")
    finally:
        h1.exec(["ip", "route", "del", "10.92.0.2/32"])


async def test_8_5_an_address_on_a_device_with_a_smaller_mtu(cluster: LabCluster, talk: Talk, h1: Host, h2: Host) -> None:
    """The migration address of h2 is on a bridge (as on a VLAN or a bond) above a device with a greater MTU."""
    address = f"{h2.addresses['mig1']}/24"
    for host in (h1, h2):
        host.set_mtu("mig1", 9000)
    for command in (
        "addr del ADDRESS dev mig1",
        "link add upper type bridge forward_delay 0 stp_state 0",
        "link set mig1 master upper",
        "link set upper mtu 1400 up",
        "addr add ADDRESS dev upper",
    ):
        h2.exec(["ip", *command.replace("ADDRESS", address).split()])
    try:
        before = h1.counters("mig1").sent
        migration = await talk.migrate("counted", "h2", network="mig1")
        assert state(migration) == "succeeded", migration.failure.message
        assert migration.network_choice.mtu == 1400
        assert h1.counters("mig1").sent - before >= 50 * MIB
    finally:
        h2.exec(["ip", "link", "del", "upper"])
        h2.exec(["ip", "addr", "replace", address, "dev", "mig1"])


@pytest.mark.parametrize(("direction", "way"), [("in", "from h1 to h2"), ("out", "from h2 to h1"), ("both", "from h1 to h2")])
@pytest.mark.parametrize("network", ["mig1", "mig2"])
async def test_8_5_a_path_that_swallows_big_packets(
    cluster: LabCluster, talk: Talk, h1: Host, h2: Host, network: str, direction: str, way: str
) -> None:
    for host in (h1, h2):
        host.set_mtu(network, 9000)
    h2.swallow_big_packets(network, 1500, direction)
    texts = f"those of 9000 bytes are lost on the way {way}", "the MTU is 9000 on h1 and 9000 on h2"
    await refused(talk, cluster, network, *texts)


@pytest.mark.parametrize("peer_to_peer", [True, False])
@pytest.mark.parametrize("network", ["mig1", "mig2"])
async def test_8_5_there_and_back_with_unequal_mtus(
    cluster: LabCluster, talk: Talk, h1: Host, h2: Host, network: str, peer_to_peer: bool
) -> None:
    """One host has jumbo frames, and the switch swallows them: TCP agrees on what both have. The memory takes that network."""
    h1.set_mtu(network, 9000)
    h2.swallow_big_packets(network, 1500)
    for source, destination, host in (("h1", "h2", h1), ("h2", "h1", h2)):
        before = host.counters(network).sent
        server = cluster.agents[source].address if peer_to_peer else cluster.server
        async with Talk(server) as driving:
            migration = await driving.migrate("counted", destination, network=network)
        assert state(migration) == "succeeded", migration.failure.message
        assert host.counters(network).sent - before >= 50 * MIB
        choice = migration.network_choice
        assert choice.mtu == 1500
        assert 0 < choice.round_trip.ToMicroseconds() < 100_000
        if network == "mig2":
            assert {choice.source_address, choice.destination_address} == {h.addresses6[network] for h in (h1, h2)}
            assert migration.uri.startswith("tcp://[fd00:93::")
    assert cluster.copies("counted") == {"h1": "running"}


async def test_8_5_jumbo_frames_that_pass_are_reported(talk: Talk, h1: Host, h2: Host) -> None:
    for host in (h1, h2):
        host.set_mtu("mig1", 9000)
    for destination in ("h2", "h1"):
        migration = await talk.migrate("counted", destination, network="mig1")
        assert state(migration) == "succeeded", migration.failure.message
        assert migration.network_choice.mtu == 9000
