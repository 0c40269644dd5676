"""Requirement A8, issue 8 part 7: what waits and runs is changed durably, within a second, and read back from the hypervisor."""

import asyncio
import subprocess
import time
from typing import Any

import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from agent.runtime.errors import DroverError, Reason
from drover.agent.v1 import admission_pb2, handshake_pb2
from drover.agent.v1 import migration_pb2 as pb
from tests.kit.cluster import Cluster
from tests.scenarios.conversation import MIB, Talk, assert_idle, duration, state, update
from tests.scenarios.migrating import busy
from tests.scenarios.storming import slots_of


async def flowing(talk: Talk, guest: str, rate: int) -> pb.Migration:
    """A migration from h1 to h2 at that rate, while its memory flows."""
    started = await talk.start(guest, "h2", bandwidth_bytes_per_second=rate)
    return await talk.watch(started.migration_id, lambda m: m.phase == "perform" and m.progress.processed_bytes > 0)


@pytest.mark.parametrize("server", ["coordinator", "agent"])
async def test_8_7_a_running_transfer_obeys_within_a_second(cluster: Cluster, server: str) -> None:
    guest = cluster.start_guest(f"changed-{server}")
    async with Talk(cluster.server if server == "coordinator" else cluster.agents["h1"].address) as talk:
        running = await flowing(talk, guest.name, 4 * MIB)
        asked = time.monotonic()
        fields = {"bandwidth_bytes_per_second": 12 * MIB + 1, "max_downtime": duration(0.25), "importance": pb.IMPORTANCE_HIGH}
        changed = await update(talk, running.migration_id, **fields)
        assert time.monotonic() - asked < 1.0 * busy()
        assert changed.applied_bandwidth_bytes_per_second == 12 * MIB
        assert changed.applied_max_downtime.ToMilliseconds() == 250
        await talk.watch(running.migration_id, lambda m: 9 * MIB < m.progress.bytes_per_second < 14 * MIB)
        unlimited = await update(talk, running.migration_id, bandwidth_bytes_per_second=0)
        assert unlimited.applied_bandwidth_bytes_per_second == 0
        assert unlimited.settings.importance == pb.IMPORTANCE_HIGH
        ended = await talk.end(running.migration_id)
        assert state(ended) == "succeeded"
        with pytest.raises(DroverError) as refusal:
            await update(talk, running.migration_id, bandwidth_bytes_per_second=MIB)
        assert refusal.value.reason is Reason.MIGRATION_ENDED
    guest.wait_lines(5)
    assert guest.judge().problems() == []
    await assert_idle(cluster)


async def test_8_7_a_limit_holds_and_is_changed_in_post_copy(cluster: Cluster) -> None:
    """Where the kernel forbids post-copy to an ordinary QEMU, it is refused, and the transfer goes on as it was."""
    async with Talk(cluster.agents["h1"].address) as source:
        forbidden = "post_copy" in (await source.host()).migration_features.reasons
    await changes_in_post_copy(cluster, forbidden=forbidden)


async def changes_in_post_copy(cluster: Cluster, *, forbidden: bool) -> None:
    guest = cluster.start_guest("changed-postcopy")
    async with Talk(cluster.agents["h1"].address) as source, Talk(cluster.server) as talk:
        running = await flowing(talk, guest.name, 4 * MIB)
        request = handshake_pb2.StartPostCopyRequest(ref=handshake_pb2.AttemptRef(migration_id=running.migration_id, attempt=1))
        if forbidden:
            with pytest.raises(DroverError) as refused:
                await source.handshake.start_post_copy(request)
            assert refused.value.reason is Reason.POST_COPY_NOT_ARMED
        else:
            await source.handshake.start_post_copy(request)
            switched = await talk.watch(running.migration_id, lambda m: m.progress.post_copy)
            assert switched.progress.bytes_per_second <= 1.2 * 4 * MIB
            for host in ("h1", "h2"):
                held = {slot.migration_id: slot.kind for slot in await slots_of(cluster, host)}
                assert held == {running.migration_id: admission_pb2.SLOT_KIND_TRANSFERRING}, "memory still flows"
        for rate in (8 * MIB, 0):
            changed = await update(talk, running.migration_id, bandwidth_bytes_per_second=rate)
            assert changed.applied_bandwidth_bytes_per_second == rate
        assert state(await talk.end(running.migration_id)) == "succeeded"
    guest.wait_lines(5)
    assert guest.judge().problems() == []
    await assert_idle(cluster)


