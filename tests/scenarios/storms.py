"""Issue 8, points 1 and 2: many guests at once, and what dies meanwhile. Its `cluster` has four hosts."""

import asyncio
import contextlib
import itertools
import subprocess
import time
from collections.abc import AsyncIterator, Sequence

import pytest

from drover.agent.v1 import admission_pb2
from drover.agent.v1 import migration_pb2 as pb
from tests.bench.stats import most_at_once
from tests.kit.cluster import Cluster
from tests.scenarios.conversation import CRAWL, Talk, state
from tests.scenarios.storming import HIGH, LOW, MEDIUM, Leg, Slots, Storm, Watcher, set_limits, slots_of

pytestmark = pytest.mark.timeout(150)

TARGET = "h4"
PREPARED = admission_pb2.SLOT_KIND_PREPARED
FIRST = (Leg("s1", "h1", TARGET), Leg("s2", "h2", TARGET), Leg("s3", "h3", TARGET))
"""They take the two slots and the prepared place of the destination."""
QUEUED = (
    Leg("s4", "h1", TARGET, LOW),
    Leg("s5", "h1", TARGET, MEDIUM),
    Leg("s6", "h2", TARGET, MEDIUM),
    Leg("s7", "h3", TARGET, HIGH),
    Leg("s8", "h1", TARGET, HIGH),
)
"""They wait, in the order of their age."""


def assert_fair(order: Sequence[Leg], before: Sequence[Leg]) -> None:
    """Assert that `order` is by importance, then by source (first the one whose last grant is the longest ago), then by age;
    `before`: granted before, in this order.
    """
    left, granted = [leg for leg in (*FIRST, *QUEUED) if leg in order], [leg.source for leg in before]
    for leg in order:
        high = [each for each in left if each.importance == max(other.importance for other in left)]
        ages = {each.source: granted[::-1].index(each.source) if each.source in granted else 1000 for each in high}
        fair = next(each for each in high if ages[each.source] == max(ages.values()))
        assert leg == fair, f"{leg.guest} went before {fair.guest} in {[each.guest for each in order]}"
        left.remove(leg)
        granted.append(leg.source)


@contextlib.asynccontextmanager
async def storm_of_eight(cluster: Cluster) -> AsyncIterator[Storm]:
    """Start each once the one before it has its slot or its place, so that the order is known. The first ones crawl until the block
    ends."""
    await set_limits(cluster, incoming=2, outgoing=4, prepared=1)
    async with Storm(cluster, cluster.server, [*FIRST, *QUEUED]) as storm:
        for leg in FIRST:
            await storm.start(leg, CRAWL)
            await storm.until_listed(TARGET, leg, waits=False)
        for leg in QUEUED:
            await storm.start(leg)
            await storm.until_listed(TARGET, leg, waits=True)
        await storm.until_listed(TARGET, FIRST[2], waits=True)  # it is prepared, and asks for the right to transfer
        yield storm
        for leg in FIRST:
            await storm.speed_up(leg)
        await storm.ends()


async def test_8_2_eight_guests_from_three_hosts(cluster: Cluster) -> None:
    async with Watcher(cluster, TARGET) as watcher, storm_of_eight(cluster) as storm:
        waiting = [slot for slot in await slots_of(cluster, TARGET) if slot.waiting]
        assert [slot.position for slot in waiting] == list(range(1, len(waiting) + 1))
        names = {storm.leg_of(slot.migration_id).guest for slot in waiting}
        assert names == {leg.guest for leg in (FIRST[2], *QUEUED)}
        importances = [slot.importance for slot in waiting]
        assert importances == sorted(importances, reverse=True)
    await storm.assert_all_arrived()
    assert watcher.most_by_slots == 2, "the slots that the host itself reports"
    assert watcher.most_by_hypervisor <= 2, "transfers that the sources' hypervisors report"
    assert most_at_once(storm.transfers()) == 2
    assert_fair([leg for leg in storm.granted(watcher) if leg in QUEUED], FIRST)


@pytest.mark.parametrize(("ring", "name"), [(("h1", "h2"), "x"), (("h1", "h2", "h3"), "r")], ids=["crossing", "ring"])
async def test_8_1_guests_that_change_places_do_not_block_each_other(cluster: Cluster, ring: tuple[str, ...], name: str) -> None:
    await set_limits(cluster, incoming=1, outgoing=1, prepared=1)
    pairs = [*itertools.pairwise([*ring, ring[0]])]
    legs = [Leg(f"{name}{number}", source, target) for number, (source, target) in enumerate(pairs * 2, start=1)]
    async with Storm(cluster, cluster.server, legs) as storm, contextlib.AsyncExitStack() as stack:
        watchers = [await stack.enter_async_context(Watcher(cluster, host)) for host in ring]
        await asyncio.gather(*map(storm.start, legs))
        await storm.ends()
    await storm.assert_all_arrived()
    assert [watcher.most_by_slots for watcher in watchers] == [1] * len(ring)
    assert all(most_at_once(storm.transfers(target=host)) == 1 for host in ring)
    assert all(most_at_once(storm.transfers(source=host)) == 1 for host in ring)


