"""Statistics of a few samples."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Series:
    """Samples of one quantity, in one unit. With few samples, p95 is close to the worst one."""

    samples: tuple[float, ...]

    @classmethod
    def of(cls, samples: "Sequence[float | None]") -> "Series":
        """Return the series without the samples that are None (not measured)."""
        return cls(tuple(sample for sample in samples if sample is not None))

    def __bool__(self) -> bool:
        return bool(self.samples)

    @property
    def p50(self) -> float:
        return statistics.median(self.samples)

    @property
    def p95(self) -> float:
        return percentile(self.samples, 0.95)

    @property
    def least(self) -> float:
        return min(self.samples)

    @property
    def most(self) -> float:
        return max(self.samples)

    def to_json(self) -> dict[str, object]:
        if not self:
            return {"n": 0}
        figures = {"p50": self.p50, "p95": self.p95, "min": self.least, "max": self.most}
        return {
            "n": len(self.samples),
            **{k: round(v, 3) for k, v in figures.items()},
            "samples": [round(s, 3) for s in self.samples],
        }


def percentile(samples: Sequence[float], share: float) -> float:
    """Return the value below which `share` (0 to 1) of the samples lie, interpolated between the two nearest."""
    ordered = sorted(samples)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def most_at_once(spans: Sequence[tuple[float, float]]) -> int:
    """Return how many of these spans of time overlap at most."""
    changes = sorted((at, step) for start, end in spans for at, step in ((start, 1), (end, -1)))
    most = now = 0
    for _, step in changes:
        now += step
        most = max(most, now)
    return most
