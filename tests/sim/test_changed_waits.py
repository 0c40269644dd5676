"""What is changed or asked for while migrations wait or a network is drained: it holds, or is refused with nothing changed."""

from collections.abc import Iterator
from typing import Any

import pytest

from agent.runtime.errors import DroverError, Reason
from tests.kit.cluster import Cluster, GuestSpec, cluster
from tests.scenarios.conversation import CRAWL, MIB, Talk, duration, speed_up, state, update
from tests.scenarios.limits import drover

pytestmark = pytest.mark.timeout(90)


@pytest.fixture(name="hosts")
def _hosts() -> Iterator[Cluster]:
    """h2 takes one guest at a time; mig1 and mig2 carry 100 MiB/s each."""
    guests = [GuestSpec(name, memory_mib=32, dirty=20) for name in ("first", "second", "third")]
    with cluster("sim", guests, networks=2, lab_id="changed") as made:
        for guest in guests:
            made.start_guest(guest.name, "h1")
        for number, name in enumerate(("mig1", "mig2"), start=91):
            drover(made, "network", "add", name, "--cidr", f"127.{number}.0.0/24", "--migration", "--cap", "100MiB/s")
        drover(made, "host", "set", "h2", "--incoming-limit", "1", "--prepared-limit", "0")
        yield made


async def start(talk: Talk, guest: str, slot_wait: float = 0.0, **spec: Any) -> str:
    return (await talk.start(guest, "h2", slot_wait=slot_wait, **spec)).migration_id


async def test_8_6_a_minimum_beyond_the_capacity_is_refused_while_the_migration_waits(hosts: Cluster) -> None:
    async with Talk(hosts.server) as talk:
        runs = await start(talk, "first", bandwidth_bytes_per_second=CRAWL)
        waits = await start(talk, "second", 100)
        await talk.watch(waits, lambda migration: migration.wait.position == 1)
        with pytest.raises(DroverError) as refusal:
            await update(talk, waits, min_bandwidth_bytes_per_second=500 * MIB)
        assert refusal.value.reason is Reason.BANDWIDTH_INSUFFICIENT
        assert "wait until" not in refusal.value.message
        assert (await talk.get(waits)).settings.min_bandwidth_bytes_per_second == 0
        await speed_up(talk, runs)
        assert state(await talk.end(waits)) == "succeeded"


async def test_8_6_a_cap_that_was_changed_holds_over_a_restart_of_the_coordinator(hosts: Cluster) -> None:
    """Neither the earlier one counts, nor none until the shares are divided: the guest would be there at once."""
    drover(hosts, "network", "set", "mig1", "--cap", "1MiB/s")
    async with Talk(hosts.server) as talk:
        runs = await start(talk, "first", network="mig1")
        await talk.watch(runs, lambda migration: migration.progress.processed_bytes > 0)
        drover(hosts, "network", "set", "mig1", "--cap", "2MiB/s")
        await talk.watch(runs, lambda migration: migration.applied_bandwidth_bytes_per_second == 2 * MIB)
    hosts.coordinator.kill()
    hosts.coordinator.start()
    async with Talk(hosts.server) as talk:
        now = await talk.watch(runs, lambda m: m.applied_bandwidth_bytes_per_second > 0 and state(m) == "active")
        assert now.applied_bandwidth_bytes_per_second == 2 * MIB
        drover(hosts, "network", "set", "mig1", "--cap", "100MiB/s")
        assert state(await talk.end(runs)) == "succeeded"


async def test_8_4_a_network_that_is_drained_takes_no_migration_that_names_it(hosts: Cluster) -> None:
    """Each of them would put the end of the drain off. One that waits, and names none, goes over another network."""
    async with Talk(hosts.server) as talk:
        runs = await start(talk, "first", network="mig2", bandwidth_bytes_per_second=CRAWL)
        await talk.watch(runs, lambda migration: migration.phase == "perform")
        waits, names = await start(talk, "second", 100), await start(talk, "third", 100, network="mig2")
        drover(hosts, "network", "revoke", "mig2", "--drain")
        failed = await talk.end(names)
        assert (state(failed), failed.failure.reason) == ("failed", "NETWORK_FORBIDDEN")
        with pytest.raises(DroverError) as refusal:
            await start(talk, "third", network="mig2")
        assert refusal.value.reason is Reason.NETWORK_FORBIDDEN
        assert "is being drained" in refusal.value.message
        await speed_up(talk, runs)
        await talk.end(runs)
        assert (await talk.end(waits)).network == "mig1"


async def test_8_2_the_end_of_a_wait_names_the_time_that_was_set(hosts: Cluster) -> None:
    async with Talk(hosts.server) as talk:
        await start(talk, "first", bandwidth_bytes_per_second=CRAWL)
        waits = await start(talk, "second", 600)
        await update(talk, waits, slot_wait=duration(1.0))
        ended = await talk.end(waits)
        assert "gave no slot within 1 s" in ended.failure.message
