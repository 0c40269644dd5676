"""Runs the part of a command that talks to the server, in one event loop; errors and Ctrl-C become messages and exit codes."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import click

from coordinator.cli.exit_codes import ExitCode
from coordinator.cli.show import Stage, exit_code, print_json, print_table, report, report_json, to_json, with_server
from coordinator.cli.text import printable
from coordinator.client import Client, DroverClientError, NotFound

T = TypeVar("T")

MIN_PREFIX = 4
"""Length of the shortest beginning of an id that is accepted for the id."""


class Session:
    """One run of a command: the client, and the migration that messages about errors and Ctrl-C name."""

    def __init__(self, client: Client, output: str) -> None:
        self.client = client
        self.output = output
        self.migration_id = ""
        """Empty until the id is known; `migrate` sets it before it starts the migration."""
        self.stage = Stage.ASKING

    async def full_id(self, text: str) -> str:
        """Return the id that begins with `text`. A complete id is returned unchecked.

        Raises:
            click.UsageError: several ids begin with it, or it is too short (an unset variable in a script makes it empty).
            NotFound: no id begins with it.
        """
        text = text.lower()
        if len(text) < MIN_PREFIX:
            raise click.UsageError(f'"{text}" is too short for an id; give at least its first {MIN_PREFIX} characters')
        if len(text) == 36:
            self.migration_id = text
            return text
        known = [migration.id for migration in await self.client.list_migrations(limit=1000)]
        matches = [migration_id for migration_id in known if migration_id.startswith(text)]
        if not matches:
            raise NotFound(f'no migration with an id that begins with "{text}"', reason="MIGRATION_NOT_FOUND")
        if len(matches) > 1:
            shown = ", ".join(matches[:5]) + (", …" if len(matches) > 5 else "")
            raise click.UsageError(f'"{text}" is the beginning of {len(matches)} ids: {shown}')
        self.migration_id = matches[0]
        return matches[0]


def whoami() -> str:
    """Return who runs this command, as hosts record it."""
    import getpass  # noqa: PLC0415 - only a change of settings and a statement need it
    import socket  # noqa: PLC0415

    return f"{getpass.getuser()}@{socket.gethostname()}"


def run(body: Callable[[Session], Awaitable[int | None]], output: str) -> None:
    """Run `body` against the server of the command line; exit with the code that it returns (None: 0)."""
    raise SystemExit(int(ask(body, output) or ExitCode.DONE))


def show_one(output: str, call: Callable[[Session], Awaitable[Any]], print_it: Callable[[Any], None]) -> None:
    """Run a call, and print the value of the client's that it returns: as JSON, or by `print_it`."""

    async def body(session: Session) -> None:
        value = await call(session)
        if output == "json":
            print_json(to_json(value.proto))
        else:
            print_it(value)

    run(body, output)


def show_list(
    output: str,
    kind: str,
    call: Callable[[Session], Awaitable[Sequence[Any]]],
    header: Sequence[str],
    row: Callable[[Any], Sequence[str]],
    nothing: str = "",
    notes: Callable[[Any], Sequence[str]] = lambda _: (),
) -> None:
    """Run a call, and print the values of the client's that it returns: as JSON, or as a table with `notes` to each; `nothing` if
    there are none."""

    async def body(session: Session) -> None:
        values = await call(session)
        if output == "json":
            print_json({kind: [to_json(value.proto) for value in values]})
            return
        print_table(header, [row(value) for value in values])
        if not values:
            click.echo(printable(nothing or f"no {kind}"), err=True)
        for note in (note for value in values for note in notes(value)):
            click.echo(printable(note), err=True)

    run(body, output)


def remove_named(output: str, name: str, call: Callable[[Session], Awaitable[None]]) -> None:
    """Run a call that removes something of that name, and print that."""

    async def body(session: Session) -> None:
        await call(session)
        if output == "json":
            print_json({"removed": name})
        else:
            click.echo(printable(f"{name} was removed"))

    run(body, output)


def ask(body: Callable[[Session], Awaitable[T]], output: str) -> T:
    """Run `body` against the server of the command line and return its result. Reports an error or Ctrl-C, then exits."""
    server = click.get_current_context().find_root().obj
    session = Session(Client(server), output)

    async def whole() -> T:
        async with session.client:
            return await body(session)

    try:
        return asyncio.run(whole())
    except DroverClientError as error:
        report(error, output, session.migration_id, session.stage, server)
        code = exit_code(error)
    except click.UsageError as error:
        if output != "json":
            raise
        code = ExitCode.USAGE
        report_json(code, error.message, session.migration_id, reason="INVALID_FIELD")
    except KeyboardInterrupt:
        code = ExitCode.INTERRUPTED
        message = _INTERRUPTED[session.stage]
        if output == "json":
            report_json(code, message, session.migration_id)
        else:
            _print_interrupted(session, message)
    raise SystemExit(int(code))


_INTERRUPTED = {
    Stage.ASKING: "Stopped waiting for an answer.",
    Stage.STARTING: "Stopped waiting; the migration may have been started.",
    Stage.WATCHING: "Stopped watching; the migration goes on.",
}


def _print_interrupted(session: Session, message: str) -> None:
    if session.stage is Stage.ASKING:
        return
    click.echo(
        with_server(
            f"\n{message}\n"
            f"  watch it:   drover migration watch {session.migration_id}\n"
            f"  cancel it:  drover migration cancel {session.migration_id}"
        ),
        err=True,
    )
