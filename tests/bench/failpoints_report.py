"""The table of failpoints: on a terminal, and as Markdown for docs/failpoints.md."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from tests.bench.failpoints import DEADLINE, Row
from tests.bench.output import say, show_table

HEAD = ("failpoint", "process", "mode", "run", "reached", "outcome", "s to the end", "verdict")


def cells(row: Row) -> list[str]:
    """Return one line of the table."""
    judgement = row.judgement
    seconds = f"{judgement.seconds:.1f}" if row.reached else "-"
    outcome = judgement.outcome if row.reached else "-"
    verdict = row.verdict if row.reached or not row.good else "not reached"
    case = row.case
    return [case.point, case.process, case.mode, case.scenario.name, "yes" if row.reached else "no", outcome, seconds, verdict]


def tell_row(row: Row) -> None:
    """Print one row, as progress."""
    say("  ".join(cells(row)))


def tell(rows: Sequence[Row]) -> None:
    """Print the table and its summary to standard output."""
    show_table("Killed at each failpoint, started again", HEAD, [cells(row) for row in rows])
    click.echo("")
    for line in summary(rows):
        click.echo(line)


def summary(rows: Sequence[Row]) -> list[str]:
    """Return the summary of the table, as sentences."""
    reached = [row for row in rows if row.reached]
    bad = [row.case.name for row in rows if not row.good]
    seconds = [row.judgement.seconds for row in reached] or [0.0]
    unreached = sorted({row.case.point for row in rows} - {row.case.point for row in reached})
    return [
        f"{len(reached)} of {len(rows)} rows reached; {sum(row.good for row in reached)} of these judged good "
        f"(bad: {', '.join(bad) or 'none'}).",
        f"Seconds from the restart to the end: median {statistics.median(seconds):.1f}, worst {max(seconds):.1f}, "
        f"at most {DEADLINE:g} allowed.",
        f"Reached in no row: {', '.join(unreached) or 'none'}.",
    ]


def write_markdown(rows: Sequence[Row], path: Path) -> None:
    """Write docs/failpoints.md."""
    lines = [
        "# Failpoints",
        "",
        "Each process of Drover was killed (SIGKILL) at each of its failpoints (`failpoints.py`) during a migration of a real",
        "guest on real libvirt and QEMU, and started again. Judged: the guest runs on exactly one host, its own log is perfect,",
        "both agents' records are final and agree, nothing is left over, and the guest can be migrated again.",
        "",
        "Written by `scripts/bench failpoints --markdown docs/failpoints.md`.",
        "",
        *(f"- {line}" for line in summary(rows)),
        "",
        f"| {' | '.join(HEAD)} |",
        f"|{'---|' * len(HEAD)}",
        *(f"| {' | '.join(cell.replace('|', '/') for cell in cells(row))} |" for row in rows),
    ]
    path.write_text("\n".join(lines) + "\n")


def to_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [
        {
            **dict(zip(("failpoint", "process", "mode", "run"), cells(row), strict=False)),
            "reached": row.reached,
            "outcome": row.judgement.outcome,
            "seconds_to_end": round(row.judgement.seconds, 3),
            "records": row.judgement.records,
            "reported": row.judgement.reported,
            "problems": row.judgement.problems,
            "remarks": row.judgement.remarks,
            "good": row.good,
        }
        for row in rows
    ]
