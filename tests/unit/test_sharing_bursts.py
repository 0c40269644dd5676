"""The sharing of bandwidth where one migration cannot take part, and where many start at once (agent.migration.sharing)."""

import asyncio

import pytest
from structlog.testing import capture_logs

from agent.migration.flows import HostOf, flow_of
from agent.migration.migration import Entry
from agent.migration.sharing import PATIENCE
from agent.transfer.shares import Flow
from drover.agent.v1 import migration_pb2 as pb
from tests.unit.fake_directory import FakeLog
from tests.unit.test_sharing import LINE, MIB, Shop


@pytest.fixture(name="shop")
def _shop() -> Shop:
    return Shop()


@pytest.mark.parametrize("huge", [2**63 - 1, 2**62])
async def test_8_6_a_huge_limit_stops_the_shares_of_nobody(huge: int) -> None:
    shop = Shop(cap=huge)
    first = shop.add("a", bandwidth_bytes_per_second=huge, min_bandwidth_bytes_per_second=huge)
    entries = [first, shop.add("b", "h7", "h8", bandwidth_bytes_per_second=huge), shop.add("c", "h1", "h3")]
    for entry in entries:
        starting = asyncio.create_task(shop.start(entry))
        while not starting.done():
            await asyncio.sleep(0)
            shop.work()
    shares = shop.shares()
    assert shares["a"] + shares["c"] <= 90, "they share a line; a unit each is the least"
    assert 0 < shares["b"] <= 10**12 / MIB


async def test_8_6_what_raises_for_one_migration_leaves_the_others_their_shares(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(migration: pb.Migration, host: HostOf) -> tuple[Flow, dict[str, int]]:
        if migration.migration_id == "bad":
            raise ValueError("Value out of range")
        return flow_of(migration, host)

    monkeypatch.setattr("agent.migration.sharing.flow_of", raising)
    bad, first, second = (shop.add(name, bandwidth_bytes_per_second=limit) for name, limit in (("bad", 9), ("a", 0), ("b", 0)))
    with capture_logs() as logs:
        starting = asyncio.create_task(shop.sharing.start(bad))
        await asyncio.sleep(0)
        await shop.start(first)
        second_starting = asyncio.create_task(shop.start(second))
        while not second_starting.done():
            await asyncio.sleep(0)
            shop.work()
    assert shop.shares() == {"bad": 0, "a": 44, "b": 44}
    assert [(line["log_level"], line["migration"]) for line in logs] == [("error", "bad")]
    shop.clock.now += PATIENCE
    shop.work()
    assert (await starting).bandwidth == 9, "its own limit"


async def test_8_6_those_that_start_in_a_burst_share_one_division(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    divisions = []
    real = shop.sharing.divide

    def divide() -> None:
        divisions.append(shop.clock.now)
        real()
        shop.clock.now += 0.001  # what it takes

    monkeypatch.setattr(shop.sharing, "divide", divide)
    entries = [shop.add(str(number), f"h{number}", f"h{number + 100}") for number in range(50)]
    await asyncio.gather(*(shop.sharing.start(entry) for entry in entries))
    assert len(divisions) == 2, "the first one's, and after a pause one for the others"


async def test_8_6_what_a_migration_shares_is_found_anew_only_if_it_or_a_host_has_changed(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []

    def counted(migration: pb.Migration, host: HostOf) -> tuple[Flow, dict[str, int]]:
        found.append(migration.migration_id)
        return flow_of(migration, host)

    monkeypatch.setattr("agent.migration.sharing.flow_of", counted)
    first, second = shop.add("a"), shop.add("b", "h7", "h8")
    await shop.start(first, second)
    shop.work()
    found.clear()
    shop.sharing.divide()
    assert found == []
    shop.applied(second, 0)
    shop.sharing.divide()
    assert found == ["b"]
    shop.known.line = LINE // 2
    shop.sharing.divide()
    assert found == ["b", "a", "b"]


async def test_8_6_a_rate_that_an_older_version_has_accepted_is_lowered() -> None:
    spec = pb.MigrationSpec(bandwidth_bytes_per_second=2**63 - 1)
    settings = pb.MigrationSettings(bandwidth_bytes_per_second=2**63 - 1, min_bandwidth_bytes_per_second=2**62)
    migration = Entry(pb.Migration(spec=spec, settings=settings), FakeLog(), recovered=True).migration
    rates = migration.settings.bandwidth_bytes_per_second, migration.settings.min_bandwidth_bytes_per_second
    assert (migration.spec.bandwidth_bytes_per_second, *rates) == (10**12, 10**12, 10**12)
