"""Issue 8, points 1 and 2: forty guests of four sources at one destination, on simulated hosts."""

import asyncio
import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from tests.bench.stats import most_at_once
from tests.kit.cluster import Cluster, GuestSpec, cluster
from tests.scenarios.conversation import CRAWL, MIB, Talk, state
from tests.scenarios.storming import HIGH, LOW, MEDIUM, Leg, Storm, Watcher, set_limits, slots_of

pytestmark = pytest.mark.timeout(180)

TARGET = "h5"
LIMIT = 2
KILLS = (4, 12, 20)
"""The destination's agent is killed when so many have arrived."""


def legs_of(prefix: str) -> list[Leg]:
    """Two that hold the slots until the others are queued, and forty: each source has ten, of all importances."""
    importances = itertools.cycle((LOW, MEDIUM, HIGH))
    first = [Leg(f"{prefix}-first{number}", f"h{number}", TARGET, HIGH) for number in (1, 2)]
    return first + [Leg(f"{prefix}{number}", f"h{number % 4 + 1}", TARGET, next(importances)) for number in range(40)]


@pytest.fixture(scope="module", name="made")
def _made() -> Iterator[Cluster]:
    specs = [GuestSpec(leg.guest, memory_mib=8, dirty=5) for prefix in ("calm", "dies") for leg in legs_of(prefix)]
    settings = {
        "agent": {
            "incoming_limit": LIMIT,
            "outgoing_limit": 4,
            "lease_seconds": 8,
            "takeover_after_seconds": 6,
            "log_level": "debug",
        },
        "sim": {"link_rate": 64 * MIB, "incoming_link_rate": 64 * MIB},
    }
    with cluster("sim", specs, hosts=5, lab_id="bigstorm", settings=settings) as made:
        yield made


async def queued(storm: Storm, made: Cluster, legs: Sequence[Leg]) -> list[Leg]:
    """Start all: the first two hold the slots. Return the others, the oldest first, once each has its place, and none more."""
    await set_limits(made, incoming=LIMIT, outgoing=4, prepared=0)
    first, others = legs[:2], list(legs[2:])
    for leg in first:
        await storm.start(leg, CRAWL)
        await storm.until_listed(TARGET, leg, waits=False)
    await asyncio.gather(*(storm.start(leg, 0) for leg in random.sample(others, len(others))))
    ids = {storm.id_of(leg) for leg in others}
    await storm.until_slots(TARGET, lambda slots: ids <= {slot.migration_id for slot in slots if slot.waiting})
    ages = {slot.migration_id: slot.age.ToNanoseconds() for slot in await slots_of(made, TARGET) if slot.waiting}
    await set_limits(made, incoming=LIMIT, outgoing=4, prepared=1)
    return sorted(others, key=lambda leg: -ages[storm.id_of(leg)])


def fair_order(ages: Sequence[Leg], granted: Sequence[Leg]) -> list[Leg]:
    """Return the order in which a queue is to be served: by importance, then the source that was served the longest ago, then by
    age. `granted`: served before."""
    left, served = list(ages), {leg.source: number for number, leg in enumerate(granted, start=1)}
    order: list[Leg] = []
    while left:
        leg = min(left, key=lambda leg: (-leg.importance, served.get(leg.source, 0)))  # the first one is the oldest
        left.remove(leg)
        order.append(leg)
        served[leg.source] = 1000 + len(order)
    return order


def changes_of_slots(made: Cluster) -> list[dict[str, Any]]:
    """Return each change of an incoming slot of the destination, by its events."""
    lines = made.agents[TARGET].lines()
    return [line for line in lines if line.get("event") == "slot" and line["direction"] == "incoming"]


def granted_of(storm: Storm, changes: Sequence[dict[str, Any]]) -> list[Leg]:
    """Return the legs in the order of the first grant of each."""
    ids = {storm.id_of(leg): leg for leg in storm.legs[2:]}
    taken = [line["migration"] for line in changes if line["change"] == "taken"]
    return [ids[each] for each in dict.fromkeys(taken) if each in ids]


async def until_arrived(made: Cluster, legs: Sequence[Leg], number: int) -> None:
    """Wait until so many have succeeded, and another one transfers."""
    names = {leg.guest for leg in legs}
    async with Talk(made.server) as talk, asyncio.timeout(60):
        while True:
            found = [each for each in (await talk.list()).migrations if each.spec.domain in names]
            moving = any(each.phase in ("perform", "finish") for each in found)
            if moving and sum(state(each) == "succeeded" for each in found) >= number:
                return
            await asyncio.sleep(0.1)  # what fails meanwhile is no reason to stop


async def assert_nothing_left(storm: Storm, made: Cluster) -> None:
    """Assert that no host has a slot or a place left."""
    for host in made.hosts:
        await storm.until_slots(host, lambda slots: not slots)


async def test_8_2_forty_guests_arrive_in_order_two_at_a_time(made: Cluster) -> None:
    legs = legs_of("calm")
    async with Storm(made, made.server, legs) as storm, Watcher(made, TARGET) as watcher:
        ages = await queued(storm, made, legs)
        for leg in legs[:2]:
            await storm.speed_up(leg)
        await storm.ends()
        await storm.assert_all_arrived()
    assert watcher.most_by_slots == LIMIT
    changes = changes_of_slots(made)
    assert max(change["in_use"] for change in changes) == LIMIT
    assert most_at_once(storm.transfers()) == LIMIT
    order = granted_of(storm, changes)
    assert [leg.guest for leg in order] == [leg.guest for leg in fair_order(ages, legs[:2])]


async def test_8_2_forty_guests_while_the_destination_dies_three_times(made: Cluster) -> None:
    """A simulated agent takes the transfers that are under way with it: those guests stay where they are, and go once more."""
    legs = legs_of("dies")
    async with Storm(made, made.server, legs) as storm, Watcher(made, TARGET) as watcher:
        ages = await queued(storm, made, legs)
        for leg in legs[:2]:
            await storm.speed_up(leg)
        for arrived in KILLS:
            await until_arrived(made, legs, arrived)
            made.agents[TARGET].kill()
            await asyncio.to_thread(made.agents[TARGET].start)
        await storm.ends()
        lost = [leg for leg in legs if state(storm.ended[storm.id_of(leg)]) != "succeeded"]
        assert len(lost) <= LIMIT * len(KILLS), [storm.ended[storm.id_of(leg)].failure.message for leg in lost]
        for leg in legs:
            assert made.copies(leg.guest) == {leg.source if leg in lost else TARGET: "running"}
        await assert_nothing_left(storm, made)
    assert watcher.most_by_slots <= LIMIT
    changes = changes_of_slots(made)
    assert max(change["in_use"] for change in changes) == LIMIT
    order = granted_of(storm, changes)
    assert len(order) == len(legs) - 2
    assert [leg.importance for leg in order] == sorted((leg.importance for leg in order), reverse=True), str(order)
    for source, importance in itertools.product({leg.source for leg in order}, (LOW, MEDIUM, HIGH)):
        alike = [leg for leg in order if (leg.source, leg.importance) == (source, importance)]
        assert alike == [leg for leg in ages if leg in alike], "a place was lost"
    async with Talk(made.server) as talk:
        again = await asyncio.gather(*(talk.migrate(leg.guest, TARGET) for leg in lost[:LIMIT]))
    assert all(state(each) == "succeeded" for each in again)
