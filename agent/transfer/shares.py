"""The division of bandwidth among transfers: weighted max-min fair over every link that they share, with minima and maxima. Pure.

A transfer passes lines (of its source and its destination) and caps (of networks); all of them are links with a capacity. Its rate
grows with a common level, ``weight * level``, but is never below its minimum, until one of its links is full or it reaches its
maximum: so no transfer can get more without taking from one that has no more for its weight. A minimum is a floor, not a privilege:
a transfer whose fair share is higher gets no more than the others.

Units: bytes per second. A hypervisor counts in multiples of a `unit`, and the least that it can enforce is one of them: so every
transfer has a minimum of at least one unit, minima are rounded up, maxima and shares down. What the rounding leaves is not divided.
"""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush, heapreplace
from itertools import chain, groupby
from math import inf
from operator import itemgetter
from typing import Final, TypeVar

Key = TypeVar("Key", bound=Hashable)

NO_LIMIT: Final = 0
_EXACT: Final = 1 + 1e-9
"""A number counts as equal to a smaller one within this factor: more than the error of sums of floats."""


@dataclass(frozen=True)
class Flow:
    """One transfer."""

    lines: tuple[str, ...] = ()
    """Names of the lines that it passes."""
    caps: tuple[str, ...] = ()
    """Names of the caps that hold for it."""
    weight: int = 1
    least: int = 0
    """Its guaranteed minimum; 0: none."""
    most: int = 0
    """Its maximum; 0: none."""
    unit: int = 1

    @property
    def links(self) -> tuple[str, ...]:
        return self.lines + self.caps

    @property
    def top(self) -> float:
        """The highest rate that it may be given."""
        return max(self.most - self.most % self.unit, self.unit) if self.most else inf

    @property
    def floor(self) -> int:
        """The lowest rate that it may be given."""
        return int(min(max(1, -(-self.least // self.unit)) * self.unit, self.top))


@dataclass(frozen=True)
class Shortage:
    """A minimum that does not fit on a link beside those of the others."""

    link: str
    capacity: int
    guaranteed: int
    """Sum of the others' minima."""
    wanted: int

    @property
    def left(self) -> int:
        return max(0, self.capacity - self.guaranteed)


def divide(flows: Mapping[Key, Flow], capacities: Mapping[str, int]) -> dict[Key, int]:
    """Return each transfer's limit: a multiple of its unit, never less than its minimum where all minima fit, or `NO_LIMIT` for one
    that has no maximum and no cap and shares no line. A capacity of 0, or none, is unknown and does not bind."""
    known = {link: capacity for link, capacity in capacities.items() if capacity > 0}
    passed = Counter(chain.from_iterable(flow.lines for flow in flows.values()))
    binding = {line for line, transfers in passed.items() if transfers > 1}.union(*(flow.caps for flow in flows.values()))
    binding &= known.keys()
    limits = {}
    for (key, flow), rate in zip(flows.items(), fair(list(flows.values()), known), strict=True):
        free = not flow.most and binding.isdisjoint(flow.lines) and binding.isdisjoint(flow.caps)
        limits[key] = NO_LIMIT if free else int(rate * _EXACT // flow.unit or 1) * flow.unit
    return limits


def shortage(flow: Flow, others: Sequence[Flow], capacities: Mapping[str, int]) -> Shortage | None:
    """Return the first link on which the minimum of a new transfer does not fit beside those of the others; None if it fits."""
    for link in flow.links:
        guaranteed = sum(other.floor for other in others if link in other.links)
        if 0 < capacities.get(link, 0) < guaranteed + flow.floor:
            return Shortage(link, capacities[link], guaranteed, flow.floor)
    return None


def fair(flows: Sequence[Flow], capacities: Mapping[str, float]) -> list[float]:
    """Return the fair rates before they are rounded; infinite where nothing binds. Minima that do not fit on a link are lowered in
    proportion first."""
    number = {link: index for index, link in enumerate(capacities)}
    links = [[number[link] for link in flow.lines + flow.caps if link in number] for flow in flows]
    floors: list[float] = [flow.floor for flow in flows]
    free = _left(links, floors, capacities)
    if min(free, default=0) < 0:
        floors = _filled(links, floors, [0] * len(flows), floors, list(capacities.values()))
        free = _left(links, floors, capacities)
    return _filled(links, [flow.weight for flow in flows], floors, [flow.top for flow in flows], free)


def _left(links: Sequence[Sequence[int]], rates: Sequence[float], capacities: Mapping[str, float]) -> list[float]:
    """Return what rates leave of each link."""
    left = list(capacities.values())
    for passed, rate in zip(links, rates, strict=True):
        for link in passed:
            left[link] -= rate
    return left


def _filled(
    links: Sequence[Sequence[int]], weights: Sequence[float], floors: Sequence[float], tops: Sequence[float], free: list[float]
) -> list[float]:
    """Return the rates ``max(floor, weight * level)`` where each transfer's level is the one at which it reached its top, or one of
    its links was full. `free`: what the floors leave of each link.

    From then on it is what the transfers that do not grow leave of it: a link is full at the level free / slope. That level rises
    when a transfer stops to grow, so a link whose turn comes is looked at again; it falls when one starts to grow.
    """
    slope = [0.0] * len(free)
    members: list[list[int]] = [[] for _ in free]
    for index, passed in enumerate(links):
        for link in passed:
            members[link].append(index)
    rates, growing = [-1.0] * len(links), [False] * len(links)
    ends = [(top / weight, ~index) for index, (top, weight) in enumerate(zip(tops, weights, strict=True)) if top < inf]
    heapify(ends)

    def stop(index: int, rate: float) -> None:
        rates[index] = rate
        if growing[index]:
            weight = weights[index]
            for link in links[index]:
                free[link] -= rate
                slope[link] -= weight

    def rise(until: float) -> None:
        """Let links fill (entry: the link) and transfers reach their tops (entry: ~index), up to that level."""
        while ends and ends[0][0] < until:
            level, link = ends[0]
            if link < 0:
                heappop(ends)
                if rates[~link] < 0:
                    stop(~link, tops[~link])
            elif slope[link] > 0.5 and (now := free[link] / slope[link]) > level * _EXACT:
                heapreplace(ends, (now, link))
            else:
                heappop(ends)
                for index in members[link] if slope[link] > 0.5 else ():
                    if rates[index] < 0:
                        stop(index, max(floors[index], weights[index] * level))

    starts = sorted([(floor / weight, index) for index, (floor, weight) in enumerate(zip(floors, weights, strict=True))])
    for level, group in groupby(starts, key=itemgetter(0)):
        rise(level)
        touched = set[int]()
        for _, index in group:
            if rates[index] < 0:
                growing[index] = True
                floor, weight = floors[index], weights[index]
                touched.update(links[index])
                for link in links[index]:
                    free[link] += floor
                    slope[link] += weight
        for link in touched:
            heappush(ends, (max(level, free[link] / slope[link]), link))
    rise(inf)
    return [rate if rate >= 0 else inf for rate in rates]