async def test_8_2_a_storm_goes_on_without_its_coordinator(cluster: Cluster) -> None:
    """One runs, one is prepared, and the others wait."""
    await set_limits(cluster, incoming=1, outgoing=4, prepared=1)
    legs = [Leg(f"c{number}", source, TARGET) for number, source in enumerate(("h1", "h2", "h1", "h3"), start=1)]
    async with Storm(cluster, cluster.server, legs) as storm:
        await storm.start(legs[0], CRAWL)
        await storm.until_moving(legs[0])
        await asyncio.gather(*map(storm.start, legs[1:]))
        for leg in legs[1:]:
            await storm.until_listed(leg.source, leg)
        await storm.until_slots(TARGET, lambda slots: any(slot.kind == PREPARED and slot.epoch for slot in slots))
        cluster.coordinator.kill()
        try:
            await assert_agents_show(cluster, storm, legs)
            async with Talk(cluster.agents[legs[0].source].address) as talk:
                await storm.speed_up(legs[0], talk)
            await storm.ends_at_agents()
        finally:
            await asyncio.to_thread(cluster.coordinator.start)
        await storm.ends()
    await storm.assert_all_arrived()


async def assert_agents_show(cluster: Cluster, storm: Storm, legs: Sequence[Leg]) -> None:
    """Assert that each source's agent shows its migrations soon, and that `drover migration list` prints them."""
    for source in sorted({leg.source for leg in legs}):
        end = time.monotonic() + 40
        wanted = {storm.id_of(leg): leg.guest for leg in legs if leg.source == source}
        async with Talk(cluster.agents[source].address) as talk:
            found: dict[str, pb.Migration] = {}
            while not wanted.keys() <= found.keys():
                assert time.monotonic() < end, f"{source} shows {sorted(found)} of {wanted}"
                await asyncio.sleep(0.1)  # no watch shows a migration before it is there
                found = {each.migration_id: each for each in (await talk.list()).migrations}
            assert {found[each].domain_name or found[each].spec.domain for each in wanted} == set(wanted.values())
            assert {state(found[each]) for each in wanted} <= {"pending", "active", "succeeded"}
        command = cluster.drover("migration", "list", server=cluster.agents[source].address)
        printed = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=30, check=True)
        assert all(guest in printed.stdout for guest in wanted.values()), printed.stdout


@pytest.mark.parametrize(("dies", "guests"), [("coordinator", ("p1", "p2")), ("h1", ("p3", "p4")), (TARGET, ("p5", "p6"))])
async def test_8_2_what_is_prepared_and_waits_to_transfer_goes_on_whoever_dies(
    cluster: Cluster, dies: str, guests: tuple[str, str]
) -> None:
    await set_limits(cluster, incoming=1, outgoing=4, prepared=1)
    first, prepared = Leg(guests[0], "h2", TARGET), Leg(guests[1], "h1", TARGET)
    async with Storm(cluster, cluster.server, [first, prepared]) as storm:

        def held(slots: Slots) -> bool:
            return any(s.migration_id == storm.id_of(prepared) and not (s.waiting or s.HasField("expire_time")) for s in slots)

        await storm.start(first, CRAWL)
        await storm.until_listed(TARGET, first, waits=False)
        await storm.start(prepared)
        await storm.until_slots(TARGET, held)
        await storm.until_slots("h1", held)
        daemon = cluster.agents.get(dies, cluster.coordinator)
        daemon.kill()
        try:
            if dies == "coordinator":
                await storm.until_slots("h1", lambda slots: not held(slots))  # its silence has ended the attempt
        finally:
            await asyncio.to_thread(daemon.start)
        await storm.speed_up(first)
        await storm.ends()
    ended = storm.ended[storm.id_of(prepared)]
    assert (state(ended), ended.runs_on) == ("succeeded", TARGET), ended.failure.message
    assert cluster.running_on(prepared.guest) == [TARGET]


async def test_8_2_a_coordinator_that_returns_after_the_wait_says_where_the_guest_is(cluster: Cluster) -> None:
    await set_limits(cluster, incoming=1, outgoing=4, prepared=0)
    first, late = Leg("p7", "h1", TARGET), Leg("p8", "h1", TARGET)
    async with Storm(cluster, cluster.server, [first, late]) as storm:
        await storm.start(first, CRAWL)
        await storm.until_moving(first)
        await storm.start(late, wait=25)
        await storm.until_listed("h1", late)
        cluster.coordinator.kill()
        try:
            await assert_agents_show(cluster, storm, [first, late])
            async with Talk(cluster.agents["h1"].address) as talk:
                await storm.speed_up(first, talk)
            await storm.ends_at_agents()
            await asyncio.sleep(25)  # by the coordinator's row it may wait no longer
        finally:
            await asyncio.to_thread(cluster.coordinator.start)
        await storm.ends()
    await storm.assert_all_arrived()


def test_8_2_the_judge_of_order() -> None:
    s4, s5, s6, s7, s8 = QUEUED
    assert_fair([s8, s7, s6, s5, s4], FIRST)
    for wrong in ([s7, s8, s6, s5, s4], [s8, s7, s5, s6, s4], [s8, s7, s6, s4, s5]):
        with pytest.raises(AssertionError):
            assert_fair(wrong, FIRST)
