"""The judge: reads a test guest's serial log and decides whether exactly one copy ran, and whether it lost anything.

Source and destination append to one file, so it covers the whole life of the guest (`guest/guest.c` explains the lines): a
number that repeats or falls proves a second running copy or one that was set back to an older state, a missing number
proves lost output, a second BOOT a restart, BAD a lost page. Lines torn anywhere but at the end of the file prove two
writers at the same time.

Three clocks show how long the guest stood still:

- the host's (`stamps`, written by `native/stamp.c` as the lines arrive): the gap as seen from outside,
- the guest's own virtual clock, which stops with the guest: only the time for which it ran without progress (pages that
  post-copy had not brought yet),
- the guest's real-time clock against its virtual clock: the time for which QEMU had stopped it, per second, to about 0.2 ms.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

US_PER_MS = 1000
DAY_S = 86400

PATTERNS = {
    "S": re.compile(r"S (\d+) (\d+) (\d+) (\d+)"),
    "W": re.compile(r"W (\d+) (\d+)"),
    "BAD": re.compile(r"BAD (\d+) (\d+) (\d+)"),
    "BOOT": re.compile(r"BOOT (\d+) (\d+) (\d+)"),
}


@dataclass(frozen=True)
class Beat:
    """One S line."""

    line: int
    """Line number in the file, from 1."""
    seq: int
    guest_us: int
    """The guest's virtual clock, microseconds since its boot."""
    checked: int
    """Pages checked since boot."""
    bad: int
    """Pages found wrong since boot."""
    host_us: int | None = None
    """CLOCK_MONOTONIC of the host at arrival in microseconds (Python: time.monotonic() * 1e6), where stamps were taken."""


@dataclass(frozen=True)
class Gap:
    """The time between two consecutive lines, or for the RTC the time lost between two full seconds."""

    ms: float
    after_seq: int
    """The S number before the gap."""
    line: int
    """The line in the log at which the gap ends, from 1."""
    host_us: int | None = None
    """Start of the gap by the host's CLOCK_MONOTONIC in microseconds, if known."""


@dataclass(frozen=True)
class BadPage:
    """A page without the content that the guest had last written to it."""

    line: int
    page: int
    expected: int
    found: int
    """Generations (how often the page was changed); a smaller `found` is older content: a lost change."""


@dataclass(frozen=True)
class Oddity:
    """A sequence number in the wrong place."""

    line: int
    seq: int
    previous: int


