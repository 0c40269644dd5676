"""Shows a running migration: a live line on a terminal, plain lines elsewhere, JSON lines for programs; then a summary."""

import asyncio
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import aclosing, contextmanager

import click

from agent.runtime.units import rate, size
from coordinator.cli.exit_codes import ExitCode
from coordinator.cli.session import Session
from coordinator.cli.show import Stage, lost_or_stuck, print_json, print_pairs, print_table, to_json, with_server
from coordinator.cli.text import printable
from coordinator.cli.units import eta, seconds
from coordinator.client import (
    UNKNOWN_PATIENCE,
    Migration,
    MigrationState,
    Progress,
    raise_unless_succeeded,
)

PROGRESS_SECONDS = 1.0
"""Shortest interval between two plain lines of progress."""

_View = Callable[[Migration], None]

DESTINATION_PHASES = frozenset({"reserve", "prepare", "finish", "abandon"})
"""Phases that run on the destination; all others run on the source."""


async def follow(session: Session, migration_id: str, *, each_as_json: bool = False, warned: Collection[str] = ()) -> int:
    """Run `show_to_the_end`; return the exit code of a migration that succeeded. Raises: see `raise_unless_succeeded`."""
    last = raise_unless_succeeded(await show_to_the_end(session, migration_id, each_as_json=each_as_json, warned=warned))
    return ExitCode.UNKNOWN if lost_or_stuck(last) else ExitCode.DONE


async def show_to_the_end(
    session: Session, migration_id: str, *, each_as_json: bool = False, warned: Collection[str] = ()
) -> Migration:
    """Show every change of the migration until it ends, or its outcome was unknown for `UNKNOWN_PATIENCE` seconds; then print the
    summary, and the warnings that are not among `warned` (already printed). Return its last state.

    JSON: one document at the end, or (`each_as_json`) one line for every change.
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
    """Return the migration as it ended, or as it was after `UNKNOWN_PATIENCE` seconds of unknown outcome. Calls `view` on each
    change.
    """
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
    """Yield a view that updates one line in place."""
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
    """A view that prints a line at each change of the phase, and progress at most each `PROGRESS_SECONDS`."""

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
    """Return the migration in one line: its phase or state, its progress, and what it waits for."""
    stage = migration.phase if migration.state is MigrationState.ACTIVE and migration.phase else migration.state.value
    parts = [f"{migration.domain}: {stage}"]
    if migration.progress is not None and migration.phase == "perform":
        parts += _describe_progress(migration.progress)
    if migration.waiting_for:
        parts.append(f"waiting for {migration.waiting_for}")
    return printable(with_server("  ".join(parts)))


def _describe_progress(progress: Progress) -> list[str]:
    end = eta(progress.eta_low, progress.eta_high)
    texts = {
        "post-copy": progress.post_copy,
        f"iteration {progress.iteration}": progress.iteration,
        f"{size(progress.remaining_bytes)} of {size(progress.total_bytes)} left": progress.total_bytes,
        f"at {rate(progress.rate)}": progress.rate,
        f"dirtying {rate(progress.dirty_rate)}": progress.dirty_rate,
        f"ends in {end}": end,
        f"({progress.reason})": progress.reason,
    }
    return [text for text, known in texts.items() if known]


def settings_pairs(migration: Migration) -> list[tuple[str, str]]:
    """Return what was asked of the migration, and what its hypervisor reports as applied."""
    limit = rate(migration.bandwidth) if migration.bandwidth else "none"
    pause = seconds(migration.max_downtime) if migration.max_downtime else "the hypervisor's default"
    applied = f"{rate(migration.applied_bandwidth)} applied" if migration.applied_bandwidth else ""
    paused = f"{seconds(migration.applied_max_downtime)} applied" if migration.applied_max_downtime else ""
    least = rate(migration.min_bandwidth) if migration.min_bandwidth else ""
    short = 0 < migration.applied_bandwidth < migration.min_bandwidth  # such as of a cap that was lowered since
    return [
        ("importance", migration.importance),
        ("tenant", migration.tenant),
        ("limit", ", ".join(filter(None, (limit, applied)))),
        ("guaranteed", f"{least}, but its lines and its network do not give that now" if short else least),
        ("longest pause", ", ".join(filter(None, (pause, paused)))),
        ("may wait", seconds(migration.slot_wait) if migration.slot_wait else ""),
    ]


def print_summary(migration: Migration) -> None:
    """Print how the migration ended, its phases with their milliseconds, bytes, downtime and total time."""
    after = f"in {duration_text(migration)}" if migration.state.ended else f"after {_elapsed(migration)}"
    click.echo(f"{printable(_verdict(migration))} {after}.")
    print_timings(migration)
    print_pairs(transfer_pairs(migration))


def print_warnings(warnings: Iterable[str]) -> None:
    """Print to stderr, even if the output is JSON (which contains them as well)."""
    for warning in warnings:
        click.echo(f"warning: {printable(warning)}", err=True)


def _elapsed(migration: Migration) -> str:
    """Return the time since the start of a migration that has not ended; `duration` is set only at the end."""
    return seconds(migration.age) if migration.age is not None else "?"


def duration_text(migration: Migration) -> str:
    """Return how long a migration took that has ended."""
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
    """Return total time, overhead, bytes sent and downtime as names and values; the value is empty where it is unknown."""
    progress = migration.progress
    # If the guest did not move, there was no downtime, and most of the time outside hypervisor calls was spent waiting.
    moved = migration.state is MigrationState.SUCCEEDED
    measured = moved and migration.hypervisor_duration and not migration.duration_is_least
    overhead = f"{seconds(migration.overhead)} outside hypervisor calls" if measured else ""
    total = duration_text(migration) if migration.duration else ""
    if migration.duration_is_least:
        total += (
            " (the time before is not measured: the driver's machine was restarted, another driver took over, or an older version "
            "started it)"
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
