"""Requirements H1, H9, C7, O2, R4, R5: guests move, are cancelled, and always run on exactly one host."""

import os
import time
from typing import Any

import pytest

from agent.runtime.errors import DroverError, Reason
from tests.kit.cluster import Cluster
from tests.scenarios.conversation import MIB, Talk, assert_idle, new_id, state

SLOW: dict[str, Any] = {"bandwidth_bytes_per_second": 20 * MIB}
"""Makes a transfer last some seconds."""


async def test_there_and_back(cluster: Cluster) -> None:
    guest = cluster.start_guest("there-and-back")
    async with Talk(cluster.server) as talk:
        for source, destination in (("h1", "h2"), ("h2", "h1")):
            migration = await talk.migrate(guest.name, destination)
            assert state(migration) == "succeeded", migration.failure.message
            assert (migration.source_host, migration.runs_on, migration.network) == (source, destination, "mig1")
            assert migration.domain_uuid == guest.uuid
            assert [t.phase for t in migration.timings] == ["plan", "reserve", "begin", "prepare", "perform", "finish", "confirm"]
            assert migration.HasField("commit_time")
            assert migration.end_time.ToNanoseconds() >= migration.commit_time.ToNanoseconds()
            assert cluster.copies(guest.name) == {destination: "running"}
    guest.wait_lines(20)
    assert guest.judge().problems() == []
    await assert_idle(cluster)


async def test_peer_to_peer(cluster: Cluster) -> None:
    guest = cluster.start_guest("peer-to-peer")
    for source, destination in (("h1", "h2"), ("h2", "h1")):
        async with Talk(cluster.agents[source].address) as talk:
            migration = await talk.migrate(guest.name, destination)
        assert state(migration) == "succeeded", migration.failure.message
        assert migration.driver == source
        assert cluster.copies(guest.name) == {destination: "running"}
    guest.wait_lines(20)
    assert guest.judge().problems() == []


