"""The results of the rounds as tables: by fault, by phase and by outcome, with the time to the end."""

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import click

from tests.bench.chaos import Result, Strike
from tests.bench.chaos_judge import LOST
from tests.bench.chaos_waiting import WaitingResult
from tests.bench.output import say, show_table

OUTCOMES = ("done", "rolled back", LOST, "BAD")
HEAD = ("rounds", *OUTCOMES, "median s", "worst s")


def tell_round(result: Result) -> None:
    """Print one line about a round, as progress."""
    struck = ", ".join(f"{strike.fault.name} in {strike.phase}" for strike in result.strikes)
    struck += "".join(f", {extra}" for extra in (result.plan.rival, "cancelled" * (result.plan.cancel is not None)) if extra)
    say(
        f"round {result.plan.number}: {result.plan.mode}, {struck or 'nothing struck'}: {result.outcome} "
        f"{result.judgement.seconds:.1f} s after the restart (round {result.seconds:.1f} s)"
    )


def tell(results: Sequence[Result]) -> None:
    """Print the tables and the verdict to standard output."""
    strikes = [(strike, result) for result in results for strike in result.strikes]
    _table("By fault", "fault", strikes, lambda strike: strike.fault.name)
    _table("By phase in which it struck", "phase", strikes, lambda strike: strike.phase)
    show_table("All", ("", *HEAD), [_row("all rounds", results)])
    for remark in sorted({remark for result in results for remark in result.judgement.remarks}):
        numbers = [str(result.plan.number) for result in results if remark in result.judgement.remarks]
        click.echo(f"remark   {remark}: {len(numbers)} rounds ({', '.join(numbers[:10])}{', …' if len(numbers) > 10 else ''})")
    good = sum(result.good for result in results)
    click.echo(f"\n{'met     ' if good == len(results) else 'NOT MET '} {good} of {len(results)} rounds judged good")


def _table(title: str, what: str, strikes: Iterable[tuple[Strike, Result]], key: Callable[[Strike], str]) -> None:
    groups: dict[str, list[Result]] = {}
    for strike, result in strikes:
        groups.setdefault(key(strike), []).append(result)
    show_table(title, (what, *HEAD), [_row(name, groups[name]) for name in sorted(groups)])


def _row(name: str, results: Sequence[Result]) -> list[str]:
    seconds = [result.judgement.seconds for result in results] or [0.0]
    counts = [sum(result.outcome == outcome for result in results) for outcome in OUTCOMES]
    figures = (f"{statistics.median(seconds):.1f}", f"{max(seconds):.1f}")
    return [name, str(len(results)), *(str(count) if count else "-" for count in counts), *figures]


def tell_waiting_round(result: WaitingResult) -> None:
    """Print one line about a round of migrations that wait, as progress."""
    ends = ", ".join(f"{guest} {end}" for guest, end in result.verdict.ends.items())
    faults = ", ".join(fault.name for fault in result.plan.faults)
    say(
        f"round {result.plan.number}: {faults}: {ends}: {'good' if result.good else 'BAD'} {result.verdict.seconds:.1f} s after the "
        f"repair (round {result.seconds:.1f} s)"
    )
    for remark in result.verdict.remarks:
        say(f"remark: {remark}")


def tell_waiting(results: Sequence[WaitingResult]) -> None:
    """Print the ends of the migrations, and the verdict, to standard output."""
    ends = Counter(end.partition(" (")[0] for result in results for end in result.verdict.ends.values())
    seconds = [result.verdict.seconds for result in results]
    show_table("Ends of the migrations", ("end", "migrations"), [(end, str(count)) for end, count in sorted(ends.items())])
    faults = Counter(fault.name for result in results for fault in result.plan.faults)
    click.echo(f"\n{sum(faults.values())} faults of {len(faults)} kinds")
    click.echo(f"from the repair to all ends: median {statistics.median(seconds):.1f} s, worst {max(seconds):.1f} s")
    for number, remark in ((result.plan.number, remark) for result in results for remark in result.verdict.remarks):
        click.echo(f"remark   round {number}: {remark}")
    good = sum(result.good for result in results)
    click.echo(f"{'met     ' if good == len(results) else 'NOT MET '} {good} of {len(results)} rounds judged good")


def waiting_to_json(results: Sequence[WaitingResult]) -> list[dict[str, Any]]:
    return [
        {
            "round": result.plan.number,
            "plan": str(result.plan),
            "struck": result.struck,
            "ends": result.verdict.ends,
            "seconds_to_end": round(result.verdict.seconds, 3),
            "problems": result.verdict.problems,
            "remarks": result.verdict.remarks,
            "good": result.good,
        }
        for result in results
    ]


def to_json(results: Sequence[Result]) -> list[dict[str, Any]]:
    return [
        {
            "round": result.plan.number,
            "plan": str(result.plan),
            "strikes": [
                {"fault": strike.fault.name, "phase": strike.phase, "after": round(strike.after, 3)} for strike in result.strikes
            ],
            "outcome": result.outcome,
            "seconds_to_end": round(result.judgement.seconds, 3),
            "records": result.judgement.records,
            "reported": result.judgement.reported,
            "problems": result.judgement.problems,
            "remarks": result.judgement.remarks,
            "good": result.good,
        }
        for result in results
    ]
