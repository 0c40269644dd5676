"""Watching a migration: a live line on a terminal, plain lines elsewhere, JSON lines for programs; and the summary at the end."""

import asyncio
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import aclosing, contextmanager

import click

from coordinator.cli.exit_codes import ExitCode
from coordinator.cli.session import Session
from coordinator.cli.show import Stage, lost_or_stuck, print_json, print_pairs, print_table, to_json, to_type
from coordinator.cli.text import printable
from coordinator.cli.units import eta, rate, seconds, size
from coordinator.client import (
    UNKNOWN_PATIENCE,
    Migration,
    MigrationState,
    Progress,
    raise_unless_succeeded,
)

PROGRESS_SECONDS = 1.0
"""Plain lines: progress at most this often."""

_View = Callable[[Migration], None]

DESTINATION_PHASES = frozenset({"reserve", "prepare", "finish", "abandon"})
"""Phases of the destination; the others are the source's."""


async def follow(session: Session, migration_id: str, *, each_as_json: bool = False, warned: Collection[str] = ()) -> int:
    """`show_to_the_end`. Raises what says that it did not succeed."""
    last = raise_unless_succeeded(await show_to_the_end(session, migration_id, each_as_json=each_as_json, warned=warned))
    return ExitCode.UNKNOWN if lost_or_stuck(last) else ExitCode.DONE


async def show_to_the_end(
    session: Session, migration_id: str, *, each_as_json: bool = False, warned: Collection[str] = ()
) -> Migration:
    """Show every change until the end, or until the outcome was unknown for a while; then the summary, without the warnings that
    were told before.

    With JSON, one document at the end, or one line for every change.
    """
    session.stage = Stage.WATCHING
    with _view(session.output, each_as_json) as view:
        last = await _last(session, migration_id, view)
    if session.output == "json":
        if not each_as_json:
            print_json(to_json(last.proto))
    else:
        print_summary(last)
        print_warnings(warning for warning in last.warnings if warning not in warned)
    return last


async def _last(session: Session, migration_id: str, view: _View) -> Migration:
    """Follow to the end, or until the outcome was unknown for a while."""
    last: Migration | None = None
    unknown_until: float | None = None
    loop = asyncio.get_running_loop()
    async with aclosing(session.client.watch_migration(migration_id)) as changes:
        while last is None or not last.state.ended:
            try:
                async with asyncio.timeout_at(unknown_until):
                    last = await anext(changes)
            except TimeoutError:
                break
            view(last)
            unknown = last.state is MigrationState.OUTCOME_UNKNOWN
            unknown_until = (unknown_until or loop.time() + UNKNOWN_PATIENCE) if unknown else None
    assert last is not None
    return last


@contextmanager
def _view(output: str, each_as_json: bool) -> Iterator[_View]:
    if output == "json":
        yield (lambda migration: print_json(to_json(migration.proto), line=True)) if each_as_json else (lambda _: None)
    elif sys.stdout.isatty():
        with _live() as view:
            yield view
    else:
        yield _Lines()


@contextmanager
def _live() -> Iterator[_View]:
    """One line that changes in place."""
    from rich.console import Console  # noqa: PLC0415 - slow to import, and only a terminal needs it
    from rich.live import Live  # noqa: PLC0415
    from rich.spinner import Spinner  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    console, spinner = Console(), Spinner("dots", Text("…"))

    def show(migration: Migration) -> None:
        text = Text(describe(migration))
        text.truncate(console.width - 2, overflow="ellipsis")  # the spinner wraps what is longer than the rest of its line
        spinner.update(text=text)

    with Live(spinner, console=console, transient=True, refresh_per_second=10):
        yield show


class _Lines:
    """A line for each change of the phase, and progress at most each second."""

    def __init__(self) -> None:
        self._shown: tuple[str, ...] = ()
        self._next = 0.0

    def __call__(self, migration: Migration) -> None:
        stage = (migration.state, migration.phase, migration.waiting_for)
        now = asyncio.get_running_loop().time()
        if migration.state.ended or (stage == self._shown and now < self._next):
            return
        self._shown, self._next = stage, now + PROGRESS_SECONDS
        click.echo(describe(migration))


