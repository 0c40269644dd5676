"""Networks on real hosts: management and two migration networks. The bytes on each interface prove which one carried a guest."""

import asyncio
import json
import os
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from agent.runtime.errors import DroverError, Reason
from drover.agent.v1 import migration_pb2 as pb
from tests.kit.cluster import Cluster, GuestSpec, cluster
from tests.kit.cluster.platforms import LabCluster
from tests.kit.lab.processes import wait_until
from tests.scenarios.conversation import MIB, Talk, state
from tests.scenarios.migrating import busy

pytestmark = pytest.mark.timeout(180)

SIX = [f"spread-{number}" for number in range(6)]
GUESTS = [*(GuestSpec(name, memory_mib=32) for name in SIX), GuestSpec("moves", memory_mib=32), GuestSpec("slow", memory_mib=64)]
LEAST = 20 * MIB
"""Bytes that a guest's memory takes at least on the wire."""
LITTLE = 4 * MIB
"""More than everything but a guest's memory takes."""
RANGES = {"mig1": "10.92.0.0/24", "mig2": "10.93.0.0/24"}


@pytest.fixture(name="lab", scope="module")
def _lab(_real_hosts: None) -> Iterator[LabCluster]:
    settings = {"agent": {"incoming_limit": 8, "outgoing_limit": 8}}
    with cluster("libvirt", GUESTS, networks=2, lab_id=f"nw{os.getpid()}", settings=settings) as made:
        assert isinstance(made, LabCluster)
        yield made


def network(made: Cluster, *arguments: str) -> Any:
    command = made.drover("network", *arguments, "-o", "json")
    return json.loads(subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout)


@pytest.fixture(name="both")
def _both(lab: LabCluster) -> Iterator[LabCluster]:
    """The cluster with both migration networks, of equal capacity."""
    for name, cidr in RANGES.items():
        network(lab, "add", name, "--cidr", cidr, "--migration", "--capacity", "100MB/s")
    yield lab
    for each in network(lab, "list")["networks"]:
        network(lab, "remove", each["name"])


class Bytes:
    """What the hosts have sent on each network since this was made."""

    def __init__(self, lab: LabCluster) -> None:
        self._lab = lab
        self._before = self._now()

    def _now(self) -> Counter[str]:
        return Counter({name: sum(host.counters(name).sent for host in self._lab.lab.hosts) for name in ("mgmt", "mig1", "mig2")})

    def carried(self) -> dict[str, int]:
        now = self._now()
        return {name: now[name] - self._before[name] for name in now}


def only(carried: dict[str, int], network: str) -> bool:
    """Return whether that network carried a guest, and no other did."""
    return carried[network] > LEAST and all(count < LITTLE for name, count in carried.items() if name != network)


async def side(talk: Talk, lab: LabCluster, host: str, name: str, *, down: bool) -> float:
    """Wait until the coordinator sees a host's network up or down; return the seconds."""
    began = time.monotonic()
    while True:
        shown = await asyncio.to_thread(network, lab, "show", name)
        if [each["network"]["down"] for each in shown["hosts"] if each["host"] == host] == [down]:
            return time.monotonic() - began


async def test_8_5_six_guests_spread_over_two_networks(both: LabCluster) -> None:
    for name in SIX:
        both.start_guest(name)
    before = Bytes(both)
    async with Talk(both.server) as talk:
        started = await asyncio.gather(*(talk.start(name, "h2", bandwidth_bytes_per_second=30 * MIB) for name in SIX))
        assert Counter(migration.network for migration in started) == {"mig1": 3, "mig2": 3}
        ended = [await talk.end(migration.migration_id) for migration in started]
    assert {state(migration) for migration in ended} == {"succeeded"}
    for migration in ended:
        assert migration.network_choice.why.startswith("most free capacity")
    carried = before.carried()
    assert min(carried["mig1"], carried["mig2"]) > 3 * LEAST, carried
    assert carried["mgmt"] < 6 * LITTLE, carried
    for name in SIX:
        assert both.running_on(name) == ["h2"]
        assert both.guests[name].judge().problems() == []


async def test_8_5_a_tenants_guest_goes_over_its_own_network_only(both: LabCluster) -> None:
    guest = both.guest("moves")
    network(both, "set", "mig2", "--tenant", "acme")
    async with Talk(both.server) as talk:
        for to, tenant, expected in (("h2", "acme", "mig2"), ("h1", "", "mig1")):
            before = Bytes(both)
            moved = await talk.migrate(guest.name, to, tenant=tenant)
            assert (state(moved), moved.network) == ("succeeded", expected)
            assert only(before.carried(), expected), before.carried()
        with pytest.raises(DroverError) as error:
            await talk.start(guest.name, "h2", network="mig2", tenant="blue")
        assert error.value.reason is Reason.NETWORK_FORBIDDEN
    assert guest.judge().problems() == []


