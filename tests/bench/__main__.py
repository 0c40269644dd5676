"""`scripts/bench`: the subcommands."""

import asyncio
import json
import random
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click

from tests.bench import footprint as footprints
from tests.bench import handshake as handshakes
from tests.bench import handshake_report
from tests.bench import shares as share_times
from tests.bench import soak as soaks
from tests.bench import walk as walks
from tests.bench.chaos_commands import chaos_command, failpoints_command
from tests.bench.load_commands import admission, rings, storm
from tests.bench.output import say
from tests.kit.cluster import why_not_libvirt

F = TypeVar("F", bound=Callable[..., Any])


def common(command: F) -> F:
    """Add the options that every bench takes."""
    output = click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
    lab = click.option("--lab-id", default="bench", show_default=True, help="Id of the lab: 1-10 of a-z and 0-9.")
    return output(lab(command))


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Measure Drover on this machine. Figures go to standard output, progress to standard error.

    The exit code does not depend on the figures: 0, or 1 if something failed.
    """


@main.command()
@click.option("--rounds", type=click.IntRange(1), default=10, show_default=True, help="Rounds; each runs every contender once.")
@click.option("--memory-mib", type=click.IntRange(24), default=256, show_default=True, help="Memory of the guest.")
@click.option("--mem-mib", type=click.IntRange(1), default=16, show_default=True, help="Memory that is filled.")
@click.option("--dirty", type=click.IntRange(0), default=200, show_default=True, help="Pages (4 KiB) dirtied per second.")
@click.option("--ticks", type=click.IntRange(19, 1000), default=250, show_default=True, help="Log lines per second (resolution).")
@click.option("--post-copy/--no-post-copy", default=False, show_default=True, help="Enable post-copy for all contenders.")
@click.option("--commands/--no-commands", default=True, show_default=True, help="Also time commands with their start.")
@common
def handshake(
    rounds: int, memory_mib: int, mem_mib: int, dirty: int, ticks: int, post_copy: bool, commands: bool, lab_id: str, output: str
) -> None:
    """Time Drover and `virsh migrate` side by side, on the same guest, in turns."""
    if reason := why_not_libvirt():
        raise click.ClickException(f"{reason}; a comparison with virsh needs real test hosts")
    setting = handshakes.Setting(rounds, memory_mib, mem_mib, dirty, ticks, post_copy, commands, lab_id)
    result = asyncio.run(handshakes.measure(setting))
    _out(output, result, handshake_report.tell, handshake_report.to_json)
    if result.problems:
        sys.exit(1)


def kind_option(choices: list[str], default: str, text: str) -> Callable[[F], F]:
    """Return the option --kind."""
    return click.option("--kind", type=click.Choice(choices), default=default, show_default=True, help=text)


def _known(kind: str) -> str:
    """Return `kind`; raise an error if it means real hosts and this machine cannot have them."""
    reason = why_not_libvirt() if kind == "libvirt" else None
    if reason:
        raise click.ClickException(f"{reason}; with --kind sim it runs on the simulated hypervisor")
    return kind


@main.command()
@click.option("--migrations", type=click.IntRange(2), default=100, show_default=True, help="Number of migrations.")
@kind_option(["libvirt", "sim"], "libvirt", "Real hosts, or simulated ones.")
@common
def soak(migrations: int, kind: str, lab_id: str, output: str) -> None:
    """Move one guest back and forth; check that all migrations succeed, its log is perfect, nothing is left over or keeps
    growing.
    """
    result = asyncio.run(soaks.measure(_known(kind), migrations, lab_id))
    _out(output, result, soaks.tell, soaks.to_json)
    if not result.ok:
        sys.exit(1)


@main.command()
@click.option("--starts", type=click.IntRange(1), default=5, show_default=True, help="Starts of each daemon.")
@click.option("--idle", type=click.FloatRange(1), default=5.0, show_default=True, help="Seconds of idling after each start.")
@kind_option(["libvirt", "sim", "both"], "both", "Real hosts, simulated ones, or both if possible.")
@common
def footprint(starts: int, idle: float, kind: str, lab_id: str, output: str) -> None:
    """Measure how soon agent and coordinator serve, and what they use while idle."""
    kinds = ("libvirt", "sim") if kind == "both" else (_known(kind),)
    if reason := why_not_libvirt() if kind == "both" else None:
        say(f"No real test hosts here: {reason}. Measuring only simulated ones.")
        kinds = ("sim",)
    result = footprints.measure(kinds, starts, idle, lab_id)
    _out(output, result, footprints.tell, footprints.to_json)


@main.command()
@click.option("--calls", type=click.IntRange(1), default=100_000, show_default=True, help="Number of calls.")
@click.option("--seed", type=int, default=None, help="Seed of the calls. Default: random.")
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
def walk(calls: int, seed: int | None, output: str) -> None:
    """Run migrations on simulated hosts while a caller who is not their driver makes random phase calls; check that no guest has two
    running copies."""
    result = asyncio.run(walks.measure(calls, random.SystemRandom().getrandbits(32) if seed is None else seed))
    _out(output, result, walks.tell, walks.to_json)
    if not result.ok:
        sys.exit(1)


@main.command()
@click.option("--flows", type=click.IntRange(1), default=1000, show_default=True, help="Number of transfers.")
@click.option("--hosts", type=click.IntRange(1), default=200, show_default=True, help="Number of hosts.")
@click.option(
    "--rounds", type=click.IntRange(1), default=50, show_default=True, help="Number of divisions, each of another cluster."
)
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
def shares(flows: int, hosts: int, rounds: int, output: str) -> None:
    """Time the division of bandwidth among transfers."""
    _out(output, share_times.measure(flows, hosts, rounds), share_times.tell, share_times.to_json)


def _out(output: str, result: Any, tell: Callable[[Any], None], to_json: Callable[[Any], Any]) -> None:
    if output == "json":
        click.echo(json.dumps(to_json(result), indent=2))
    else:
        tell(result)


main.add_command(failpoints_command)
main.add_command(chaos_command)
main.add_command(storm)
main.add_command(rings)
main.add_command(admission)


if __name__ == "__main__":
    main(prog_name="scripts/bench")
