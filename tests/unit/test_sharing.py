"""agent.migration.sharing: shares are divided again at every change, lowered before others are raised, and minima are held."""

import asyncio
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from agent.handshake.drive.ends import Directory
from agent.handshake.drive.plan import Limits
from agent.handshake.machines.source import SourceState
from agent.migration.collection import Collection
from agent.migration.migration import Entry
from agent.migration.sharing import PATIENCE, Sharing
from agent.runtime.bell import Bell
from agent.runtime.errors import DroverError, Reason
from agent.runtime.events import Bus
from drover.agent.v1 import host_pb2, options_pb2
from drover.agent.v1 import migration_pb2 as pb
from tests.unit.asking import ID, fails
from tests.unit.fake_directory import Driving, FakeLog
from tests.unit.test_migrations import SPEC

MIB = 1 << 20
FEATURES = options_pb2.MigrationFeatures(bandwidth=True, bandwidth_unit=MIB)
LINE = 100_000_000
"""Bytes per second; 89 MiB/s of it carry data."""


class Clock:
    """A clock that stands still until it is set."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(0)


class Known:
    """The part of a directory that tells what is known."""

    def __init__(self, **rules: int) -> None:
        self.changed = Bell()
        self.rules = rules
        self.line = LINE
        self.features = FEATURES
        self.others: list[pb.Migration] = []

    def foreign(self) -> list[pb.Migration]:
        return self.others

    def known(self, host: str) -> host_pb2.Host | None:
        rules = host_pb2.NetworkRules(cap_bytes_per_second=self.rules.get("cap", 0))
        network = host_pb2.Network(name="mig1", address="10.92.0.1", interface="eth1", line_bytes_per_second=self.line, rules=rules)
        interface = host_pb2.Interface(name="eth1", addresses=["10.92.0.1/24"])
        return host_pb2.Host(name=host, networks=[network], migration_features=self.features, interfaces=[interface])


@dataclass
class Calls:
    transfer_asked: bool = False


@dataclass
class View:
    source_state: SourceState | None = SourceState.BEGUN


@dataclass
class Driver:
    calls: Calls = field(default_factory=Calls)
    view: View = field(default_factory=View)


@dataclass
class Tuner:
    entry: Entry
    flows: bool = False

    @property
    def due(self) -> Limits | None:
        wanted = self.entry.migration.allotted_bytes_per_second
        return Limits(wanted) if self.flows and self.entry.migration.applied_bandwidth_bytes_per_second != wanted else None


class Shop:
    """A collection with its sharing. Sources apply shares when told (`apply`), or at once."""

    def __init__(self, **rules: int) -> None:
        self.collection = Collection("co", Bus())
        self.known = Known(**rules)
        self.clock = Clock()
        self.sharing = Sharing(self.collection, cast(Directory, self.known), self.clock)
        self.silent: set[str] = set()
        self.log: list[dict[str, float]] = []

    def add(self, name: str, source: str = "h1", to: str = "h2", **settings: Any) -> Entry:
        migration = pb.Migration(
            migration_id=name, source_host=source, destination_host=to, network="mig1", state=pb.MIGRATION_STATE_ACTIVE
        )
        migration.settings.CopyFrom(pb.MigrationSettings(**settings))
        entry = Entry(migration, FakeLog())
        entry.driver, entry.tuner = cast(Any, Driver()), cast(Any, Tuner(entry))
        self.collection.publish(entry, migration)
        return entry

    async def start(self, *entries: Entry) -> None:
        for entry in entries:
            limits = await self.sharing.start(entry)
            cast(Any, entry.driver).calls.transfer_asked = True
            cast(Any, entry.driver).view.source_state = SourceState.PERFORMING
            cast(Any, entry.tuner).flows = True
            self.applied(entry, limits.bandwidth)

    def applied(self, entry: Entry, bandwidth: int) -> None:
        self.collection.publish(entry, entry.changed_to(applied_bandwidth_bytes_per_second=bandwidth))

    def work(self) -> None:
        """Let each source that answers apply its share, and divide again, until nothing changes."""
        for _ in range(10):
            for entry in self.collection.all():
                applied, allotted = entry.migration.applied_bandwidth_bytes_per_second, entry.migration.allotted_bytes_per_second
                if applied != allotted and entry.migration.migration_id not in self.silent:
                    self.applied(entry, allotted)
            self.note()
            self.sharing.divide()
        self.note()

    def note(self) -> None:
        active = [entry.migration for entry in self.collection.all() if not entry.final]
        self.log.append({m.migration_id: m.applied_bandwidth_bytes_per_second / MIB for m in active})

    def end(self, entry: Entry) -> None:
        cast(Any, entry.tuner).flows = False
        self.collection.publish(entry, entry.changed_to(state=pb.MIGRATION_STATE_SUCCEEDED))

    def shares(self) -> dict[str, float]:
        """In MiB/s."""
        active = [entry.migration for entry in self.collection.all() if not entry.final]
        return {m.migration_id: m.allotted_bytes_per_second / MIB for m in active}


@pytest.fixture(name="shop")
def _shop() -> Shop:
    return Shop()


async def test_8_6_one_transfer_has_no_limit_and_two_halve_the_line(shop: Shop) -> None:
    first, second = shop.add("a"), shop.add("b", "h1", "h3")
    await shop.start(first)
    assert shop.shares() == {"a": 0, "b": 0}
    starting = asyncio.create_task(shop.sharing.start(second))
    await asyncio.sleep(0)
    assert shop.shares() == {"a": 44, "b": 0}, "the other one is lowered, and the new one has no share before it is"
    shop.work()
    assert (await starting).bandwidth == 44 * MIB
    assert shop.shares() == {"a": 44, "b": 44}
    shop.end(second)
    shop.work()
    assert shop.shares() == {"a": 0}


async def test_8_6_the_sum_of_what_is_applied_never_exceeds_a_cap() -> None:
    shop = Shop(cap=50 * MIB)
    entries = [shop.add(str(number), f"h{number}", f"h{number + 10}") for number in range(5)]
    for entry in entries:
        starting = asyncio.create_task(shop.start(entry))
        while not starting.done():
            await asyncio.sleep(0)
            shop.work()
    for entry in entries[:3]:
        shop.end(entry)
        shop.work()
    assert shop.shares() == {"3": 25, "4": 25}
    sums = [sum(applied.values()) for applied in shop.log]
    assert max(sums) == 50


async def test_8_6_a_source_that_does_not_answer_holds_up_nobody_for_long() -> None:
    shop = Shop(cap=50 * MIB)
    slow, new = shop.add("slow", "h1", "h2"), shop.add("new", "h3", "h4")
    await shop.start(slow)
    shop.silent.add("slow")
    starting = asyncio.create_task(shop.sharing.start(new))
    await asyncio.sleep(0)
    assert shop.shares() == {"slow": 25, "new": 0}
    shop.work()
    assert not starting.done()
    shop.clock.now += PATIENCE
    shop.work()
    assert (await starting).bandwidth == MIB, "the silent one may still use all but the least of the cap"
    shop.silent.clear()
    shop.work()
    assert shop.shares() == {"slow": 25, "new": 25}


async def test_8_6_one_on_other_links_is_not_held_up(shop: Shop) -> None:
    first, second = shop.add("a"), shop.add("b")
    await shop.start(first)
    shop.silent.add("a")
    waits = asyncio.create_task(shop.sharing.start(second))
    await asyncio.sleep(0)
    elsewhere = shop.add("c", "h7", "h8")
    assert (await asyncio.wait_for(shop.sharing.start(elsewhere), 0.5)).none
    assert not waits.done()
    waits.cancel()


async def test_8_6_settings_line_and_weights_count_at_once(shop: Shop) -> None:
    low, high = shop.add("low", importance=pb.IMPORTANCE_LOW), shop.add("high", importance=pb.IMPORTANCE_HIGH)
    for entry in (low, high):
        starting = asyncio.create_task(shop.start(entry))
        while not starting.done():
            await asyncio.sleep(0)
            shop.work()
    assert shop.shares() == {"low": 17, "high": 71}
    changed = high.changed_to()
    changed.settings.bandwidth_bytes_per_second = 10 * MIB
    shop.collection.publish(high, changed)
    shop.work()
    assert shop.shares() == {"low": 79, "high": 10}
    shop.known.line = LINE // 10
    shop.work()
    assert shop.shares() == {"low": 1, "high": 7}


async def test_8_6_after_a_restart_what_runs_is_divided_again() -> None:
    shop = Shop(cap=50 * MIB)
    for name, applied in (("a", 40 * MIB), ("b", 10 * MIB)):
        entry = shop.add(name)
        cast(Any, entry.tuner).flows = True
        shop.applied(entry, applied)
    shop.note()
    shop.work()
    assert shop.shares() == {"a": 25, "b": 25}
    assert max(sum(applied.values()) for applied in shop.log) == 50


async def test_8_6_a_silent_source_without_a_limit_does_not_take_the_share_of_a_new_transfer(shop: Shop) -> None:
    first, second = shop.add("a"), shop.add("b")
    await shop.start(first)
    shop.silent.add("a")
    starting = asyncio.create_task(shop.sharing.start(second))
    await asyncio.sleep(0)
    shop.clock.now += PATIENCE
    shop.work()
    assert (await starting).bandwidth == 44 * MIB


async def test_8_6_a_transfer_starts_with_its_share_at_the_latest_after_a_second(shop: Shop) -> None:
    first, second, third = (shop.add(name) for name in "abc")
    await shop.start(first)
    shop.silent.add("a")
    starting = asyncio.create_task(shop.sharing.start(second))
    await asyncio.sleep(0)
    shop.clock.now += PATIENCE / 2
    shop.applied(first, 44 * MIB)
    later = asyncio.create_task(shop.sharing.start(third))
    await asyncio.sleep(0)
    shop.clock.now += PATIENCE / 2
    shop.work()
    assert (await starting).bandwidth in (29 * MIB, 44 * MIB)
    later.cancel()


async def test_8_6_transfers_of_another_driver_keep_what_they_have(shop: Shop) -> None:
    other = pb.Migration(migration_id="other", source_host="h1", destination_host="h9", applied_bandwidth_bytes_per_second=30 * MIB)
    other.network_choice.destination_address = "10.92.0.9"
    shop.known.others = [other]
    first = shop.add("a")
    await shop.start(first)
    assert shop.shares() == {"a": 59}
    other.applied_bandwidth_bytes_per_second = 0
    shop.work()
    assert shop.shares() == {"a": 44}, "one without a limit takes a fair share"


async def test_8_6_a_minimum_is_held_from_the_admission_to_the_end_of_the_transfer(shop: Shop) -> None:
    first, second = (shop.add(name, min_bandwidth_bytes_per_second=50 * MIB) for name in ("a", "b"))
    shop.sharing.admit(first)
    shop.sharing.admit(first)
    with pytest.raises(DroverError) as refused:
        shop.sharing.admit(second)
    assert refused.value.reason is Reason.BANDWIDTH_INSUFFICIENT
    assert refused.value.metadata["link"] == "the line out of h1 (eth1)"
    assert (refused.value.metadata["guaranteed"], refused.value.metadata["left"]) == (str(50 * MIB), str(94_000_000 - 50 * MIB))
    shop.sharing.dismiss(first)
    shop.sharing.admit(second)
    shop.sharing.dismiss(second)
    shop.sharing.admit(first)
    await shop.start(first)
    assert cast(Any, first.driver).view.source_state is SourceState.PERFORMING
    with pytest.raises(DroverError):
        shop.sharing.admit(second)
    shop.end(first)
    shop.sharing.admit(second)


async def test_8_6_settings_that_do_not_fit_are_refused(shop: Shop) -> None:
    first, second = shop.add("a", min_bandwidth_bytes_per_second=50 * MIB), shop.add("b")
    shop.sharing.admit(first)
    shop.sharing.admit(second)
    changed = second.changed_to()
    changed.settings.min_bandwidth_bytes_per_second = 30 * MIB
    shop.sharing.check(changed)
    changed.settings.min_bandwidth_bytes_per_second = 40 * MIB
    with pytest.raises(DroverError, match="are guaranteed to others"):
        shop.sharing.check(changed)


async def test_8_6_a_minimum_above_the_maximum_of_the_network_is_refused(shop: Shop) -> None:
    """Nor is it guaranteed to a migration that runs there already."""
    entry = shop.add("a")
    changed = entry.changed_to()
    changed.network_choice.rules.max_bytes_per_second = 40 * MIB
    changed.settings.min_bandwidth_bytes_per_second = 50 * MIB
    with pytest.raises(DroverError, match="on network mig1 for each migration") as refusal:
        shop.sharing.check(changed)
    assert refusal.value.reason is Reason.BANDWIDTH_INSUFFICIENT
    changed.settings.min_bandwidth_bytes_per_second = 40 * MIB
    shop.sharing.check(changed)


async def test_8_6_a_change_that_raises_no_minimum_is_not_refused_as_a_cap_was_lowered(shop: Shop) -> None:
    entry = shop.add("a", min_bandwidth_bytes_per_second=50 * MIB)
    changed = entry.changed_to()
    changed.network_choice.rules.cap_bytes_per_second = 20 * MIB
    for least in (50 * MIB, 30 * MIB):
        changed.settings.min_bandwidth_bytes_per_second = least
        shop.sharing.check(changed, before=50 * MIB)
    changed.settings.min_bandwidth_bytes_per_second = 51 * MIB
    with pytest.raises(DroverError, match="its guaranteed minimum"):
        shop.sharing.check(changed, before=50 * MIB)


async def test_8_6_a_source_that_cannot_limit_rates_gets_no_share_and_no_capped_network(shop: Shop) -> None:
    shop.known.features = options_pb2.MigrationFeatures()
    first, second = shop.add("a"), shop.add("b")
    shop.sharing.admit(first)
    await shop.start(first, second)
    assert shop.shares() == {"a": 0, "b": 0}
    shop.known.rules = {"cap": 20 * MIB}
    with pytest.raises(DroverError) as refused:
        shop.sharing.admit(shop.add("c"))
    assert refused.value.reason is Reason.BANDWIDTH_UNSUPPORTED


async def test_8_6_shares_are_divided_in_the_background() -> None:
    shop = Shop(cap=50 * MIB)
    entry = shop.add("a")
    work = asyncio.create_task(shop.sharing.run())
    await shop.start(entry)
    assert shop.shares() == {"a": 50}
    shop.known.rules = {"cap": 20 * MIB}
    shop.known.changed.ring()
    async with asyncio.timeout(5):
        while shop.shares() != {"a": 20}:
            await shop.collection.changed.next.wait()
    changed = entry.changed_to()
    changed.settings.bandwidth_bytes_per_second = 5 * MIB
    shop.collection.publish(entry, changed)
    async with asyncio.timeout(5):
        while shop.shares() != {"a": 5}:
            await shop.collection.changed.next.wait()
    work.cancel()


# --- through a process that drives ------------------------------------------------------------------------------------


def with_a_line(driving: Driving) -> None:
    """Give the source a line of 50 MB/s, of which another driver's transfer is guaranteed 30 MiB/s."""
    network = host_pb2.Network(name="mig", address="10.92.0.1", interface="eth1", line_bytes_per_second=50_000_000)
    driving.directory.hosts["h1"] = host_pb2.Host(name="h1", networks=[network], migration_features=FEATURES)
    other = pb.Migration(migration_id="other", source_host="h1", network="mig")
    other.settings.min_bandwidth_bytes_per_second = 30 * MIB
    driving.directory.others = [other]


