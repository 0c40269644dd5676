"""``drover migration list|show|watch|set|cancel|resolve``"""

import sys
from typing import TYPE_CHECKING, Any, cast

import click

from coordinator.cli.exit_codes import EPILOG, ExitCode
from coordinator.cli.follow import describe, duration_text, follow, print_timings, settings_pairs, show_to_the_end, transfer_pairs
from coordinator.cli.parse import Seconds, ZeroOr, once_option, rate_option
from coordinator.cli.session import Session, ask, run, show_list, show_one, whoami
from coordinator.cli.show import lost_or_stuck, output_option, print_json, print_pairs, report_json, to_json, with_server
from coordinator.cli.text import printable
from coordinator.cli.units import ago, eta
from coordinator.client import (
    DeadlineExceeded,
    Migration,
    MigrationFailed,
    MigrationState,
    OutcomeUnknown,
    Refused,
    raise_unless_succeeded,
)

if TYPE_CHECKING:
    from coordinator.client.request import Changeable

CANCEL_SECONDS = 30.0
"""How long ``cancel`` waits for the end."""

id_argument = click.argument("migration_id", metavar="ID")


@click.group(epilog=EPILOG)
def migration() -> None:
    """List, show, watch, change, cancel and resolve migrations.

    An ID may be shortened to its first characters, at least 4, if no other ID begins with them.
    """


@migration.command("list")
@click.option("--active", is_flag=True, help="Only migrations that have not ended.")
@click.option("--limit", type=click.IntRange(1, 1000), default=100, show_default=True, help="Number of migrations at most.")
@output_option
def list_(active: bool, limit: int, output: str) -> None:
    """List migrations, the newest first."""

    header = ("ID", "STATE", "GUEST", "FROM", "TO", "STARTED", "TOOK")
    show_list(output, "migrations", lambda session: session.client.list_migrations(active_only=active, limit=limit), header, _row)


def _row(migration: Migration) -> tuple[str, ...]:
    waits = ", ".join(_wait(migration))
    took = duration_text(migration) if migration.state.ended else f"{migration.phase}{f' (waiting: {waits})' if waits else ''}"
    names = (migration.domain, migration.source, migration.destination)
    return (migration.id[:8], migration.state.value, *names, _started(migration), took)


def _wait(migration: Migration) -> list[str]:
    """Return what it waits for as a code, its place in the queue, and when its turn is expected."""
    if migration.wait_reason == "unspecified":
        return []
    wait = migration.wait
    if wait is None or not wait.position:
        return [migration.wait_reason]
    expected = eta(wait.estimate_low, wait.estimate_high)
    place = f"place {wait.position} of {wait.queue_length}"
    return [migration.wait_reason, place, *([f"likely in {expected}"] if expected else [])]


def _started(migration: Migration) -> str:
    return ago(migration.age, by_wall_clock=migration.age_by_wall_clock)


@migration.command()
@id_argument
@output_option
def show(migration_id: str, output: str) -> None:
    """Show everything that is known about one migration."""

    async def get(session: Session) -> Migration:
        return await session.client.get_migration(await session.full_id(migration_id))

    show_one(output, get, _print_migration)


def _print_migration(migration: Migration) -> None:
    failure = migration.failure
    print_pairs(
        [
            ("id", migration.id),
            ("state", migration.state.value),
            ("guest", f"{migration.domain} {migration.domain_uuid}".strip()),
            ("from", migration.source),
            ("to", migration.destination),
            ("runs on", _place(migration)),
            ("driver", migration.driver),
            ("network", migration.network),
            *_network_pairs(migration),
            ("uri", migration.uri),
            ("attempt", str(migration.attempt)),
            *settings_pairs(migration),
            ("started", _started(migration)),
            ("now", "" if migration.state.ended else describe(migration)),
            ("wait", "" if migration.state.ended else ", ".join(_wait(migration))),
            ("failure", with_server(f"{failure.reason}: {failure.message}") if failure else ""),
            *(("also", other.message) for other in migration.other_failures),
            *transfer_pairs(migration),
            *(("warning", warning) for warning in migration.warnings),
        ]
    )
    print_timings(migration)


def _network_pairs(migration: Migration) -> list[tuple[str, str]]:
    """Return why the migration takes its network, and why it takes no other."""
    choice = migration.proto.network_choice
    addresses = f"{choice.source_address} to {choice.destination_address}" if choice.source_address else ""
    others = [(f"not {other.name}", other.why) for other in choice.ruled_out]
    return [("because", choice.why), ("addresses", addresses), *others]


def _place(migration: Migration) -> str:
    return migration.runs_on or migration.whereabouts.sentence


@migration.command(epilog=EPILOG)
@id_argument
@output_option
def watch(migration_id: str, output: str) -> None:
    """Watch a migration until it ends; the exit code says how it ended. JSON: one line for each change.

    Ctrl-C ends the watching, not the migration.
    """

    async def body(session: Session) -> int:
        return await follow(session, await session.full_id(migration_id), each_as_json=True)

    run(body, output)


