"""Requirement O7: what belongs to a guest beside its running copy comes along, or is told before."""

import asyncio

import pytest

from tests.kit.cluster import Cluster
from tests.kit.lab.processes import wait_until
from tests.scenarios.conversation import MIB, Talk, state


async def becomes(cluster: Cluster, guest: str, definitions: dict[str, str]) -> None:
    await asyncio.to_thread(
        wait_until, lambda: cluster.definitions(guest) == definitions, 10.0, f"the definitions of {guest} to be {definitions}"
    )


async def test_6_2_autostart_travels_there_and_back(cluster: Cluster) -> None:
    guest = cluster.start_guest("starts-with-its-host")
    assert cluster.definitions(guest.name) == {"h1": "autostart"}
    async with Talk(cluster.server) as talk:
        for destination in ("h2", "h1"):  # at once: the next migration waits until the flag is set
            migration = await talk.migrate(guest.name, destination)
            assert state(migration) == "succeeded", migration.failure.message
        await becomes(cluster, guest.name, {"h1": "autostart"})
    assert guest.judge().problems() == []


async def test_6_2_a_definition_left_behind_does_not_start_by_itself(cluster: Cluster) -> None:
    guest = cluster.start_guest("left-behind")
    async with Talk(cluster.server) as talk:
        migration = await talk.migrate(guest.name, "h2", options={"undefine_source": False})
    assert state(migration) == "succeeded", migration.failure.message
    await becomes(cluster, guest.name, {"h1": "persistent", "h2": "autostart"})


async def test_6_2_a_guest_that_stays_keeps_its_autostart(cluster: Cluster) -> None:
    guest = cluster.start_guest("stays")
    async with Talk(cluster.server) as talk:
        migration = await talk.start(guest.name, "h2", bandwidth_bytes_per_second=4 * MIB)
        await talk.watch(migration.migration_id, lambda m: m.progress.processed_bytes > 0)
        assert "autostart" not in cluster.definitions(guest.name).values(), "a host that reboots now must not start it"
        await talk.cancel(migration.migration_id)
        assert state(await talk.end(migration.migration_id)) == "cancelled"
    await becomes(cluster, guest.name, {"h1": "autostart"})


async def test_6_20_a_transient_guest_stays_transient(cluster: Cluster) -> None:
    guest = cluster.start_guest("transient")
    async with Talk(cluster.server) as talk:
        migration = await talk.migrate(guest.name, "h2")
        assert state(migration) == "succeeded", migration.failure.message
        assert not migration.warnings
        assert cluster.definitions(guest.name) == {"h2": "transient"}
        migration = await talk.migrate(guest.name, "h1", options={"persist_destination": True})
        assert state(migration) == "succeeded", migration.failure.message
    assert cluster.definitions(guest.name) == {"h1": "persistent"}


@pytest.mark.parametrize("keep", [False, True])
async def test_6_20_a_definition_that_will_be_nowhere_is_told_before(cluster: Cluster, keep: bool) -> None:
    guest = cluster.guest("forgotten")
    source, destination = ("h1", "h2") if cluster.running_on(guest.name) == ["h1"] else ("h2", "h1")
    async with Talk(cluster.server) as talk:
        options = {"persist_destination": False, **({"undefine_source": False} if keep else {})}
        started = await talk.start(guest.name, destination, options=options)
        told = list(started.warnings)
        assert state(await talk.end(started.migration_id)) == "succeeded"
    if not cluster.definitions(guest.name).get(source) and keep:
        return  # it is transient since the migration before: nothing was to be told
    assert [warning for warning in told if "persist_destination" in warning]
    assert cluster.definitions(guest.name)[destination] == "transient"
