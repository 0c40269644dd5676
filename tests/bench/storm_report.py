"""The report of `scripts/bench storm`."""

from collections.abc import Iterator
from typing import Any, Final

import click

from tests.bench.output import show_table
from tests.bench.storm import DROVER, TICK_MS, Outcome, Result

IMPORTANCES: Final = ("high", "medium", "low")
MAKESPAN_BAR: Final = 1.05
"""Of Drover's makespan, as a ratio to the wire's bound."""
NOISE: Final = 1.005
"""By how much a makespan may exceed another one and count as no longer."""


def tell(result: Result) -> None:
    """Print a table and the verdicts to standard output."""
    setting = result.setting
    click.echo(
        f"{setting.guests} guests from {setting.sources} sources to one destination, links of {setting.link_mib} MiB/s; "
        f"each guest dirties {setting.dirty_share:.2%} of that. The wire's bound is {setting.bound:.1f} s.\n"
        f"Drover's limit is {setting.limit}; vdsm tries again every {setting.retry:g} s. "
        f"Load of the machine {result.load[0]:.1f} before, {result.load[1]:.1f} after."
    )
    head = ("rule", "makespan s", "ratio", "bytes", "median wait s", *IMPORTANCES, "worst blackout ms", "p50", "at once", "CPU s")
    show_table("Ratio to the wire's bound; median waits, also by importance", head, [_row(result, o) for o in result.outcomes])
    click.echo("")
    for line in verdicts(result):
        click.echo(line)
    for problem in result.problems:
        click.echo(f"problem: {problem}")


def _row(result: Result, outcome: Outcome) -> list[str]:
    bound = result.setting.bound
    if not outcome.waits:
        return [outcome.rule]
    figures = [f"{outcome.makespan:.1f}", f"{outcome.makespan / bound:.3f}", f"{_bytes_ratio(result, outcome):.3f}"]
    figures += [f"{outcome.wait:.1f}", *(f"{outcome.wait_of(importance):.1f}" for importance in IMPORTANCES)]
    figures += [f"{outcome.worst_blackout:.0f}", f"{sorted(outcome.blackouts)[len(outcome.blackouts) // 2]:.0f}"]
    return [outcome.rule, *figures, str(outcome.most_at_once), f"{outcome.cpu_seconds:.1f}"]


def _bytes_ratio(result: Result, outcome: Outcome) -> float:
    return outcome.sent / (result.setting.bound * result.setting.link_mib * (1 << 20))


def verdicts(result: Result) -> list[str]:
    """Return a line for each bar of Drover's storm; none without it."""
    drover = result.of(DROVER)
    if drover is None or not drover.waits:
        return []
    return [f"{'met    ' if met else 'NOT MET'}  {text}" for met, text in _bars(result, drover)]


def _bars(result: Result, drover: Outcome) -> Iterator[tuple[bool, str]]:
    ratio = drover.makespan / result.setting.bound
    yield ratio <= MAKESPAN_BAR, f"makespan {ratio:.3f} of the wire's bound, to be ≤ {MAKESPAN_BAR:g}"
    limit = result.setting.limit
    yield drover.most_at_once <= limit, f"{drover.most_at_once} transfers at once, to be ≤ {limit}"
    high, others = drover.wait_of("high"), min(drover.wait_of(importance) for importance in IMPORTANCES[1:])
    yield high < others, f"median wait of high importance {high:.1f} s, to be < {others:.1f} s of the others"
    if not result.peers:
        return
    best = min(result.peers, key=lambda outcome: outcome.makespan)
    text = f"makespan {drover.makespan:.1f} s, to be ≤ {best.makespan:.1f} s of {best.rule}"
    yield drover.makespan <= best.makespan * NOISE, f"{text} (within {NOISE - 1:.1%})"
    calm = min(result.peers, key=lambda outcome: outcome.worst_blackout)
    text = f"worst blackout {drover.worst_blackout:.0f} ms, to be ≤ {calm.worst_blackout:.0f} ms of {calm.rule}"
    yield drover.worst_blackout <= calm.worst_blackout + TICK_MS, f"{text} (within a tick of {TICK_MS:g} ms)"


def to_json(result: Result) -> dict[str, Any]:
    setting = result.setting
    return {
        "guests": setting.guests,
        "sources": setting.sources,
        "limit": setting.limit,
        "link_mib": setting.link_mib,
        "dirty_share": setting.dirty_share,
        "retry": setting.retry,
        "bound_seconds": setting.bound,
        "load": result.load,
        "rules": {
            outcome.rule: {
                "makespan_seconds": outcome.makespan,
                "makespan_ratio": outcome.makespan / setting.bound,
                "bytes_ratio": _bytes_ratio(result, outcome),
                "waits": outcome.waits,
                "blackouts_ms": outcome.blackouts,
                "most_at_once": outcome.most_at_once,
                "cpu_seconds": outcome.cpu_seconds,
            }
            for outcome in result.outcomes
        },
        "verdicts": verdicts(result),
        "problems": result.problems,
    }
