"""The report of `scripts/bench handshake`."""

import os
import statistics
from collections.abc import Sequence
from typing import Any

import click

from tests.bench.handshake import MANAGED, OVERHEAD_BAR_MS, PEER, Result, Run
from tests.bench.output import show_table
from tests.bench.stats import Series

HEAD = ("contender", "n", "p50", "p95", "min", "ratio p50", "ratio min")
OUTSIDE = "outside hypervisor calls"


def tell(result: Result) -> None:
    """Print tables and verdicts to standard output."""
    setting = result.setting
    click.echo(
        f"Guest of {setting.memory_mib} MiB: {setting.mem_mib} MiB filled, {setting.dirty} pages/s dirty, {setting.ticks} ticks/s. "
        f"{setting.rounds} rounds, post-copy {'armed' if setting.post_copy else 'off'}, the same options for all.\n"
        f"Load of the machine {result.load[0]:.1f} before, {result.load[1]:.1f} after, on {os.cpu_count()} cores{_caution(result)}."
    )
    _show_totals(result)
    _show_blackouts(result)
    _show_own(result)
    _show_parts(result)
    click.echo("\nAgainst the bars of issue 2")
    for line in verdicts(result):
        click.echo(f"  {line}")


def _caution(result: Result) -> str:
    """Return a warning if the machine was busy: a contender takes about one core, so other load distorts the comparison."""
    busy = max(result.load) > (os.cpu_count() or 1) * 0.75
    return ": the machine was busy, so trust minima and differences per round rather than medians" if busy else ""


def _show_totals(result: Result) -> None:
    """Print the totals, with the differences within each round, from which load during a whole round cancels out."""
    base = result.totals(result.baseline)
    rows = [[*_row(name, result.totals(name), base), _signed(paired_difference(result, name))] for name in result.contenders]
    title = f"Total, from request to done [ms]; ratios to {result.baseline}; per round: median of the differences to it"
    show_table(title, (*HEAD, "per round"), rows)


def _show_blackouts(result: Result) -> None:
    base = result.blackouts[result.baseline]
    rows = [_row(name, series, base) for name, series in result.blackouts.items() if series]
    tick = 1000 / result.setting.ticks
    show_table(
        f"Blackout as seen from outside the guest [ms], one tick of {tick:g} ms included; ratios to {result.baseline}", HEAD, rows
    )


def _row(name: str, figures: Series, base: Series) -> list[str]:
    ratios = [figures.p50 / base.p50, figures.least / base.least] if base else [float("nan")] * 2
    milliseconds = [_ms(figure) for figure in (figures.p50, figures.p95, figures.least)]
    return [name, str(len(figures.samples)), *milliseconds, *(f"{ratio:.2f}" for ratio in ratios)]


def paired_difference(result: Result, contender: str) -> float | None:
    """Return the median over rounds of the contender's total minus the baseline's of the same round, in ms."""
    base = {run.round: run.total for run in result.of(result.baseline)}
    differences = [run.total - base[run.round] for run in result.of(contender) if run.round in base]
    return statistics.median(differences) if differences else None


def _show_own(result: Result) -> None:
    rows = []
    for name in (MANAGED, PEER):
        runs = result.of(name)
        outside = Series.of([run.overhead for run in runs])
        running = Series.of([run.until_it_runs for run in runs])
        rows += [
            _own(name, what, series) for what, series in ((OUTSIDE, outside), ("request until it runs there", running)) if series
        ]
    show_table("Drover's own account [ms]", ("contender", "what", "p50", "p95", "min"), rows)


def _own(name: str, what: str, series: Series) -> list[str]:
    return [name, what, *map(_ms, (series.p50, series.p95, series.least))]