async def test_8_5_a_network_down_at_one_end_is_not_chosen(both: LabCluster) -> None:
    guest = both.guest("moves")
    async with Talk(both.server) as talk:
        both.lab["h2"].exec(["ip", "link", "set", "mig1", "down"])
        try:
            assert await side(talk, both, "h2", "mig1", down=True) < 3.0 * busy()  # each look takes most of a second here
            before = Bytes(both)
            moved = await talk.migrate(guest.name, "h2")
            assert (state(moved), moved.network) == ("succeeded", "mig2")
            assert [(out.name, out.why) for out in moved.network_choice.ruled_out if out.name == "mig1"] == [
                ("mig1", "it is down on h2")
            ]
            assert only(before.carried(), "mig2"), before.carried()
            with pytest.raises(DroverError, match="it is down on h2") as error:
                await talk.start(guest.name, "h1", network="mig1")
            assert error.value.reason is Reason.NETWORK_NOT_FOUND
        finally:
            both.lab["h2"].exec(["ip", "link", "set", "mig1", "up"])
            both.lab["h2"].exec(["ip", "addr", "add", "fd00:92::2/64", "dev", "mig1", "nodad"])  # the kernel has dropped it
        await side(talk, both, "h2", "mig1", down=False)
        assert state(await talk.migrate(guest.name, "h1", network="mig1")) == "succeeded"
    assert guest.judge().problems() == []


async def test_8_5_ipv6_from_end_to_end(both: LabCluster) -> None:
    guest = both.guest("moves")
    network(both, "set", "mig1", "--cidr", "fd00:92::/64")
    async with Talk(both.server) as talk:
        before = Bytes(both)
        moved = await talk.migrate(guest.name, "h2", network="mig1")
        assert state(moved) == "succeeded"
        assert moved.uri.startswith("tcp://[fd00:92::2]:")
        assert (moved.network_choice.source_address, moved.network_choice.destination_address) == ("fd00:92::1", "fd00:92::2")
        assert only(before.carried(), "mig1"), before.carried()
        assert state(await talk.migrate(guest.name, "h1", network="mig2")) == "succeeded"
    assert guest.judge().problems() == []


async def test_8_5_without_a_migration_network_it_is_refused_or_the_fallback_carries_it(both: LabCluster) -> None:
    guest = both.guest("moves")
    for name in RANGES:
        network(both, "revoke", name)
    network(both, "add", "mgmt", "--cidr", "10.91.0.0/24")
    async with Talk(both.server) as talk:
        with pytest.raises(DroverError, match="mig1: it does not have the migration role") as error:
            await talk.start(guest.name, "h2")
        assert error.value.reason is Reason.NETWORK_NOT_FOUND
        network(both, "set", "mgmt", "--fallback")
        before = Bytes(both)
        moved = await talk.migrate(guest.name, "h2")
        assert (state(moved), moved.network) == ("succeeded", "mgmt")
        assert any("its rules make it the fallback" in warning for warning in moved.warnings)
        carried = before.carried()
        assert carried["mgmt"] > LEAST, carried
        assert max(carried["mig1"], carried["mig2"]) < LITTLE, carried
        assert state(await talk.migrate(guest.name, "h1", network="mig1")) == "succeeded"


async def test_8_4_a_role_in_use_is_drained_also_over_a_restart(both: LabCluster) -> None:
    guest = both.start_guest("slow")
    async with Talk(both.server) as talk:
        moving = await talk.start(guest.name, "h2", network="mig1", bandwidth_bytes_per_second=2 * MIB)
        await talk.watch(moving.migration_id, lambda m: m.phase == "perform")
        refused = subprocess.run(both.drover("network", "revoke", "mig1"), capture_output=True, text=True, timeout=30)  # noqa: ASYNC221
        assert (refused.returncode, "NETWORK_IN_USE" in refused.stderr or "is used by" in refused.stderr) == (4, True)
        assert network(both, "revoke", "mig1", "--drain")["revoking"]
    both.coordinator.restart()
    both.wait_known()
    async with Talk(both.server) as talk:
        await talk.watch(moving.migration_id, lambda m: m.state == pb.MIGRATION_STATE_ACTIVE)  # it reads the records first
        assert network(both, "show", "mig1")["network"]["revoking"]
        await talk.cancel(moving.migration_id)
        assert state(await talk.end(moving.migration_id)) == "cancelled"
    shown = both.drover("network", "show", "mig1", "-o", "json")
    wait_until(lambda: not json.loads(subprocess.check_output(shown))["network"]["revoking"], 10, "the role to be taken")
    assert not network(both, "show", "mig1")["network"]["migration_role"]