@migration.command("set", epilog=EPILOG)
@id_argument
@rate_option("--bandwidth", 'Limit of the rate, such as 100MiB/s; "none" removes it.')
@rate_option("--min-bandwidth", 'Least rate that is guaranteed; "none" removes it.')
@click.option("--importance", type=click.Choice(["low", "medium", "high"]), help="Who waits less, and gets more of the bandwidth.")
@once_option(
    "--wait",
    "slot_wait",
    metavar="DURATION",
    text='How long it may wait for its slots, from its start on, such as 10min; "none", or a time that is over, ends the wait.',
    kind=ZeroOr("none", Seconds(most=7 * 86400)),
)
@once_option(
    "--max-downtime",
    metavar="DURATION",
    text="Longest pause of the guest at the switch-over, such as 300ms.",
    kind=ZeroOr("default", Seconds(most=3600)),
)
@output_option
def set_(migration_id: str, output: str, **given: Any) -> None:
    """Change a migration that waits or runs. A transfer that runs obeys within a second; printed is what its hypervisor reports."""
    changes = cast("Changeable", {name: value for name, value in given.items() if value is not None})
    if not changes:
        raise click.UsageError("nothing to change: give --bandwidth, --min-bandwidth, --importance, --wait or --max-downtime")

    async def update(session: Session) -> Migration:
        return await session.client.update_migration(await session.full_id(migration_id), **changes)

    show_one(
        output, update, lambda changed: print_pairs([("id", changed.id), ("state", changed.state.value), *settings_pairs(changed)])
    )


@migration.command()
@id_argument
@click.option("--detach", is_flag=True, help="Do not wait for the end.")
@output_option
def cancel(migration_id: str, detach: bool, output: str) -> None:
    """Cancel a migration: the guest goes on at the source. Possible until the guest runs at the destination."""

    async def body(session: Session) -> None:
        full_id = await session.full_id(migration_id)
        migration = await session.client.cancel_migration(full_id)
        if not detach:
            migration = await _ended(session, migration)
        if output == "json":
            print_json(to_json(migration.proto))
        else:
            click.echo(printable(f"{migration.state.value}: {migration.whereabouts.sentence}"))
        if lost_or_stuck(migration):
            raise_unless_succeeded(migration)
        if migration.state is MigrationState.SUCCEEDED:
            raise Refused("it was too late to cancel", reason="WRONG_PHASE", migration=migration)

    run(body, output)


@migration.command(epilog=EPILOG)
@id_argument
@click.option("--assume-dead", "dead_host", metavar="HOST", required=True, help="The host that is dead for certain.")
@click.option("--reason", required=True, help="How you know that it is dead; this is recorded.")
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
@output_option
def resolve(migration_id: str, dead_host: str, reason: str, yes: bool, output: str) -> None:
    """End a migration by stating that one of its hosts is dead for certain: powered off, or fenced.

    If the host is not dead, two copies of the guest may run. Who stated it, when and why is recorded on every host that takes part.
    """

    async def look(session: Session) -> Migration:
        if not yes and not (sys.stdin and sys.stdin.isatty()):
            raise click.UsageError(
                f"cannot ask you to confirm that {dead_host} is dead, as stdin is no terminal; add --yes to state it"
            )
        return await session.client.get_migration(await session.full_id(migration_id))

    async def state_dead(session: Session) -> int:
        await session.client.resolve_migration(found.id, dead_host=dead_host, reason=reason, said_by=whoami())
        last = await show_to_the_end(session, found.id)
        if not last.state.ended or lost_or_stuck(last):
            raise_unless_succeeded(last)
        if output != "json":
            _print_resolved(last, dead_host)
        return ExitCode.UNKNOWN if lost_or_stuck(last) else ExitCode.DONE

    found = ask(look, output)
    if output != "json":
        _print_migration(found)
    # Asks between two event loops: inside one, Ctrl-C would have no effect until an answer is typed.
    if not yes and not _confirmed(f"State that {dead_host} is dead, so that nothing of guest {found.domain} runs there?"):
        message = f"Nothing was stated about {dead_host}; migration {found.id} goes on as before."
        if output == "json":
            report_json(ExitCode.INTERRUPTED, message, found.id)
        else:
            click.echo(message, err=True)
        raise SystemExit(int(ExitCode.INTERRUPTED))
    run(state_dead, output)


def _confirmed(question: str) -> bool:
    try:
        return click.confirm(printable(question), err=True)
    except click.Abort:  # Ctrl-C, or the end of the input
        click.echo(err=True)
        return False


def _print_resolved(migration: Migration, dead_host: str) -> None:
    """Print where the guest runs now, and what will happen to the copy on the dead host."""
    click.echo(printable(f"{migration.whereabouts.sentence}; {dead_host} was declared dead"))
    click.echo(
        printable(
            f'If {dead_host} comes back, its agent pauses or removes its copy of "{migration.domain}": '
            + with_server(f"look for it with `drover domain list --host {dead_host}`, undefine it there, and never start it.")
        )
    )


async def _ended(session: Session, migration: Migration) -> Migration:
    """Return the migration as it ended: failing is no error here, as the user cancelled it.

    Raises:
        OutcomeUnknown: it has not ended within `CANCEL_SECONDS`.
    """
    if migration.state.ended:
        return migration
    try:
        return await session.client.wait(migration.id, timeout=CANCEL_SECONDS)
    except MigrationFailed as error:
        if error.migration is None:
            raise
        return error.migration
    except DeadlineExceeded as error:
        last = error.migration or migration
        waits = f", waiting for {last.waiting_for}" if last.waiting_for else ""
        raise OutcomeUnknown(f"{error.message}{waits}", reason=error.reason, migration=last) from None