async def test_8_6_a_minimum_that_does_not_fit_is_refused_and_nothing_is_left(driving: Driving) -> None:
    with_a_line(driving)
    spec = pb.MigrationSpec(min_bandwidth_bytes_per_second=20 * MIB)
    spec.MergeFrom(SPEC)
    error = await fails(driving.migrations.start(ID, spec), Reason.BANDWIDTH_INSUFFICIENT)
    assert error.metadata["link"] == "the line out of h1 (eth1)"
    assert driving.migrations.collection.find(ID) is None
    assert driving.log.rows == {}
    assert driving.pair.source.engine.active() == driving.pair.destination.engine.active() == []


async def test_8_6_a_minimum_that_does_not_fit_now_is_waited_for(driving: Driving) -> None:
    with_a_line(driving)
    spec = pb.MigrationSpec(min_bandwidth_bytes_per_second=20 * MIB)
    spec.MergeFrom(SPEC)
    await driving.migrations.start(ID, spec, slot_wait=60)
    async with asyncio.timeout(5):
        while (waiting := driving.migrations.collection.get(ID).migration).wait_reason != pb.WAIT_REASON_BANDWIDTH:
            await driving.migrations.collection.changed.next.wait()
    assert "30 MiB/s of 44.8 MiB/s are guaranteed to others" in waiting.waiting_for
    assert driving.pair.source.engine.active() == driving.pair.destination.engine.active() == []
    driving.directory.others = []
    assert (await driving.ended(ID)).state == pb.MIGRATION_STATE_SUCCEEDED


async def test_8_6_a_minimum_that_never_fits_is_not_waited_for(driving: Driving) -> None:
    with_a_line(driving)
    driving.directory.others = []
    spec = pb.MigrationSpec(min_bandwidth_bytes_per_second=60 * MIB)
    spec.MergeFrom(SPEC)
    await driving.migrations.start(ID, spec, slot_wait=60)
    ended = await driving.ended(ID)
    assert (ended.state, ended.failure.reason) == (pb.MIGRATION_STATE_FAILED, "BANDWIDTH_INSUFFICIENT")