def busy() -> float:
    """How many times longer than on a quiet machine anything takes now, by its load."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


async def test_cancel_during_perform_twice_then_go(cluster: Cluster) -> None:
    guest = cluster.start_guest("to-cancel")
    async with Talk(cluster.server) as talk:
        for _ in range(2):
            migration = await talk.start(guest.name, "h2", **SLOW)
            await talk.watch(migration.migration_id, lambda m: m.phase == "perform" and m.progress.processed_bytes > 0)
            asked = time.monotonic()
            await talk.cancel(migration.migration_id)
            migration = await talk.end(migration.migration_id)
            took = time.monotonic() - asked
            assert state(migration) == "cancelled", migration.failure.message
            assert migration.failure.reason == Reason.CANCELLED
            assert migration.runs_on == "h1"
            assert took < 2.0 * busy(), "the issue's bar: the guest runs on at the source within 2 s"
            guest.wait_lines(5)
            assert cluster.copies(guest.name) == {"h1": "running"}
        await assert_idle(cluster)
        migration = await talk.migrate(guest.name, "h2")
        assert state(migration) == "succeeded", migration.failure.message
    guest.wait_lines(20)
    assert guest.judge().problems() == []


async def test_cancel_at_once(cluster: Cluster) -> None:
    """Before anything has flowed; whichever comes first, the guest runs on exactly one host."""
    guest = cluster.start_guest("cancelled-at-once")
    async with Talk(cluster.server) as talk:
        migration = await talk.start(guest.name, "h2", **SLOW)
        await talk.cancel(migration.migration_id)
        migration = await talk.end(migration.migration_id)
    assert state(migration) == "cancelled"
    assert cluster.copies(guest.name) == {"h1": "running"}
    guest.wait_lines(5)
    assert guest.judge().problems() == []
    await assert_idle(cluster)


async def test_cancel_after_the_end_says_how_it_ended(cluster: Cluster) -> None:
    guest = cluster.start_guest("watched")
    async with Talk(cluster.server) as talk:
        migration = await talk.migrate(guest.name, "h2")
        await talk.cancel(migration.migration_id)
        assert state(await talk.end(migration.migration_id)) == "succeeded"
    assert cluster.copies(guest.name) == {"h2": "running"}


async def test_renamed_on_arrival(cluster: Cluster) -> None:
    guest = cluster.start_guest("renamed")
    async with Talk(cluster.server) as talk:
        migration = await talk.migrate(guest.name, "h2", destination_name="renamed-there")
        assert state(migration) == "succeeded", migration.failure.message
        assert cluster.copies("renamed-there") == {"h2": "running"}
        assert cluster.copies(guest.name) == {}
    guest.wait_lines(5)
    assert guest.judge().problems() == []


async def test_paused_on_arrival(cluster: Cluster) -> None:
    guest = cluster.start_guest("paused-on-arrival")
    async with Talk(cluster.server) as talk:
        migration = await talk.migrate(guest.name, "h2", options={"paused": True})
        assert state(migration) == "succeeded", migration.failure.message
    assert cluster.copies(guest.name) == {"h2": "paused"}
    assert guest.judge().problems() == []


async def test_the_same_request_twice_is_one_migration(cluster: Cluster) -> None:
    guest = cluster.start_guest("twice")
    migration_id = new_id()
    async with Talk(cluster.server) as talk:
        first = await talk.start(guest.name, "h2", migration_id)
        again = await talk.start(guest.name, "h2", migration_id)
        assert again.create_time == first.create_time
        with pytest.raises(DroverError) as other:
            await talk.start(guest.name, "h1", migration_id)
        assert other.value.reason is Reason.MIGRATION_EXISTS
        assert state(await talk.end(migration_id)) == "succeeded"
        assert state(await talk.start(guest.name, "h2", migration_id)) == "succeeded"
    assert cluster.copies(guest.name) == {"h2": "running"}


async def test_progress_is_told_while_the_memory_flows(cluster: Cluster) -> None:
    guest = cluster.start_guest("progress")
    async with Talk(cluster.server) as talk:
        migration = await talk.start(guest.name, "h2", **SLOW)
        seen = await talk.watch(migration.migration_id, lambda m: m.progress.remaining_bytes > 0 and m.progress.bytes_per_second > 0)
        assert seen.phase == "perform"
        assert seen.progress.iteration >= 1
        assert seen.progress.total_bytes >= 128 * MIB
        assert seen.progress.HasField("eta_low")
        end = await talk.end(migration.migration_id)
        assert state(end) == "succeeded", end.failure.message
        assert end.progress.processed_bytes > 0
        assert end.progress.downtime.ToMilliseconds() > 0
    guest.wait_lines(5)
    assert guest.judge().problems() == []


async def test_a_driver_that_dies_is_not_missed(cluster: Cluster) -> None:
    """The coordinator is killed during Perform: the source's agent drives the migration to its end (A6)."""
    guest = cluster.start_guest("orphaned")
    async with Talk(cluster.server) as talk:
        migration = await talk.start(guest.name, "h2", **SLOW)
        await talk.watch(migration.migration_id, lambda m: m.progress.processed_bytes > 0)
    cluster.coordinator.kill()
    try:
        cluster.wait_running_on(guest.name, "h2", timeout=30)
    finally:
        cluster.coordinator.start()
    async with Talk(cluster.server) as talk:
        assert state(await talk.end(migration.migration_id)) == "succeeded"
    guest.wait_lines(5)
    assert guest.judge().problems() == []
    assert cluster.copies(guest.name) == {"h2": "running"}
    await assert_idle(cluster)


@pytest.mark.parametrize("spelling", ["tcp://{address}", "tcp://{address}/", "tcp://{address}:49160", "TCP://{address}:49161/"])
async def test_6_18_a_uri_however_it_is_spelled(cluster: Cluster, spelling: str) -> None:
    """With a port, libvirt itself answers none at Prepare."""
    guest = cluster.guest("to-a-uri")
    (here,) = cluster.copies(guest.name)
    there = "h2" if here == "h1" else "h1"
    async with Talk(cluster.agents[there].address) as talk:
        address = next(network.address for network in (await talk.host()).networks if network.name == "mig1")
    async with Talk(cluster.server) as talk:
        migration = await talk.migrate(guest.name, there, uri=spelling.format(address=address))
    assert state(migration) == "succeeded", migration.failure.message
    assert migration.uri.startswith(f"tcp://{address}:491")
    assert not migration.uri.endswith("/")
    assert cluster.copies(guest.name) == {there: "running"}
    guest.wait_lines(5)
    assert guest.judge().problems() == []
