"""agent.transfer.shares: the division of bandwidth, against a reference in exact fractions and the definition of fairness."""

import os
from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import inf
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.transfer.shares import NO_LIMIT, Flow, divide, fair, shortage

MIB = 1 << 20
CASES = int(os.environ.get("DROVER_SHARES_CASES", "1000"))

_LINES = [f"line{number}" for number in range(5)]
_CAPS = [f"cap{number}" for number in range(3)]


def flow(at_random: Random) -> Flow:
    most = rate(at_random)
    least = rate(at_random)
    return Flow(
        lines=tuple(at_random.sample(_LINES, at_random.randrange(4))),
        caps=tuple(at_random.sample(_CAPS, at_random.randrange(3))),
        weight=at_random.choice([1, 2, 4]),
        least=min(least, most) if most else least,
        most=most,
        unit=at_random.choice([1, 1, 10]),
    )


def rate(at_random: Random) -> int:
    return at_random.choice([0, at_random.randint(1, 40), at_random.randint(1, 4000)])


def case(seed: int) -> tuple[list[Flow], dict[str, int]]:
    at_random = Random(seed)
    links = at_random.sample(_LINES + _CAPS, at_random.randrange(9))
    flows = [flow(at_random) for _ in range(at_random.randrange(10))]
    return flows, {link: at_random.randint(1, at_random.choice([100, 10_000])) for link in links}


seeds = given(st.integers(0, 1 << 64))
thousands = settings(max_examples=CASES, deadline=None, derandomize=False, database=None)


def links_of(flow: Flow) -> tuple[str, ...]:
    return flow.lines + flow.caps


def level_of(
    using: Sequence[int], weights: Sequence[Fraction], rates: Mapping[int, Fraction], floors: Sequence[Fraction], free: int
) -> Fraction | None:
    """Return the level at which a link is full, exactly; None: never. `using`: its transfers, `rates`: of those that stopped."""
    growing = [index for index in using if index not in rates]
    if not growing:
        return None
    fixed = sum((rates[index] for index in using if index in rates), Fraction(0))
    for above in sorted(growing, key=lambda index: floors[index] / weights[index], reverse=True):
        # Suppose that those whose floor is reached at `above` or earlier grow: right if the level is at least that.
        start = floors[above] / weights[above]
        grow = [index for index in growing if floors[index] / weights[index] <= start]
        rest = sum((floors[index] for index in growing if index not in grow), Fraction(0))
        level = (free - fixed - rest) / sum(weights[index] for index in grow)
        if level >= start:
            return level
    raise AssertionError("floors do not fit")


def filled(
    all_flows: Sequence[Flow],
    weights: Sequence[Fraction],
    floors: Sequence[Fraction],
    tops: Mapping[int, Fraction],
    capacities: Mapping[str, int],
) -> dict[int, Fraction]:
    """Fill the links level by level, for floors that fit: what a full link or its own top stops stays as it is."""
    using = {link: [index for index, flow in enumerate(all_flows) if link in links_of(flow)] for link in capacities}
    rates: dict[int, Fraction] = {}
    while len(rates) < len(all_flows):
        levels = {link: level_of(using[link], weights, rates, floors, free) for link, free in capacities.items()}
        peaks = {index: top / weights[index] for index, top in tops.items() if index not in rates}
        known = [level for level in levels.values() if level is not None]
        if not known and not peaks:
            break
        level = min([*known, *peaks.values()])
        for index, flow in enumerate(all_flows):
            if index not in rates and (peaks.get(index) == level or any(levels.get(link) == level for link in links_of(flow))):
                rates[index] = max(floors[index], weights[index] * level)
    return rates


def reference(all_flows: Sequence[Flow], capacities: Mapping[str, int]) -> list[float]:
    """Return the fair rates; floors that do not fit are lowered first, to the fair rates of flows that are worth their floors."""
    floors, weights = [Fraction(flow.floor) for flow in all_flows], [Fraction(flow.weight) for flow in all_flows]
    if not fits(all_flows, capacities):
        lowered = filled(all_flows, floors, [Fraction(0)] * len(floors), dict(enumerate(floors)), capacities)
        floors = [lowered[index] for index in range(len(floors))]
    tops = {index: Fraction(flow.top) for index, flow in enumerate(all_flows) if flow.top < inf}
    rates = filled(all_flows, weights, floors, tops, capacities)
    return [float(rates.get(index, inf)) for index in range(len(all_flows))]


def fits(all_flows: Sequence[Flow], capacities: Mapping[str, int]) -> bool:
    return all(sum(f.floor for f in all_flows if link in links_of(f)) <= capacity for link, capacity in capacities.items())


@thousands
@seeds
def test_8_6_shares_are_those_of_the_exact_reference(seed: int) -> None:
    all_flows, capacities = case(seed)
    assert fair(all_flows, capacities) == pytest.approx(reference(all_flows, capacities), rel=1e-9)


