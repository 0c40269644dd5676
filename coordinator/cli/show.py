"""Output: aligned text for people, proto JSON for programs. Errors go to stderr in the same form."""

import re
import shlex
from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource
from google.protobuf.message import Message

from coordinator.cli.exit_codes import ExitCode
from coordinator.cli.text import dump_json, printable
from coordinator.cli.units import seconds
from coordinator.client import (
    Busy,
    DroverClientError,
    InvalidRequest,
    MigrationFailed,
    NotFound,
    OutcomeUnknown,
    Refused,
    Unreachable,
)

if TYPE_CHECKING:
    from coordinator.client import Migration

output_option = click.option(
    "-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True, help="Form of the output."
)

STATE_COLORS = {
    "succeeded": "green",
    "up": "green",
    "running": "green",
    "failed": "red",
    "crashed": "red",
    "unreachable": "red",
    "outcome_unknown": "red",
    "cancelled": "yellow",
    "cancelling": "yellow",
    "paused": "yellow",
    "cordoned": "yellow",
    "draining": "yellow",
}


def to_json(message: Message) -> dict[str, Any]:
    """Return `message` as stable JSON: names as in the protos, defaults included, 64-bit integers as strings (as in proto JSON)."""
    from google.protobuf.json_format import MessageToDict  # noqa: PLC0415 - slow to import, and only JSON needs it

    return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


def print_json(document: Any, *, line: bool = False) -> None:
    click.echo(dump_json(document, indent=None if line else 2))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print columns as wide as their content, whatever the terminal's width; nothing without rows. Colours on a terminal only."""
    if not rows:
        return
    cells = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    click.echo(click.style(_aligned(header, widths), bold=True))
    for row in cells:
        click.echo(_aligned(row, widths, STATE_COLORS))


def _aligned(row: Sequence[str], widths: Sequence[int], colors: dict[str, str] | None = None) -> str:
    padded = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
    padded[-1] = padded[-1].rstrip()
    return "  ".join(
        click.style(text, fg=color) if colors and (color := colors.get(cell)) else text
        for cell, text in zip(row, padded, strict=True)
    )


def print_pairs(pairs: Sequence[tuple[str, str]]) -> None:
    """Print one name and value a line; leaves out empty values."""
    width = max((len(name) for name, _ in pairs), default=0)
    for name, value in pairs:
        if value:
            click.echo(f"{name.ljust(width)}  {printable(value)}")


_COMMAND = re.compile(r"\bdrover (?=(migrate|migration|host|domain|network)\b)")


def with_server(text: str) -> str:
    """Return `text` with this command's `--server`, if it has one, added to the commands that the text suggests: a server that
    suggests a command does not know the address by which it was reached.
    """
    root = click.get_current_context().find_root()
    if root.get_parameter_source("server") is not ParameterSource.COMMANDLINE:
        return text
    return _COMMAND.sub(lambda _: f"drover --server {shlex.quote(root.obj)} ", text)


_EXIT: tuple[tuple[type[DroverClientError], ExitCode], ...] = (
    (OutcomeUnknown, ExitCode.UNKNOWN),
    (MigrationFailed, ExitCode.FAILED),
    (Unreachable, ExitCode.UNREACHABLE),
    (Refused, ExitCode.REFUSED),
    (NotFound, ExitCode.REFUSED),
    (InvalidRequest, ExitCode.REFUSED),
)


_UNTOUCHED = ("BUSY", "HOST_CLOSED", "NO_HOST", "PATH_NOT_PROVED")
"""Refused before the guest was touched, also where a migration was there."""


def exit_code(error: DroverClientError) -> ExitCode:
    if error.migration is not None and lost_or_stuck(error.migration):
        return ExitCode.UNKNOWN
    waited_in_vain = error.migration is not None and error.migration.waited_in_vain
    if error.reason in _UNTOUCHED or waited_in_vain:
        return ExitCode.REFUSED
    return next((code for kind, code in _EXIT if isinstance(error, kind)), ExitCode.UNKNOWN)


class Stage(StrEnum):
    """What the command was doing when it ended early: the advice depends on it."""

    ASKING = "asking"
    STARTING = "starting"
    WATCHING = "watching"


def report(error: DroverClientError, output: str, migration_id: str, stage: Stage, server: str) -> None:
    """Print the error on stderr: what happened, where the guest runs, what to type next."""
    code = exit_code(error)
    if output == "json":
        report_json(code, error.message, migration_id, reason=error.reason, error=error)
        return
    failure = error.migration.failure if error.migration else None  # its message leaves out the guest's place, printed below
    happened = failure.message if failure and failure.message in error.message else error.message
    click.echo(f"{click.style('error', fg='red', bold=True)}: {printable(with_server(happened))}", err=True)
    others = [("also", other.message) for other in error.migration.other_failures] if error.migration else []
    for name, value in (*others, ("guest", _where(error, stage, server)), ("next", _next(error, migration_id, stage, server))):
        if value:
            click.echo(f"  {name}: {printable(with_server(value))}", err=True)


