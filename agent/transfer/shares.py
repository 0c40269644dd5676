"""The division of bandwidth among transfers: weighted max-min fair over every link that they share, with minima and maxima. Pure.

A transfer passes lines (of its source and its destination) and caps (of networks); all of them are links with a capacity. Its rate
grows with a common level, ``weight * level``, but is never below its minimum, until one of its links is full or it reaches its
maximum: so no transfer can get more without taking from one that has no more for its weight. A minimum is a floor, not a privilege:
a transfer whose fair share is higher gets no more than the others.

Units: bytes per second. A hypervisor counts in multiples of a `unit`, and the least that it can enforce is one of them: so every
transfer has a minimum of at least one unit, minima are rounded up, maxima and shares down. What the rounding leaves is not divided.
No rate is above `MOST_RATE`, whatever a minimum, a maximum or a capacity says.
"""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import chain
from math import inf
from typing import Final, TypeVar

from agent.runtime.wire import MOST_RATE

Key = TypeVar("Key", bound=Hashable)

NO_LIMIT: Final = 0
_EXACT: Final = 1e-9
"""A share is by this part of it higher before it is rounded down, at most a thousandth of its unit: more than the error of sums of
floats."""


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
        return self.ceiling if self.most else inf

    @property
    def ceiling(self) -> int:
        """The highest limit that it may be given: its maximum, or the highest of all."""
        most = min(self.most or MOST_RATE, MOST_RATE)
        return most - most % self.unit or self.unit

    @property
    def floor(self) -> int:
        """The lowest rate that it may be given."""
        return min(self.least + -self.least % self.unit or self.unit, self.ceiling)


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
    passed = Counter(chain.from_iterable([flow.lines for flow in flows.values()]))
    caps, shared = set(known), {line for line in known if passed[line] > 1}
    limits = {}
    for (key, flow), rate in zip(flows.items(), fair(list(flows.values()), known), strict=True):
        free = not flow.most and shared.isdisjoint(flow.lines) and caps.isdisjoint(flow.caps)
        limits[key] = NO_LIMIT if free else _rounded(min(rate, flow.ceiling), flow.unit)
    return limits


def _rounded(rate: float, unit: int) -> int:
    return (int((rate + min(rate * _EXACT, unit / 1000)) / unit) or 1) * unit


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
    weights, floors, tops = [flow.weight for flow in flows], [flow.floor for flow in flows], [flow.top for flow in flows]
    rates, fit = _fill(flows, capacities, weights, floors, tops)
    if not fit:
        lowered, _ = _fill(flows, capacities, floors, [0] * len(flows), floors)
        rates, _ = _fill(flows, capacities, weights, lowered, tops)
    return rates


@dataclass(slots=True, eq=False)
class _Link:
    """A link while the common level rises. It is full at the level ``free / slope``."""

    free: float
    """What its transfers that do not grow leave of it."""
    slope: int = 0
    """Sum of the weights of those that grow."""
    transfers: list[int] = field(default_factory=list)
    growing: int = 0
    """How many of them have started to grow when it is full; the others are in the order of their starts."""


def _fill(
    flows: Sequence[Flow], capacities: Mapping[str, float], weights: Sequence[int], floors: Sequence[float], tops: Sequence[float]
) -> tuple[list[float], bool]:
    """Raise the common level until nothing grows any more: each transfer's rate is ``max(floor, weight * level)``, until it reaches
    its top or one of its links is full. Return the rates, and whether the floors fit on all links.

    Each link looks ahead to the level at which it is full if none of its transfers stops before: those that start to grow up to
    there count as growing, the others with their floors. That level only rises, when one of them stops. So the lowest of these
    levels, computed anew when its turn comes, is final if it is still the lowest.
    """
    starts = [floor / weight for floor, weight in zip(floors, weights, strict=True)]
    links = {name: _Link(capacity) for name, capacity in capacities.items()}
    counted: list[list[_Link]] = []  # the links on which each transfer counts as growing
    ends: list[tuple[float, int, _Link | None]] = []  # levels of tops (with the transfer) and full links (with ~number)
    for index, (flow, weight, top) in enumerate(zip(flows, weights, tops, strict=True)):
        counted.append(passed := [])
        for name in flow.lines + flow.caps:
            if link := links.get(name):
                passed.append(link)
                link.transfers.append(index)
                link.slope += weight
        if top < inf:
            ends.append((top / weight, index, None))
    fit, last_start = True, max(starts, default=0)
    for number, link in enumerate(link for link in links.values() if link.transfers):
        link.growing, level = len(link.transfers), link.free / link.slope
        if level < last_start:
            link.transfers.sort(key=starts.__getitem__)
            while starts[index := link.transfers[link.growing - 1]] > level and link.growing > 1:
                link.growing -= 1
                counted[index].remove(link)
                link.free -= floors[index]
                link.slope -= weights[index]
                level = link.free / link.slope
            fit = fit and starts[index] <= level
        ends.append((level, ~number, link))
    heapify(ends)
    rates, left = [inf] * len(flows), len(flows)
    while ends and left:
        level, number, full = heappop(ends)
        stopping = full.transfers if full else [number]
        if full:
            level = full.free / full.slope if full.slope else inf
            while full.growing < len(stopping) and starts[index := stopping[full.growing]] < level:
                full.growing += 1
                if rates[index] == inf:
                    counted[index].append(full)
                    full.free += floors[index]
                    full.slope += weights[index]
                    level = full.free / full.slope
            if ends and level > ends[0][0]:
                if level < inf:
                    heappush(ends, (level, number, full))
                continue
        for index in stopping:
            if rates[index] == inf:
                weight = weights[index]
                rates[index] = rate = weight * level if level > starts[index] else floors[index]
                left -= 1
                for link in counted[index]:
                    link.free -= rate
                    link.slope -= weight
    return rates, fit