@thousands
@seeds
def test_8_6_nobody_gets_more_without_taking_from_one_that_has_no_more(seed: int) -> None:
    all_flows, capacities = case(seed)
    rates = fair(all_flows, capacities)
    used = {link: sum(r for f, r in zip(all_flows, rates, strict=True) if link in links_of(f)) for link in capacities}
    assert all(used[link] <= capacity * (1 + 1e-6) for link, capacity in capacities.items())
    if not fits(all_flows, capacities):
        return
    for flow, rate in zip(all_flows, rates, strict=True):
        assert flow.floor * (1 - 1e-6) <= rate <= flow.top
        full = [link for link in links_of(flow) if link in used and used[link] >= capacities[link] * (1 - 1e-6)]
        stopped = any(
            all(
                other_rate / other.weight <= max(rate / flow.weight, other.floor / other.weight) * (1 + 1e-6)
                for other, other_rate in zip(all_flows, rates, strict=True)
                if link in links_of(other)
            )
            for link in full
        )
        assert stopped or rate == flow.top


@thousands
@seeds
def test_8_6_limits_are_what_a_hypervisor_can_apply(seed: int) -> None:
    all_flows, capacities = case(seed)
    limits = divide(dict(enumerate(all_flows)), capacities)
    users = {line: sum(line in flow.lines for flow in all_flows) for line in _LINES}
    for index, flow in enumerate(all_flows):
        bound = (
            flow.most
            or any(cap in capacities for cap in flow.caps)
            or any(line in capacities and users[line] > 1 for line in flow.lines)
        )
        assert (limits[index] != NO_LIMIT) == bool(bound)
        assert limits[index] % flow.unit == 0
        assert limits[index] <= flow.top
        if bound and fits(all_flows, capacities):
            assert limits[index] >= flow.floor
    if fits(all_flows, capacities):
        for cap in set(capacities) & set(_CAPS):
            assert sum(limits[index] for index, flow in enumerate(all_flows) if cap in flow.caps) <= capacities[cap]


@pytest.mark.parametrize(
    ("all_flows", "limits"),
    [
        ([Flow(("l",), unit=MIB)], [NO_LIMIT]),
        ([Flow(("l",), unit=MIB), Flow(("l",), unit=MIB)], [23, 23]),
        ([Flow(("l",), unit=MIB, least=25_000_000, most=37_500_000), Flow(("l",), unit=MIB), Flow(("l",), unit=MIB)], [24, 11, 11]),
        ([Flow(("l",), unit=MIB, weight=4), Flow(("l",), unit=MIB, weight=1)], [38, 9]),
        ([Flow(caps=("c",), unit=MIB), Flow(caps=("c",), unit=MIB, most=3 * MIB + 5)], [16, 3]),
        ([Flow(("unknown",), unit=MIB), Flow(("unknown",), unit=MIB)], [NO_LIMIT, NO_LIMIT]),
        ([Flow(("l",), unit=MIB, least=40 * MIB), Flow(("l",), unit=MIB, least=20 * MIB)], [31, 15]),
    ],
)
def test_8_6_limits_by_example(all_flows: list[Flow], limits: list[int]) -> None:
    divided = divide(dict(enumerate(all_flows)), {"l": 50_000_000, "c": 20_000_000, "unknown": 0})
    assert list(divided.values()) == [limit * MIB for limit in limits]


def test_8_6_a_minimum_that_does_not_fit_is_named_with_what_is_left() -> None:
    others = [Flow(("l",), ("c",), least=300, unit=100), Flow(("other",), ("c",), least=400, unit=100)]
    assert shortage(Flow(("l",), ("c",), least=300, unit=100), others, {"l": 600, "c": 1000}) is None
    found = shortage(Flow(("l",), ("c",), least=301, unit=100), others, {"l": 0, "c": 1000})
    assert found is not None
    assert (found.link, found.capacity, found.guaranteed, found.wanted, found.left) == ("c", 1000, 700, 400, 300)
    assert shortage(Flow(("l",), least=301, unit=100), others, {"l": 600}) is not None  # the line is full by one unit


@pytest.mark.parametrize("most", [2**63 - 1, 2**62, 2**53 * 1024 + 1, 10**12 + 1, 10**12, 10**12 - 1])
@pytest.mark.parametrize("unit", [1, MIB])
def test_8_6_a_share_is_never_above_the_maximum_nor_above_every_rate(most: int, unit: int) -> None:
    """A share above int64 would stop the sharing of a coordinator for every migration."""
    flows = {"most": Flow(most=most, unit=unit), "least": Flow(caps=("c",), least=most, unit=unit)}
    shares = divide(flows, {"c": most})
    top = min(most, 10**12)
    assert shares == {"most": top - top % unit, "least": top - top % unit}


def test_8_6_the_division_is_exact_for_big_numbers() -> None:
    flows = {name: Flow(lines=("line",)) for name in "abc"}
    assert divide(flows, {"line": 3 * 10**11 + 2}) == dict.fromkeys("abc", 10**11)
    assert divide(flows, {"line": 3 * 10**11 - 1}) == dict.fromkeys("abc", 10**11 - 1)
