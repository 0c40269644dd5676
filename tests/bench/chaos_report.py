"""The results of the rounds as tables: by fault, by phase and by outcome, with the time to the end."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import click

from tests.bench.chaos import Result, Strike
from tests.bench.chaos_judge import LOST
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
