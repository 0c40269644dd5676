"""The report of `scripts/bench admission`."""

from typing import Any, Final

import click

from tests.bench.admission import ACQUIRE, ECHO, RESERVE, Result
from tests.bench.output import show_table
from tests.bench.stats import Series, percentile

RATE_BAR: Final = 0.5
"""Of the echo's rate."""
REFUSED_BAR_MS: Final = 50.0


def tell(result: Result) -> None:
    """Print the tables and the verdicts to standard output."""
    setting = result.setting
    click.echo(
        f"{setting.rounds} rounds of {setting.seconds:g} s each, {setting.at_once} at once. "
        f"Load of the machine {result.load[0]:.1f} before, {result.load[1]:.1f} after."
    )
    head = ("pairs of calls", "pairs/s", "calls/s", "ratio", "p50 ms", "p99 ms", "server CPU ms", "ratio")
    show_table("Reservations, next to an echo of the same messages", head, [_row(result, name) for name in result.figures])
    click.echo(f"{RESERVE}: each of both calls also returns only once its record is on the disk")
    if result.queue is not None:
        queue = result.queue
        rows = [
            _times("slot free until the next one has it", queue.hand_over),
            _times("BUSY to one who does not wait", queue.refused),
            _times("one call of the echo", queue.echo),
        ]
        show_table(f"With {setting.waiting} sources waiting", ("", "n", "p50 ms", "p99 ms"), rows)
        click.echo(f"{queue.grants_per_second:.0f} slots per second one after the other; {queue.starved} sources had none")
    click.echo("")
    for line in verdicts(result):
        click.echo(line)


def _row(result: Result, name: str) -> list[str]:
    figures, echo = result.figures[name], result.figures[ECHO]
    took = [f"{percentile(figures.took_ms, share):.1f}" for share in (0.5, 0.99)]
    rates = [f"{figures.rate:.0f}", f"{2 * figures.rate:.0f}", f"{result.ratio(name):.2f}"]
    return [name, *rates, *took, f"{figures.cpu:.2f}", f"{figures.cpu / echo.cpu:.2f}"]


def _times(what: str, series: Series) -> list[str]:
    return [what, str(len(series.samples)), f"{series.p50:.1f}", f"{percentile(series.samples, 0.99):.1f}"]


def verdicts(result: Result) -> list[str]:
    """Return a line for each bar."""
    ratios = {name: result.ratio(name) for name in (ACQUIRE, RESERVE)}
    bars = [(ratio >= RATE_BAR, f"{name}: {ratio:.2f} of the echo's rate, to be ≥ {RATE_BAR:g}") for name, ratio in ratios.items()]
    if result.queue is not None:
        refused = result.queue.refused.p50
        bars.append((refused < REFUSED_BAR_MS, f"BUSY in {refused:.1f} ms (p50), to be < {REFUSED_BAR_MS:g} ms"))
        bars.append((not result.queue.starved, f"{result.queue.starved} sources starved, to be 0"))
    return [f"{'met    ' if met else 'NOT MET'}  {text}" for met, text in bars]


def to_json(result: Result) -> dict[str, Any]:
    queue = result.queue
    return {
        "load": result.load,
        "rates": {
            name: {"per_second": figures.rates, "ratio": result.ratio(name), "server_cpu_ms": figures.cpu_ms}
            for name, figures in result.figures.items()
        },
        "queue": queue
        and {
            "waiting": result.setting.waiting,
            "hand_over_ms": queue.hand_over.to_json(),
            "refused_ms": queue.refused.to_json(),
            "echo_ms": queue.echo.to_json(),
            "grants_per_second": queue.grants_per_second,
            "starved": queue.starved,
        },
        "verdicts": verdicts(result),
    }
