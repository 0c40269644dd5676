"""Estimates of the time until a place in a queue has its turn, from how long slots were held lately. Pure."""

from collections.abc import Sequence
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


def time_until(position: int, ages: Sequence[float], places: int, held: Sequence[float]) -> tuple[float, float]:
    """Return the likely least and most seconds until the migration at `position` (from 1) gets a slot.

    Args:
        ages: for how long each taken slot has been held.
        places: how many slots there are.
        held: how long slots were held lately.
    """
    low, high = quartiles(held)
    return _until(position, ages, places, low, 0.0), _until(position, ages, places, high, LEAST_SECONDS)


def _until(position: int, ages: Sequence[float], places: int, typical: float, least: float) -> float:
    free = [0.0] * max(0, places - len(ages))
    left = sorted([*free, *(max(typical - age, least) for age in ages)])
    rounds, rest = divmod(position - 1, len(left) or 1)
    return rounds * typical + (left[rest] if left else typical)