@dataclass(frozen=True)
class Verdict:
    """The judgement of a log. `perfect` is the short answer, `problems()` the long one."""

    beats: tuple[Beat, ...]
    boots: int
    pages: int
    """Pages of memory that the guest checks, by its BOOT line."""
    repeated: tuple[Oddity, ...]
    """Numbers seen before: two copies ran, or one was set back."""
    fallen: tuple[Oddity, ...]
    """Numbers lower than the one before and never seen before: two writers out of order."""
    missing: tuple[int, ...]
    """Missing numbers between the first and the last."""
    bad_pages: tuple[BadPage, ...]
    torn: tuple[int, ...]
    """Lines (from 1) that are no line of the guest; a torn last line is normal and does not count."""
    host_gaps: tuple[Gap, ...]
    """The longest gaps between S lines by the host's clock, longest first; empty without stamps."""
    guest_gaps: tuple[Gap, ...]
    """The longest gaps by the guest's virtual clock, longest first."""
    stopped: tuple[Gap, ...]
    """The longest times for which QEMU had stopped the guest, by its RTC against its virtual clock, longest first.

    Found per full second, so a stop across the turn of a second counts half here, half there; `stopped_ms` is exact.
    """
    stopped_ms: float
    """The sum of all stops, negative ones (noise) included."""

    @property
    def count(self) -> int:
        """Number of S lines."""
        return len(self.beats)

    @property
    def first(self) -> int | None:
        """The first sequence number."""
        return self.beats[0].seq if self.beats else None

    @property
    def last(self) -> int | None:
        """The last sequence number."""
        return self.beats[-1].seq if self.beats else None

    @property
    def blackout_ms(self) -> float | None:
        """The longest gap, by the host's clock if there is one, else by RTC and virtual clock together."""
        if self.host_gaps:
            return self.host_gaps[0].ms
        inside = [gaps[0].ms for gaps in (self.guest_gaps, self.stopped) if gaps]
        return sum(inside) if inside else None

    @property
    def perfect(self) -> bool:
        """Exactly one copy ran, without a restart, and nothing was lost."""
        return not self.problems()

    def blackout_between(self, since: float, until: float) -> float | None:
        """Return the longest gap in ms that overlaps this span of time.monotonic() (seconds); None without stamped lines in it."""
        since_us, until_us = since * 1e6, until * 1e6
        gaps = [gap.ms for gap in _host_gaps(self.beats) if _overlaps(gap, since_us, until_us)]
        return max(gaps, default=None)

    def checks_since(self, seq: int) -> float:
        """Return how many times all memory was checked since that sequence number: memory is proved good from 1.0 on."""
        at = [beat.checked for beat in self.beats if beat.seq <= seq]
        return (self.beats[-1].checked - at[-1]) / self.pages if at and self.pages else 0.0

    def problems(self) -> list[str]:
        """Return everything that is wrong, as sentences; empty for a perfect log."""
        found = []
        if not self.beats:
            found.append("the log has no S line: the guest never ran")
        if self.boots != 1:
            found.append(f"the guest booted {self.boots} times instead of once")
        found += _sentence("came again: a second copy ran, or one was set back", self.repeated)
        found += _sentence("came after a higher one: two copies wrote at the same time", self.fallen)
        if self.missing:
            found.append(f"{len(self.missing)} sequence numbers are missing: {_shortened(self.missing)}")
        for page in self.bad_pages[:5]:
            found.append(f"page {page.page} held generation {page.found} instead of {page.expected} (line {page.line})")
        if len(self.bad_pages) > 5:
            found.append(f"{len(self.bad_pages)} pages in all held the wrong content")
        if self.beats and self.beats[-1].bad > len(self.bad_pages):
            found.append(f"the guest counted {self.beats[-1].bad} bad pages, the log names {len(self.bad_pages)}")
        if self.torn:
            found.append(f"{len(self.torn)} lines are torn (two writers at once?): lines {_shortened(self.torn)}")
        return found


def _sentence(what: str, oddities: Sequence[Oddity]) -> list[str]:
    if not oddities:
        return []
    one = oddities[0]
    return [f"{len(oddities)} sequence numbers {what}; first {one.seq} after {one.previous} (line {one.line})"]


def _shortened(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:5]))
    return shown if len(numbers) <= 5 else f"{shown}, …, {numbers[-1]}"


def judge(log: str, stamps: str = "", gaps: int = 5) -> Verdict:
    """Judge the text of a serial log; `stamps` is the text of its .stamps file, `gaps` the number of longest gaps to keep."""
    lines = log.split("\n")
    lines.pop()  # What follows the last line end: nothing, or a torn line that is still being written.
    stamp_of = _arrivals(stamps)
    beats: list[Beat] = []
    walls: list[tuple[int, int, int, int]] = []
    bad_pages: list[BadPage] = []
    torn: list[int] = []
    boots = pages = 0
    for number, line in enumerate(lines, start=1):
        kind, figures = _parsed(line.rstrip("\r"))
        match kind:
            case "S":
                seq, guest_us, checked, bad = figures
                beats.append(Beat(number, seq, guest_us, checked, bad, stamp_of.get((seq, guest_us))))
            case "W":
                walls.append((number, figures[0], figures[1], beats[-1].seq if beats else 0))
            case "BAD":
                bad_pages.append(BadPage(number, *figures))
            case "BOOT":
                boots += 1
                pages = figures[1]
            case _:
                torn.append(number)
    repeated, fallen = _order(beats)
    stops = list(_stops(walls))
    return Verdict(
        beats=tuple(beats),
        boots=boots,
        pages=pages,
        repeated=repeated,
        fallen=fallen,
        missing=_missing(beats),
        bad_pages=tuple(bad_pages),
        torn=tuple(torn),
        host_gaps=_longest(_host_gaps(beats), gaps),
        guest_gaps=_longest(_guest_gaps(beats), gaps),
        stopped=_longest(stops, gaps),
        stopped_ms=sum(stop.ms for stop in stops),
    )


