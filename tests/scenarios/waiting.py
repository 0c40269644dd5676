"""Requirement A2 and issue 7: a migration that has no slot yet is there, waits, and survives its driver."""

import contextlib
from collections.abc import AsyncIterator

import pytest

from agent.runtime.errors import DroverError, Reason
from drover.agent.v1 import host_pb2
from drover.agent.v1 import migration_pb2 as pb
from tests.kit.cluster import Cluster
from tests.scenarios.conversation import CRAWL, Talk, assert_idle, speed_up, state


@contextlib.asynccontextmanager
async def none_is_prepared(cluster: Cluster) -> AsyncIterator[None]:
    """In the block h2 prepares no guest beside the one that comes, so that whoever waits has no slot."""
    async with Talk(cluster.agents["h2"].address) as talk:
        request = host_pb2.UpdateHostRequest(settings=host_pb2.HostSettings(prepared_limit=0))
        request.update_mask.paths[:] = ["prepared_limit"]
        await talk.call(talk.hosts.UpdateHost, request)
        try:
            yield
        finally:
            request.settings.ClearField("prepared_limit")
            await talk.call(talk.hosts.UpdateHost, request)


@contextlib.asynccontextmanager
async def behind_another(cluster: Cluster, test: str, server: str) -> AsyncIterator[tuple[Talk, str, str]]:
    """The one slot of h2 is taken by a migration that crawls, and another one waits for it. Their ids."""
    first, second = cluster.start_guest(f"waited-for-{test}"), cluster.start_guest(f"waits-{test}")
    async with none_is_prepared(cluster), Talk(server) as talk:
        running = await talk.start(first.name, "h2", bandwidth_bytes_per_second=CRAWL)
        waits = await talk.start(second.name, "h2", slot_wait=120)
        assert state(waits) == "pending"
        now = await talk.watch(waits.migration_id, lambda m: "are taken" in m.waiting_for)
        assert (state(now), now.wait_reason, now.runs_on) == ("pending", pb.WAIT_REASON_SLOT, "h1")
        yield talk, running.migration_id, waits.migration_id


@pytest.mark.parametrize("server", ["coordinator", "agent"])
async def test_7_a_migration_waits_until_the_slot_is_free(cluster: Cluster, server: str) -> None:
    address = cluster.server if server == "coordinator" else cluster.agents["h1"].address
    async with behind_another(cluster, server, address) as (talk, running, waits):
        assert {running, waits} <= {migration.migration_id for migration in (await talk.list(active_only=True)).migrations}
        await speed_up(talk, running)
        ended = await talk.end(waits)
        assert (state(ended), ended.runs_on) == ("succeeded", "h2")
        assert state(await talk.end(running)) == "succeeded"
    for name in (f"waited-for-{server}", f"waits-{server}"):
        assert cluster.running_on(name) == ["h2"]
        cluster.guests[name].wait_lines(2)
        assert cluster.guests[name].judge().problems() == []
    await assert_idle(cluster)


async def test_7_a_cancel_ends_the_wait_and_leaves_the_guest_alone(cluster: Cluster) -> None:
    async with behind_another(cluster, "cancel", cluster.server) as (talk, running, waits):
        await talk.cancel(waits)
        ended = await talk.end(waits)
        assert (state(ended), ended.runs_on) == ("cancelled", "h1")
        assert state(await talk.get(running)) == "active"
        await speed_up(talk, running)
        assert state(await talk.end(running)) == "succeeded"
    assert cluster.running_on("waits-cancel") == ["h1"]
    await assert_idle(cluster)


async def test_7_a_migration_waits_on_when_its_coordinator_is_killed(cluster: Cluster) -> None:
    """And whoever followed all migrations is told to list again, and misses nothing."""
    async with behind_another(cluster, "kill", cluster.server) as (talk, running, waits):
        listed = await talk.list()
        cluster.coordinator.kill()
        cluster.coordinator.start()
        with pytest.raises(DroverError) as error:
            await anext(talk.changes(listed.revision))
        assert error.value.reason is Reason.WATCH_TOO_SLOW, error.value.message
        again = await talk.list()
        assert again.revision > listed.revision
        assert [migration.migration_id for migration in again.migrations[:2]] == [waits, running]
        await speed_up(talk, running)
        ends: dict[str, str] = {}
        async for change in talk.changes(again.revision):
            if change.migration.HasField("end_time"):
                ends[change.migration.migration_id] = state(change.migration)
            if {running, waits} <= ends.keys():
                break
        assert ends == {running: "succeeded", waits: "succeeded"}
    assert cluster.running_on("waits-kill") == ["h2"]
    await assert_idle(cluster)
