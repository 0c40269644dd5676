"""`scripts/bench storm`, `rings` and `admission`: the commands."""

import json
import sys
from collections.abc import Callable
from typing import Any

import click

from tests.bench import admission as admissions
from tests.bench import admission_report, storm_report
from tests.bench import rings as ring_moves
from tests.bench import storm as storms

OUTPUT = click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True)


@click.command()
@click.option("--guests", type=click.IntRange(3), default=40, show_default=True, help="Guests that move.")
@click.option("--sources", type=click.IntRange(1, 8), default=4, show_default=True, help="Hosts that they leave.")
@click.option("--limit", type=click.IntRange(1), default=2, show_default=True, help="Drover's incoming limit at the destination.")
@click.option("--seconds", type=click.FloatRange(1), default=40.0, show_default=True, help="The wire's bound.")
@click.option("--link-mib", type=click.IntRange(8), default=128, show_default=True, help="Speed of each host's link, MiB/s.")
@click.option("--dirty", type=click.FloatRange(0, 1), default=0.008, show_default=True, help="Share of it that a guest dirties.")
@click.option("--retry", type=click.FloatRange(0.1), default=2.0, show_default=True, help="Pause of vdsm in s; 10 s in reality.")
@click.option("--only", multiple=True, help="Name of a rule to run; may be repeated. Default: all.")
@OUTPUT
def storm(
    guests: int,
    sources: int,
    limit: int,
    seconds: float,
    link_mib: int,
    dirty: float,
    retry: float,
    only: tuple[str, ...],
    output: str,
) -> None:
    """Send many guests to one simulated host at once, under Drover and under the rules of its peers."""
    setting = storms.Setting(guests, sources, limit, seconds, link_mib, dirty, retry)
    result = storms.measure(setting, only)
    _out(output, result, storm_report.tell, storm_report.to_json)
    if result.problems:
        sys.exit(1)


@click.command()
@click.option("--seconds", type=click.FloatRange(0.5), default=2.0, show_default=True, help="Of each contender in each round.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Rounds; each runs every contender once.")
@click.option("--at-once", type=click.IntRange(1, 256), default=32, show_default=True, help="Reservations under way at once.")
@click.option("--waiting", type=click.IntRange(2, 1000), default=500, show_default=True, help="Sources that wait for one slot.")
@OUTPUT
def admission(seconds: float, rounds: int, at_once: int, waiting: int, output: str) -> None:
    """Reserve slots at one agent, next to a bare grpc.aio echo with the same messages."""
    result = admissions.measure(admissions.Setting(seconds, rounds, at_once, waiting))
    _out(output, result, admission_report.tell, admission_report.to_json)


@click.command()
@click.option("--runs", type=click.IntRange(1), default=20, show_default=True, help="Runs of each shape.")
@click.option("--guests", type=click.IntRange(1), default=1, show_default=True, help="Guests that leave each host.")
@click.option("--seed", type=int, default=1, show_default=True, help="Of the order in which they are started.")
@OUTPUT
def rings(runs: int, guests: int, seed: int, output: str) -> None:
    """Let guests change places between two and three simulated hosts whose limits are all 1, and make the same moves singly."""
    shapes = [(hosts, prepared) for hosts in (2, 3) for prepared in (0, 1)]
    results = [ring_moves.measure(ring_moves.Setting(runs, hosts, guests, prepared, seed=seed)) for hosts, prepared in shapes]
    _out(output, results, ring_moves.tell, ring_moves.to_json)
    if any(result.problems for result in results):
        sys.exit(1)


def _out(output: str, result: Any, tell: Callable[[Any], None], to_json: Callable[[Any], Any]) -> None:
    if output == "json":
        click.echo(json.dumps(to_json(result), indent=2))
    else:
        tell(result)
