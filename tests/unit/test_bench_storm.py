"""tests.bench.storm: the rules of the peers, and the judgement of a storm."""

import asyncio
from collections import Counter

import pytest

from drover.agent.v1 import migration_pb2 as pb
from tests.bench.stats import most_at_once
from tests.bench.storm import Outcome, Result, Setting
from tests.bench.storm_report import verdicts
from tests.bench.storm_rules import Order, Rule, rules, start_by_rule

SETTING = Setting(guests=12, sources=4, limit=2, seconds=10.0, link_mib=64, dirty_share=0.01, retry=0.01)


async def peaks(rule: Rule) -> Counter[str]:
    """Run a storm of migrations that take no time but turns of the loop; return the most that ran at once, by source and in all."""
    now: Counter[str] = Counter()
    most: Counter[str] = Counter()

    async def move(order: Order) -> None:
        for key in (order.source, "all"):
            now[key] += 1
            most[key] = max(most[key], now[key])
        await asyncio.sleep(0.002)
        now.subtract((order.source, "all"))

    await start_by_rule(rule, SETTING.orders, move)
    return most


@pytest.mark.parametrize(("rule", "of_source", "in_all"), [*zip(rules(0.01), (2, 1, 2, 3), (5, 4, 2, 12), strict=True)])
async def test_8_2_the_rules_of_the_peers(rule: Rule, of_source: int, in_all: int) -> None:
    most = await peaks(rule)
    assert most["all"] == in_all
    assert max(most[f"h{number}"] for number in range(1, 5)) <= of_source


def test_8_2_the_guests_of_a_storm_fill_the_link_for_its_time() -> None:
    assert SETTING.bound == pytest.approx(10.0, rel=0.02)
    assert Counter((order.source, order.importance) for order in SETTING.orders).most_common(1)[0][1] == 1


def test_8_2_transfers_at_once() -> None:
    assert most_at_once([(0, 2), (1, 3), (2, 4), (10, 11)]) == 2


def storm(rule: str, makespan: float, blackout: float) -> Outcome:
    waits = {"high": [1.0], "medium": [2.0], "low": [3.0]}
    return Outcome(rule, makespan, waits, [blackout], most_at_once=2)


def test_8_2_the_bars_of_a_storm() -> None:
    good = Result(SETTING, [storm("drover", SETTING.bound * 1.04, 40), storm("Nova", SETTING.bound * 1.05, 35)])
    assert [line.split("  ")[0] for line in verdicts(good)] == ["met"] * 5
    slow = Result(SETTING, [storm("drover", SETTING.bound * 1.06, 50), storm("Nova", SETTING.bound * 1.05, 35)])
    assert [line.startswith("NOT MET") for line in verdicts(slow)] == [True, False, False, True, True]
    assert max(order.importance for order in SETTING.orders) == pb.IMPORTANCE_HIGH