def report_json(
    code: ExitCode, message: str, migration_id: str, *, reason: str = "", error: DroverClientError | None = None
) -> None:
    """Print an error on stderr as JSON, in one form for all. `reason` is empty if the user ended it: Ctrl-C, "no" to a question."""
    migration = error.migration if error else None
    document = {
        "reason": reason,
        "message": message,
        "metadata": dict(error.metadata) if error else {},
        "also": [other.message for other in migration.other_failures] if migration else [],
        "retry_after_seconds": error.retry_after if error else None,
        "migration_id": migration.id if migration else migration_id,
        "runs_on": migration.runs_on if migration else "",
        "guest": migration.whereabouts.sentence if migration else "",
        "exit_code": int(code),
    }
    click.echo(dump_json({"error": document}), err=True)


def _where(error: DroverClientError, stage: Stage, server: str) -> str:
    migration = error.migration
    if migration is None:
        untouched = stage is Stage.STARTING and (exit_code(error) is ExitCode.REFUSED or _is_of_a_host(error, server))
        return "untouched" if untouched else ""
    return migration.whereabouts.sentence


def lost_or_stuck(migration: "Migration") -> bool:
    """Return whether the migration has ended but its guest runs nowhere, or is paused though nobody asked for that."""
    return migration.state.ended and not migration.whereabouts.usual


def _is_of_a_host(error: DroverClientError, server: str) -> bool:
    """Return whether the server reported that a host does not answer. If the server itself does not, the client names it: `peer`."""
    return isinstance(error, Unreachable) and error.metadata.get("peer") != f"the server at {server}"


_NEXT_BY_REASON = {
    "DOMAIN_NOT_FOUND": "drover domain list",
    "DOMAIN_NOT_RUNNING": "drover domain list",
    "DOMAIN_EXISTS": "drover domain list, or --name NEW for another name at the destination",
    "DOMAIN_AMBIGUOUS": "drover domain list",
    "HOST_NOT_FOUND": "drover host list",
    "SAME_HOST": "drover host list",
    "MIGRATION_NOT_FOUND": "drover migration list",
    "NETWORK_NOT_FOUND": "drover host show HOST, for the networks of a host",
    "OPTION_UNSUPPORTED": "drover host show HOST, for what a host can do",
    "BANDWIDTH_UNSUPPORTED": "leave --bandwidth out",
    "HOST_CLOSED": "drover host show HOST, for its limits; drover host set HOST --incoming-limit N opens it",
    "NO_HOST": "drover host list, for their limits and states",
}


def _next(error: DroverClientError, migration_id: str, stage: Stage, server: str) -> str:
    """Return what to type, or to do, next; empty if nothing is known."""
    migration_id = error.migration.id if error.migration else migration_id
    others = ", ".join(error.metadata.get("alternatives", "").split(","))
    another = f"choose another host{f' that could take the guest now: {others}' if others else ': drover host list'}"
    if isinstance(error, Busy):
        wait = f"try again in {seconds(error.retry_after)}" if error.retry_after else "try again later"
        return f"{wait}, wait for a slot with --wait, or {another}"
    if error.reason == "HOST_CLOSED" and others:
        return another
    if isinstance(error, OutcomeUnknown):
        return f"do not start the guest by hand; drover migration watch {migration_id}" if migration_id else "ask again"
    if isinstance(error, Unreachable):
        return _next_when_unreachable(error, migration_id, stage, server)
    if error.migration is not None:
        return f"drover migration show {migration_id}"
    if stage is Stage.STARTING and exit_code(error) is ExitCode.UNKNOWN:
        return _next_when_perhaps_started(migration_id)
    return _NEXT_BY_REASON.get(error.reason, "")


def _next_when_perhaps_started(migration_id: str) -> str:
    return (
        f"it may have been started; ask: drover migration show {migration_id}, "
        f"or repeat safely: drover migrate … --id {migration_id}"
    )


def _next_when_unreachable(error: DroverClientError, migration_id: str, stage: Stage, server: str) -> str:
    if stage is Stage.WATCHING:
        return f"the migration goes on: drover migration watch {migration_id}"
    if _is_of_a_host(error, server):
        host = error.metadata.get("host") or error.metadata.get("peer") or "that host"
        silent = error.reason in ("HOST_UNREACHABLE", "DEADLINE_EXCEEDED")
        return f"`systemctl status drover-agent` on {host}; drover host list" if silent else "drover host list"
    where = f"check that a coordinator or agent runs at {server} (--server ADDRESS or DROVER_SERVER sets the address)"
    if stage is Stage.STARTING:  # gRPC reports "Connection refused" also of a server that died during the call
        return f"{where}; {_next_when_perhaps_started(migration_id)}"
    return where
