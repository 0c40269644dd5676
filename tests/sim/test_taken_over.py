"""The source's agent takes migrations over while the coordinator is away, and keeps to the networks of the cluster meanwhile."""

import asyncio
from collections.abc import Callable, Iterator

import pytest

from agent.runtime.errors import DroverError
from drover.agent.v1 import migration_pb2 as pb
from tests.kit.cluster import Cluster, GuestSpec, cluster
from tests.scenarios.conversation import CRAWL, FINAL, MIB, Talk, speed_up, state
from tests.scenarios.limits import drover

pytestmark = pytest.mark.timeout(120)

GUESTS = [GuestSpec(name, memory_mib=48, dirty=20) for name in ("hog", "guest", "other")]
SETTINGS = {"agent": {"lease_seconds": 8, "takeover_after_seconds": 2}}


@pytest.fixture(name="hosts")
def _hosts() -> Iterator[Cluster]:
    with cluster("sim", GUESTS, hosts=3, networks=2, settings=SETTINGS) as made:
        made.start_guest("hog", "h3")
        made.start_guest("guest", "h1")
        made.start_guest("other", "h1")
        yield made


async def until(address: str, migration_id: str, holds: Callable[[pb.Migration], bool]) -> pb.Migration:
    async with Talk(address) as talk, asyncio.timeout(40):
        while True:
            try:
                found = await talk.get(migration_id)
            except DroverError:
                found = pb.Migration()
            if found.migration_id and holds(found):
                return found
            await asyncio.sleep(0.1)  # no watch begins before the migration is there


async def test_8_2_a_coordinator_that_returns_agrees_with_the_agent_on_the_network(hosts: Cluster) -> None:
    """Both plan the migration that waits, and only the coordinator counts what others take of a network."""
    drover(hosts, "host", "set", "h2", "--incoming-limit", "1", "--prepared-limit", "0")
    async with Talk(hosts.server) as talk:
        hog = (await talk.start("hog", "h2", bandwidth_bytes_per_second=CRAWL)).migration_id
        await until(hosts.server, hog, lambda m: m.progress.processed_bytes > 0)
        waiting = (await talk.start("guest", "h2", slot_wait=120)).migration_id
        await until(hosts.server, waiting, lambda m: m.wait.position == 1)
    hosts.coordinator.kill()
    source = hosts.agents["h1"].address
    await until(source, waiting, lambda m: m.driver == "h1" and m.wait.position == 1)
    hosts.coordinator.start()
    await until(hosts.server, waiting, lambda m: m.wait.position == 1)
    async with Talk(hosts.server) as talk:
        await speed_up(talk, hog)
    for server in (hosts.server, source):
        ended = await until(server, waiting, lambda m: m.state in FINAL)
        assert (state(ended), ended.runs_on) == ("succeeded", "h2"), ended.failure.message
    assert hosts.running_on("guest") == ["h2"]


@pytest.mark.parametrize("tenant", ["blue", ""])
async def test_8_4_an_agent_that_takes_over_a_wait_keeps_to_the_tenants_of_the_cluster(hosts: Cluster, tenant: str) -> None:
    """The agent's own file names the same networks, without tenants."""
    lists = {"mig1": (), "mig2": ("blue",)} if tenant else {"mig1": ("blue",), "mig2": ()}
    for number, (name, tenants) in enumerate(lists.items(), start=91):
        drover(hosts, "network", "add", name, "--cidr", f"127.{number}.0.0/24", "--migration", *(f"--tenant={t}" for t in tenants))
    drover(hosts, "host", "set", "h2", "--incoming-limit", "1", "--prepared-limit", "0")
    async with Talk(hosts.server) as talk:
        hog = (await talk.start("hog", "h2", bandwidth_bytes_per_second=CRAWL, tenant=tenant)).migration_id
        await until(hosts.server, hog, lambda m: m.progress.processed_bytes > 0)
        waiting = (await talk.start("guest", "h2", slot_wait=120, tenant=tenant)).migration_id
        planned = await until(hosts.server, waiting, lambda m: m.wait.position == 1)
        assert planned.network == "mig2"
    hosts.coordinator.kill()
    source, other = hosts.agents["h1"].address, hosts.agents["h3"].address
    await until(source, waiting, lambda m: m.driver == "h1" and m.wait.position == 1)
    await until(other, hog, lambda m: m.driver == "h3")
    async with Talk(other) as talk:
        await speed_up(talk, hog)
    ended = await until(source, waiting, lambda m: m.state in FINAL)
    assert (state(ended), ended.network, ended.uri.split(":")[1]) == ("succeeded", "mig2", "//127.92.0.2"), ended.failure.message


@pytest.mark.parametrize("rule", ["--max-bandwidth", "--cap"])
async def test_8_6_the_rules_of_a_network_hold_while_the_coordinator_is_away(hosts: Cluster, rule: str) -> None:
    drover(hosts, "network", "add", "mig1", "--cidr", "127.91.0.0/24", "--migration", rule, "9MiB/s")
    drover(hosts, "network", "set", "mig1", rule, "2MiB/s" if rule == "--max-bandwidth" else "4MiB/s")
    async with Talk(hosts.server) as talk:
        ids = [(await talk.start(guest, to, network="mig1")).migration_id for guest, to in (("guest", "h2"), ("other", "h3"))]
    for migration_id in ids:
        await until(hosts.server, migration_id, lambda m: m.applied_bandwidth_bytes_per_second == 2 * MIB)
    hosts.coordinator.kill()
    source = hosts.agents["h1"].address
    for migration_id in ids:
        taken = await until(source, migration_id, lambda m: m.driver == "h1")
        assert (state(taken), taken.network) == ("active", "mig1")
    async with Talk(source) as talk:
        for migration_id in ids:
            now = await talk.watch(migration_id, lambda m: m.progress.processed_bytes > 8 * MIB)
            assert now.applied_bandwidth_bytes_per_second == now.allotted_bytes_per_second == 2 * MIB
