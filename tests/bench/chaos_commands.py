"""`scripts/bench failpoints` and `scripts/bench chaos`."""

import json
import secrets
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from shlex import quote
from typing import NoReturn

import click

from tests.bench import chaos, chaos_plan, chaos_report, failpoints, failpoints_cases, failpoints_report
from tests.bench.chaos_arena import QUICK, Arena
from tests.bench.chaos_waiting import play
from tests.bench.chaos_waiting_plan import WaitingPlan, waiting_plan
from tests.bench.output import say
from tests.kit.cluster import why_not_libvirt

MODES = {
    "managed": (failpoints_cases.MANAGED, failpoints_cases.TAKE_OVER),
    "p2p": (failpoints_cases.P2P,),
    "both": (failpoints_cases.MANAGED, failpoints_cases.TAKE_OVER, failpoints_cases.P2P),
}


def _needs_real_hosts() -> None:
    if reason := why_not_libvirt():
        raise click.ClickException(f"{reason}; this needs real test hosts")


_output = click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
_evidence = click.option(
    "--evidence",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("/tmp/drover-evidence"),
    show_default=True,
    help="Folder for logs and journals of failures.",
)


@click.command("failpoints")
@click.option("--mode", type=click.Choice(list(MODES)), default="both", show_default=True, help="Who drives.")
@click.option("--only", default="*", help="Pattern of failpoints, or of mode:failpoint.")
@click.option("--markdown", type=click.Path(dir_okay=False, path_type=Path), help="Write the table to this file as well.")
@click.option("--defaults", is_flag=True, help="Use the product's own lease and take-over times instead of short ones.")
@click.option("--lab-id", default="fp", show_default=True, help="Id of the lab: 1-10 of a-z and 0-9.")
@_evidence
@_output
def failpoints_command(
    mode: str, only: str, markdown: Path | None, defaults: bool, lab_id: str, evidence: Path, output: str
) -> None:
    """Kill each process at each of its failpoints; every migration must end without help within 15 s of the restart."""
    _needs_real_hosts()
    with Arena(lab_id, {} if defaults else QUICK) as arena:
        rows = failpoints.run(arena, failpoints_cases.cases(MODES[mode], only), evidence, failpoints_report.tell_row)
    if output == "json":
        click.echo(json.dumps(failpoints_report.to_json(rows), indent=2))
    else:
        failpoints_report.tell(rows)
    if markdown is not None:
        failpoints_report.write_markdown(rows, markdown)
    sys.exit(0 if rows and all(row.good for row in rows) else 1)


@click.command("chaos")
@click.option("--rounds", type=click.IntRange(1), default=25, show_default=True, help="Number of rounds.")
@click.option("--seed", type=int, help="The same seed gives the same rounds. Default: random, and printed.")
@click.option("--round", "one", type=click.IntRange(1), help="Run only this round.")
@click.option("--each-phase", is_flag=True, help="Instead: kill libvirtd and QEMU on either side in each phase, once each.")
@click.option("--waiting", is_flag=True, help="Instead: many migrations that wait for slots, while agents and coordinator die.")
@click.option("--only", default="*", help='Pattern of faults, such as "kill source *" or "*libvirtd".')
@click.option("--jobs", type=click.IntRange(1, 8), default=1, show_default=True, help="Rounds at once, each on its own hosts.")
@click.option("--lab-id", default="ch", show_default=True, help="Id of the lab: 1-9 of a-z and 0-9; each job adds a digit.")
@_evidence
@_output
def chaos_command(
    rounds: int,
    seed: int | None,
    one: int | None,
    each_phase: bool,
    waiting: bool,
    only: str,
    jobs: int,
    lab_id: str,
    evidence: Path,
    output: str,
) -> None:
    """Migrate real guests while something dies, hangs or is cut off; check that exactly one copy runs at the end and nothing is
    left.
    """
    _needs_real_hosts()
    if seed is None:
        seed = secrets.randbelow(1_000_000)
    say(f"seed {seed}")

    if waiting and (each_phase or only != "*"):
        raise click.UsageError("--waiting has its own faults: leave --each-phase and --only out")

    def keep(plan: chaos_plan.Plan | WaitingPlan) -> Path:
        folder = evidence / f"seed-{seed}-round-{plan.number}"
        also = f" --only {quote(only)}" if only != "*" else " --waiting" if waiting else ""
        say(f"evidence: {folder}; repeat with: scripts/bench chaos --seed {seed} --round {plan.number}{also}")
        return folder

    numbers = [one] if one is not None else range(1, rounds + 1)
    with ExitStack() as stack:
        arenas = [stack.enter_context(chaos.new_arena(f"{lab_id}{job}")) for job in range(1, jobs + 1)]
        if waiting:
            _waiting(arenas, seed, numbers, keep, output)
        plans = chaos_plan.each_phase() if each_phase else (chaos_plan.plan(seed, number, only) for number in numbers)
        results = chaos.run(arenas, plans, keep, chaos_report.tell_round)
    if output == "json":
        click.echo(json.dumps({"seed": seed, "rounds": chaos_report.to_json(results)}, indent=2))
    else:
        click.echo(f"seed {seed}")
        chaos_report.tell(results)
    sys.exit(0 if all(result.good for result in results) else 1)


def _waiting(
    arenas: Sequence[Arena], seed: int, numbers: Iterable[int], keep: Callable[[WaitingPlan], Path], output: str
) -> NoReturn:
    """Run and report rounds of migrations that wait; exit as chaos does."""
    plans = (waiting_plan(seed, number) for number in numbers)
    results = chaos.in_arenas(arenas, plans, lambda arena, plan: play(arena, plan, keep, chaos_report.tell_waiting_round))
    if output == "json":
        click.echo(json.dumps({"seed": seed, "rounds": chaos_report.waiting_to_json(results)}, indent=2))
    else:
        click.echo(f"seed {seed}")
        chaos_report.tell_waiting(results)
    sys.exit(0 if all(result.good for result in results) else 1)
