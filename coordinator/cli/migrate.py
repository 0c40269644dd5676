"""``drover migrate``"""

import re
import uuid
from typing import TYPE_CHECKING, Any, cast

import click

from coordinator.cli.exit_codes import EPILOG
from coordinator.cli.parse import OptionValue, Rate, Seconds
from coordinator.cli.session import Session, run
from coordinator.cli.show import Stage, output_option, print_json, to_json, with_server

if TYPE_CHECKING:
    from agent.hypervisor.options import Options, Value
    from coordinator.client.request import WaitMode

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")

MOST_WAIT = 7 * 86400
"""Longest wait for slots, in seconds."""


def _host(ctx: click.Context, param: click.Parameter, value: str | None) -> str:
    if value == "":
        raise click.BadParameter("the name is empty; leave it out for any host", ctx, param)
    return value or ""


def _migration_id(ctx: click.Context, param: click.Parameter, value: str | None) -> str:
    if value is None:
        return str(uuid.uuid4())
    if not _UUID.fullmatch(value.lower()):
        raise click.BadParameter(f'"{value}" is not a UUID', ctx, param)
    return value.lower()


@click.command(epilog=EPILOG)
@click.argument("domain")
@click.option(
    "--to",
    "destination",
    metavar="HOST",
    callback=_host,
    help="Destination host (on an agent: a peer, or its address). Default: any host that can take the guest.",
)
@click.option("--from", "source", metavar="HOST", default="", help="Source host. Default: the host that has the guest.")
@click.option("--name", metavar="NEW", default="", help="Name of the guest at the destination. Default: unchanged.")
@click.option("--network", metavar="NETWORK", default="", help="Network for the guest's memory. Default: chosen by Drover.")
@click.option("--uri", metavar="URI", default="", help="Migration URI at the destination. Default: the destination's proposal.")
@click.option(
    "--bandwidth", type=Rate(), default=0, metavar="RATE", help="Limit of the transfer's rate, such as 100MiB/s or 1Gbit/s."
)
@click.option("--min-bandwidth", type=Rate(), default=0, metavar="RATE", help="Least rate that is guaranteed, or it is refused.")
@click.option(
    "--max-downtime",
    type=Seconds(most=3600),
    default=0.0,
    metavar="DURATION",
    help="Longest pause of the guest at the switch-over, such as 300ms. Default: the hypervisor's own.",
)
@click.option("--tenant", metavar="TENANT", default="", help="Tenant of the guest. Default: that of the guest's own settings.")
@click.option(
    "--option",
    "chosen",
    type=OptionValue(),
    multiple=True,
    metavar="NAME=VALUE",
    help="Set an option, such as live=off; repeatable. docs/protocol.md lists them.",
)
@click.option(
    "--id", "migration_id", metavar="UUID", callback=_migration_id, help="Id of the migration; repeat a request with its id safely."
)
@click.option(
    "--wait",
    "slot_wait",
    type=Seconds(most=MOST_WAIT),
    is_flag=False,
    flag_value=float(MOST_WAIT),
    default=0.0,
    metavar="[DURATION]",
    help="Wait for the slots of busy hosts (also while one is away), for at most DURATION, such as --wait=10min; without a DURATION "
    "for 7d. Default: refuse at once.",
)
@click.option(
    "--wait-mode",
    type=click.Choice(["wait", "fail-fast", "hybrid"]),
    default=None,
    help="fail-fast: refuse at once. wait: in the queues of the hosts. hybrid: the same, but without --to only if all are busy. "
    "Default: wait with --wait, else fail-fast.",
)
@click.option(
    "--importance",
    type=click.Choice(["low", "medium", "high"]),
    default=None,
    help="Its place in queues and its share of the bandwidth. Default: medium.",
)
@click.option("--detach", is_flag=True, help="Return as soon as it is accepted; do not watch.")
@output_option
def migrate(
    domain: str,
    destination: str,
    chosen: "tuple[tuple[str, Value | None], ...]",
    slot_wait: float,
    wait_mode: "WaitMode | None",
    migration_id: str,
    detach: bool,
    output: str,
    **asked: Any,
) -> None:
    """Move the running guest DOMAIN (name or UUID) to another host, or to any, and watch it.

    Ctrl-C ends the watching, not the migration.
    """
    options = cast("Options", {option: value for option, value in dict(chosen).items() if value is not None})

    async def body(session: Session) -> int | None:
        session.migration_id, session.stage = migration_id, Stage.STARTING
        migration = await session.client.start_migration(
            domain,
            destination,
            options=options,
            slot_wait=slot_wait or (MOST_WAIT if wait_mode in ("wait", "hybrid") else 0.0),
            wait_mode=wait_mode,
            migration_id=migration_id,
            **asked,
        )
        from coordinator.cli.follow import follow, print_warnings  # noqa: PLC0415 - now that the migration is under way

        print_warnings(migration.warnings)  # before the guest is touched
        if not detach:
            return await follow(session, migration_id, warned=migration.warnings)
        if output == "json":
            print_json(to_json(migration.proto))
        else:
            click.echo(with_server(f"migration {migration_id} is under way; watch it: drover migration watch {migration_id[:8]}"))
        return None

    run(body, output)