def _show_parts(result: Result) -> None:
    head = ("part", *(f"{name}, {figure}" for name in (MANAGED, PEER) for figure in ("p50", "min")))
    columns = [parts(result.of(name)) for name in (MANAGED, PEER)]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = []
    for name in names:
        series = [column.get(name, Series(())) for column in columns]
        rows.append([name, *(_ms(f) for s in series for f in ((s.p50, s.least) if s else (float("nan"),) * 2))])
    show_table("Where it goes [ms]: calls of the hypervisor, and the time from the end of one to the start of the next", head, rows)


def parts(runs: Sequence[Run]) -> dict[str, Series]:
    """Return the times of each phase's hypervisor call and between them. Finish starts during Perform, so it counts from Perform's
    end.
    """
    found: dict[str, list[float]] = {}
    for run in runs:
        for name, milliseconds in _parts(run):
            found.setdefault(name, []).append(milliseconds)
    return {name: Series(tuple(samples)) for name, samples in found.items()}


def _parts(run: Run) -> list[tuple[str, float]]:
    migration = run.migration
    if migration is None or migration.created is None or migration.ended is None:
        return []
    steps: list[tuple[str, float]] = []
    at, before = migration.created.timestamp(), "request"
    for timing in migration.timings:
        if timing.start is None:
            continue
        start = timing.start.timestamp()
        end = start + timing.hypervisor_duration
        if start > at:
            steps.append((f"  {before} → {timing.phase}", (start - at) * 1e3))
        elif timing.phase == "finish":
            perform = next(t for t in migration.timings if t.phase == "perform" and t.start is not None)
            assert perform.start is not None
            steps.append(("  (perform's start → finish's)", (start - perform.start.timestamp()) * 1e3))
        steps.append((timing.phase if start >= at else f"{timing.phase}, after {before}'s end", (end - max(start, at)) * 1e3))
        at, before = end, timing.phase
    own_end = migration.created.timestamp() + migration.duration
    steps.append((f"  {before} → end", (own_end - at) * 1e3))
    steps.append(("  not in duration (client and way)", run.total - migration.duration * 1e3))
    return steps


def verdicts(result: Result) -> list[str]:
    """Return a line for each limit: the measured value, and whether it is met."""
    base = result.baseline
    total, blackout = result.totals(base), result.blackouts[base]
    lines = []
    for name in (MANAGED, PEER):
        if not result.of(name):
            continue
        lines.append(_verdict(f"{name}: median total", result.totals(name).p50, "≤", total.p50, f"{base}'s"))
        lines.append(_verdict(f"{name}: median blackout", result.blackouts[name].p50, "≤", blackout.p50, f"{base}'s"))
        lines.append(_verdict(f"{name}: median {OUTSIDE}", result.overheads(name).p50, "<", OVERHEAD_BAR_MS, "the bar's"))
    guest = "perfect" if not result.problems else "; ".join(result.problems)
    return [*lines, f"{'met    ' if not result.problems else 'NOT MET'}  the guest's log: {guest}"]


def _verdict(what: str, measured: float, relation: str, bar: float, whose: str) -> str:
    met = measured <= bar if relation == "≤" else measured < bar
    return f"{'met    ' if met else 'NOT MET'}  {what} {measured:.1f} ms, to be {relation} {whose} {bar:.1f} ms"


def _ms(value: float) -> str:
    return "-" if value != value else f"{value:.1f}"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.1f}"


def to_json(result: Result) -> dict[str, Any]:
    contenders = {
        name: {
            "total_ms": result.totals(name).to_json(),
            "blackout_ms": result.blackouts[name].to_json(),
            "overhead_ms": result.overheads(name).to_json(),
            "until_it_runs_ms": Series.of([run.until_it_runs for run in result.of(name)]).to_json(),
            "total_ms_per_round_to_baseline": paired_difference(result, name),
            "parts_ms": {part.strip(): series.to_json() for part, series in parts(result.of(name)).items()},
        }
        for name in result.contenders
    }
    return {
        "setting": {key: value for key, value in vars(result.setting).items() if key != "lab_id"},
        "load": result.load,
        "baseline": result.baseline,
        "contenders": contenders,
        "problems": result.problems,
        "verdicts": verdicts(result),
    }
