"""The division of bandwidth among transfers: weighted max-min fair over every link that they share, with minima and maxima. Pure.

A transfer passes lines (of its source and its destination) and caps (of networks); all of them are links with a capacity. Its rate
grows with a common level, ``weight * level``, but is never below its minimum, until one of its links is full or it reaches its
maximum: so no transfer can get more without taking from one that has no more for its weight. A minimum is a floor, not a privilege:
a transfer whose fair share is higher gets no more than the others.

Units: bytes per second. A hypervisor counts in multiples of a `unit`, and the least that it can enforce is one of them: so every
transfer has a minimum of at least one unit, minima are rounded up, maxima and shares down. What the rounding leaves is not divided.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush, heapreplace
from itertools import chain
from math import inf
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
    full = list(capacities.values())
    floors: list[float] = [flow.floor for flow in flows]
    tops = [flow.top for flow in flows]
    filling = _Filling(links, floors, full)
    if min(filling.free, default=0) < 0:
        floors = _Filling(links, [0] * len(flows), full).rates(floors, floors)
        filling = _Filling(links, floors, full)
    return filling.rates([flow.weight for flow in flows], tops)


class _Filling:
    """The links while the common level rises: each transfer's rate is ``max(floor, weight * level)``, until it has reached its top
    or one of its links is full.

    A link is full at the level free / slope, where `free` is what the transfers that do not grow leave of it. That level rises when
    a transfer stops to grow, so a link whose turn comes is looked at again; it falls when one starts to grow.
    """

    def __init__(self, links: Sequence[Sequence[int]], floors: Sequence[float], capacities: Iterable[float]) -> None:
        self._links, self._floors = links, floors
        self.free = free = list(capacities)
        self._slope = [0.0] * len(free)
        self._members: list[list[int]] = [[] for _ in free]
        for index, (passed, floor) in enumerate(zip(links, floors, strict=True)):
            for link in passed:
                free[link] -= floor
                self._members[link].append(index)

    def rates(self, weights: Sequence[float], tops: Sequence[float]) -> list[float]:
        """Raise the level until nothing grows any more; return the rates."""
        links, floors, free, slope, members = self._links, self._floors, self.free, self._slope, self._members
        rates, growing = [-1.0] * len(links), [False] * len(links)
        ends = [(top / weights[index], ~index) for index, top in enumerate(tops) if top < inf]
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
            while ends:
                level, link = ends[0]
                if level >= until:
                    return
                if link < 0:
                    heappop(ends)
                    if rates[~link] < 0:
                        stop(~link, tops[~link])
                    continue
                now = free[link] / slope[link] if slope[link] else inf
                if now > level * _EXACT:
                    heapreplace(ends, (now, link))
                    continue
                heappop(ends)
                for index in members[link]:
                    if rates[index] < 0:
                        stop(index, max(floors[index], weights[index] * level))

        starts: dict[float, list[int]] = {}
        for index, floor in enumerate(floors):
            starts.setdefault(floor / weights[index], []).append(index)
        for level in sorted(starts):
            if ends and ends[0][0] < level:
                rise(level)
            touched = set[int]()
            for index in starts[level]:
                if rates[index] < 0:
                    growing[index] = True
                    floor, weight = floors[index], weights[index]
                    for link in links[index]:
                        free[link] += floor
                        slope[link] += weight
                    touched.update(links[index])
            for link in touched:
                heappush(ends, (max(level, free[link] / slope[link]), link))
        rise(inf)
        return [rate if rate >= 0 else inf for rate in rates]