async def test_8_7_what_was_changed_outlives_its_driver(cluster: Cluster) -> None:
    guest = cluster.start_guest("changed-kill")
    async with Talk(cluster.server) as talk:
        running = await flowing(talk, guest.name, 4 * MIB)
        await update(talk, running.migration_id, bandwidth_bytes_per_second=6 * MIB, importance=pb.IMPORTANCE_LOW)
        cluster.coordinator.kill()
        cluster.coordinator.start()
        again = await talk.watch(running.migration_id, lambda m: m.applied_bandwidth_bytes_per_second == 6 * MIB)
        assert (again.settings.importance, again.settings.bandwidth_bytes_per_second) == (pb.IMPORTANCE_LOW, 6 * MIB)
        assert (await update(talk, running.migration_id, bandwidth_bytes_per_second=0)).applied_bandwidth_bytes_per_second == 0
        assert state(await talk.end(running.migration_id)) == "succeeded"
    assert cluster.copies(guest.name) == {"h2": "running"}
    await assert_idle(cluster)


_BAD: dict[str, tuple[dict[str, Any], Reason, str]] = {
    "below the unit": ({"bandwidth_bytes_per_second": MIB - 1}, Reason.BANDWIDTH_UNSUPPORTED, str(MIB)),
    "least below the unit": ({"min_bandwidth_bytes_per_second": 1}, Reason.BANDWIDTH_UNSUPPORTED, str(MIB)),
    "least over most": ({"min_bandwidth_bytes_per_second": 5 * MIB}, Reason.INVALID_FIELD, "min_bandwidth"),
    "negative": ({"bandwidth_bytes_per_second": -1}, Reason.INVALID_FIELD, "bandwidth"),
    "no pause": ({"max_downtime": duration(1e-9)}, Reason.INVALID_FIELD, "max_downtime"),
    "nothing": ({}, Reason.INVALID_FIELD, "update_mask"),
}


async def test_8_7_bad_changes_are_refused_and_change_nothing(cluster: Cluster) -> None:
    guest = cluster.start_guest("changed-badly")
    async with Talk(cluster.server) as talk:
        running = await flowing(talk, guest.name, 4 * MIB)
        before = (await talk.get(running.migration_id)).settings
        for what, (fields, reason, text) in _BAD.items():
            with pytest.raises(DroverError) as refusal:
                await update(talk, running.migration_id, **fields)
            assert refusal.value.reason is reason, what
            assert text in refusal.value.message, what
        unknown = pb.UpdateMigrationRequest(
            migration_id=running.migration_id, settings=pb.MigrationSettings(), update_mask=FieldMask(paths=["speed"])
        )
        with pytest.raises(DroverError, match="speed"):
            await talk.call(talk.migrations.UpdateMigration, unknown)
        after = await talk.get(running.migration_id)
        assert (after.settings, after.applied_bandwidth_bytes_per_second) == (before, 4 * MIB)
        await talk.cancel(running.migration_id)
        assert state(await talk.end(running.migration_id)) == "cancelled"
    await assert_idle(cluster)


async def test_8_7_the_command_prints_what_is_applied(cluster: Cluster) -> None:
    guest = cluster.start_guest("changed-by-hand")
    async with Talk(cluster.server) as talk:
        running = await flowing(talk, guest.name, 4 * MIB)
        command = cluster.drover("migration", "set", running.migration_id[:8], "--bandwidth", "7.5MiB/s", "--max-downtime", "200ms")
        said = (await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=30, check=True)).stdout
        assert "7.5 MiB/s, 7 MiB/s applied" in said
        assert "200 ms, 200 ms applied" in said
        await update(talk, running.migration_id, bandwidth_bytes_per_second=0)
        assert state(await talk.end(running.migration_id)) == "succeeded"
    await assert_idle(cluster)


async def test_8_7_a_deadline_that_is_over_ends_the_wait(cluster: Cluster) -> None:
    """Also of a migration that is prepared already, and waits for the right to transfer."""
    first, second = cluster.start_guest("waited-for-deadline"), cluster.start_guest("waits-deadline")
    async with Talk(cluster.server) as talk:
        running = await flowing(talk, first.name, 8 * MIB)
        waits = (await talk.start(second.name, "h2", slot_wait=120)).migration_id
        await talk.watch(waits, lambda m: m.wait_reason == pb.WAIT_REASON_SLOT and "are taken" in m.waiting_for)
        asked = time.monotonic()
        changed = await update(talk, waits, slot_wait=duration(0.001))
        assert changed.settings.slot_wait.ToMicroseconds() == 1000
        ended = await talk.end(waits)
        assert time.monotonic() - asked < 3.0 * busy()
        assert (state(ended), ended.runs_on) == ("failed", "h1")
        assert ended.failure.reason == Reason.BUSY
        await update(talk, running.migration_id, bandwidth_bytes_per_second=0)
        assert state(await talk.end(running.migration_id)) == "succeeded"
    second.wait_lines(2)
    await assert_idle(cluster)