def describe(migration: Migration) -> str:
    """The migration in one line: what happens now, and how far it is."""
    stage = migration.phase if migration.state is MigrationState.ACTIVE and migration.phase else migration.state.value
    parts = [f"{migration.domain}: {stage}"]
    if migration.progress is not None and migration.phase == "perform":
        parts += _describe_progress(migration.progress)
    if migration.waiting_for:
        parts.append(f"waiting for {migration.waiting_for}")
    return printable(to_type("  ".join(parts)))


def _describe_progress(progress: Progress) -> list[str]:
    end = eta(progress.eta_low, progress.eta_high)
    said = {
        "post-copy": progress.post_copy,
        f"iteration {progress.iteration}": progress.iteration,
        f"{size(progress.remaining_bytes)} of {size(progress.total_bytes)} left": progress.total_bytes,
        f"at {rate(progress.rate)}": progress.rate,
        f"dirtying {rate(progress.dirty_rate)}": progress.dirty_rate,
        f"ends in {end}": end,
        f"({progress.reason})": progress.reason,
    }
    return [text for text, worth in said.items() if worth]


def print_summary(migration: Migration) -> None:
    """How it ended: phases with their milliseconds, bytes, downtime, total."""
    after = f"in {took_words(migration)}" if migration.state.ended else f"after {_elapsed(migration)}"
    click.echo(f"{printable(_verdict(migration))} {after}.")
    print_timings(migration)
    print_pairs(transfer_pairs(migration))


def print_warnings(warnings: Iterable[str]) -> None:
    """On stderr, also where the output is JSON: they are in that, too."""
    for warning in warnings:
        click.echo(f"warning: {printable(warning)}", err=True)


def _elapsed(migration: Migration) -> str:
    """Since its start, for one that has not ended: its duration is told at the end only."""
    return seconds(migration.age) if migration.age is not None else "?"


def took_words(migration: Migration) -> str:
    """How long it took, of one that has ended."""
    return f"{'at least ' if migration.duration_is_least else ''}{seconds(migration.duration)}"


def _verdict(migration: Migration) -> str:
    if migration.state is MigrationState.SUCCEEDED and not lost_or_stuck(migration):
        return f'"{migration.domain}" moved from {migration.source} to {migration.destination}'
    return f"{migration.state.value.replace('_', ' ')}: {migration.whereabouts.sentence}; migration {migration.id}"


def print_timings(migration: Migration) -> None:
    rows = [
        (
            timing.phase,
            migration.destination if timing.phase in DESTINATION_PHASES else migration.source,
            f"{timing.duration * 1000:.1f}",
            f"{timing.hypervisor_duration * 1000:.1f}",
        )
        for timing in migration.timings
    ]
    print_table(("PHASE", "HOST", "MS", "IN HYPERVISOR"), rows)


def transfer_pairs(migration: Migration) -> list[tuple[str, str]]:
    """What the transfer took, as names and values."""
    progress = migration.progress
    # Where the guest did not move, there was no downtime, and the time outside of hypervisor calls was mostly spent waiting.
    moved = migration.state is MigrationState.SUCCEEDED
    measured = moved and migration.hypervisor_duration and not migration.duration_is_least
    overhead = f"{seconds(migration.overhead)} outside hypervisor calls" if measured else ""
    total = took_words(migration) if migration.duration else ""
    if migration.duration_is_least:
        total += (
            " (its driver's machine was restarted, another took over, or an older version began it; what was before is not measured)"
        )
    pairs = [("total", total), ("overhead", overhead)]
    if progress is None:
        return pairs
    way = f" over {migration.network}" if migration.network else ""
    passes = f" in {progress.iteration} iteration{'s' if progress.iteration > 1 else ''}" if progress.iteration else ""
    return [
        ("sent", f"{size(progress.processed_bytes)} ({progress.processed_bytes} bytes){passes}{way}"),
        ("downtime", seconds(progress.downtime) if moved and progress.downtime else ""),
        *pairs,
    ]