def judge_file(path: Path, gaps: int = 5) -> Verdict:
    """Judge a log file, with its stamps file if there is one. The stamps of the latest lines arrive some ms later."""
    stamps = path.with_suffix(".stamps")
    # Stamps are written after the log, so they are read first: then no stamped line is missing in the log.
    stamped = stamps.read_text(errors="replace") if stamps.exists() else ""
    return judge(path.read_text(errors="replace"), stamped, gaps)


def _parsed(line: str) -> tuple[str, tuple[int, ...]]:
    """Return (kind, figures) of a line; kind is "" for a line that no guest writes."""
    kind = line.partition(" ")[0]
    pattern = PATTERNS.get(kind)
    match = pattern.fullmatch(line) if pattern else None
    return (kind, tuple(map(int, match.groups()))) if match else ("", ())


def _arrivals(stamps: str) -> dict[tuple[int, int], int]:
    """Return the host's time of the first arrival of each S line, by (seq, guest time)."""
    found: dict[tuple[int, int], int] = {}
    for line in stamps.split("\n")[:-1]:
        host_us, _, text = line.partition(" ")
        kind, figures = _parsed(text)
        if kind == "S" and host_us.isdigit():
            found.setdefault((figures[0], figures[1]), int(host_us))
    return found


def _order(beats: Sequence[Beat]) -> tuple[tuple[Oddity, ...], tuple[Oddity, ...]]:
    """Return (repeated, fallen)."""
    seen: set[int] = set()
    repeated, fallen = [], []
    previous = 0
    for beat in beats:
        if beat.seq in seen:
            repeated.append(Oddity(beat.line, beat.seq, previous))
        elif beat.seq < previous:
            fallen.append(Oddity(beat.line, beat.seq, previous))
        seen.add(beat.seq)
        previous = beat.seq
    return tuple(repeated), tuple(fallen)


def _missing(beats: Sequence[Beat]) -> tuple[int, ...]:
    seen = {beat.seq for beat in beats}
    return tuple(seq for seq in range(min(seen), max(seen)) if seq not in seen) if seen else ()


def _host_gaps(beats: Sequence[Beat]) -> Iterable[Gap]:
    for one, two in pairwise(beats):
        if one.host_us is not None and two.host_us is not None:
            yield Gap((two.host_us - one.host_us) / US_PER_MS, one.seq, two.line, one.host_us)


def _overlaps(gap: Gap, since_us: float, until_us: float) -> bool:
    return gap.host_us is not None and gap.host_us <= until_us and gap.host_us + gap.ms * US_PER_MS >= since_us


def _guest_gaps(beats: Sequence[Beat]) -> Iterable[Gap]:
    for one, two in pairwise(beats):
        yield Gap((two.guest_us - one.guest_us) / US_PER_MS, one.seq, two.line, one.host_us)


def _stops(walls: Sequence[tuple[int, int, int, int]]) -> Iterable[Gap]:
    """Yield the wall time that the virtual clock missed, from W lines (line, second of day, guest time, last seq)."""
    for (_, second_1, us_1, seq), (line, second_2, us_2, _) in pairwise(walls):
        wall_us = (second_2 - second_1) % DAY_S * 1_000_000
        yield Gap((wall_us - (us_2 - us_1)) / US_PER_MS, seq, line)


def _longest(gaps: Iterable[Gap], count: int) -> tuple[Gap, ...]:
    return tuple(sorted(gaps, key=lambda gap: gap.ms, reverse=True)[:count])
