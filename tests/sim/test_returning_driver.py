"""A coordinator that returns while the source's agent drives the same migration: it says only what the hosts' records show."""

import asyncio
import signal

import pytest

from drover.agent.v1 import migration_pb2 as pb
from tests.kit.cluster import Cluster
from tests.scenarios.conversation import CRAWL, FINAL, Talk, speed_up, state
from tests.scenarios.limits import drover
from tests.sim.test_taken_over import _hosts as _hosts  # noqa: PLC0414 - the fixture
from tests.sim.test_taken_over import until

pytestmark = pytest.mark.timeout(120)


async def one_waits(hosts: Cluster) -> tuple[str, str]:
    """The ids of a migration that sends to h2, and of one from h1 that waits behind it."""
    async with Talk(hosts.server) as talk:
        hog = (await talk.start("hog", "h2", slot_wait=60, bandwidth_bytes_per_second=CRAWL)).migration_id
        await talk.watch(hog, lambda m: m.progress.processed_bytes > 0)
        return hog, (await talk.start("guest", "h2", slot_wait=120)).migration_id


async def test_8_2_a_guest_that_the_agent_has_moved_is_found_while_its_destination_is_away(hosts: Cluster) -> None:
    drover(hosts, "host", "set", "h2", "--incoming-limit", "1", "--prepared-limit", "0")
    hog, waiting = await one_waits(hosts)
    await until(hosts.server, waiting, lambda m: m.wait.position == 1)
    hosts.coordinator.kill()
    sender, source = hosts.agents["h3"].address, hosts.agents["h1"].address
    await until(sender, hog, lambda m: m.driver == "h3")
    async with Talk(sender) as talk:
        await speed_up(talk, hog)
    await until(source, waiting, lambda m: state(m) == "succeeded")
    hosts.agents["h2"].kill()
    hosts.coordinator.start()
    ended = await until(hosts.server, waiting, lambda m: m.state in FINAL)
    assert (state(ended), ended.runs_on) == ("succeeded", "h2"), ended.failure.message
    hosts.agents["h2"].start()


async def test_8_2_the_later_attempt_of_the_agent_is_followed(hosts: Cluster) -> None:
    """The coordinator had taken the slots of attempt 1 when it died; the agent goes on with attempt 2, and is the first to use the
    slot for which both wait."""
    drover(hosts, "host", "set", "h2", "--incoming-limit", "1")
    hog, waiting = await one_waits(hosts)
    await until(hosts.server, waiting, lambda m: any(t.phase == "prepare" for t in m.timings))
    hosts.coordinator.kill()
    sender, source = hosts.agents["h3"].address, hosts.agents["h1"].address
    await asyncio.to_thread(drover, hosts, "host", "set", "h2", "--prepared-limit", "0", server=hosts.agents["h2"].address)
    hosts.agents["h1"].kill()
    hosts.agents["h1"].start()
    await until(source, waiting, lambda m: m.driver == "h1" and m.attempt == 2 and m.wait.position == 1)
    await until(sender, hog, lambda m: m.driver == "h3")
    hosts.coordinator.start()
    await until(hosts.server, waiting, lambda m: m.wait.position == 1)
    hosts.coordinator.signal(signal.SIGSTOP)
    async with Talk(sender) as talk:
        await speed_up(talk, hog)
    await until(source, waiting, lambda m: m.attempt == 2 and m.state in FINAL)
    hosts.coordinator.signal(signal.SIGCONT)
    ended: pb.Migration = await until(hosts.server, waiting, lambda m: m.state in FINAL)
    assert (state(ended), ended.runs_on, hosts.running_on("guest")) == ("succeeded", "h2", ["h2"]), ended.failure.message
