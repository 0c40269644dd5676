"""Estimates of the time until a place in a queue has its turn, from how long slots were held lately. Pure."""

from collections.abc import Callable, Sequence
from math import ceil
from statistics import quantiles
from typing import Final

UNKNOWN: Final = (5.0, 30.0)
"""Assumed quartiles, in seconds, of holding times until one is known."""
LEAST_SECONDS: Final = 0.5


def quartiles(held: Sequence[float]) -> tuple[float, float]:
    """Return the lower and the upper quartile of the times in seconds; of very few, a wider range."""
    if not held:
        return UNKNOWN
    if len(held) < 4:
        return min(held) / 2, max(held) * 2
    low, _, high = quantiles(held, n=4)
    return max(low, 0.0), max(high, low)


def forecast(ages: Sequence[float], places: int, held: Sequence[float]) -> Callable[[int], tuple[float, float]]:
    """Return a function from a position of the queue (from 1) to the likely least and most seconds until it gets a slot.

    A slot that is held for longer than most were is likely to be held for as long again.

    Args:
        ages: for how long each taken slot has been held.
        places: how many slots there are.
        held: how long slots were held lately.
    """
    low, high = quartiles(held)
    free = [0.0] * max(0, places - len(ages))
    least = sorted([*free, *(max(low - age, 0.0) for age in ages)])
    most = sorted([*free, *(max(high - age, LEAST_SECONDS) if age < high else age for age in ages)])
    return lambda position: (_until(position, least, low), _until(position, most, high))


def likely(low: float, high: float) -> str:
    """Return a range of seconds for a person."""
    most = max(1, ceil(high))
    return f"within {most} s" if low < 1 else f"in {low:.0f} to {most} s"


def _until(position: int, left: Sequence[float], typical: float) -> float:
    """`left`: seconds until each place is free, the first one first."""
    rounds, rest = divmod(position - 1, len(left) or 1)
    return rounds * typical + (left[rest] if left else typical)
