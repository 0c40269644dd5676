"""The command ``drover``. Each command's module is imported when it is used, so that ``drover --help`` is quick."""

import contextlib
import gc
import importlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import click
from click.shell_completion import CompletionItem

from coordinator.cli.exit_codes import EPILOG, ExitCode
from coordinator.cli.text import printable

COMMANDS: dict[str, tuple[str, str]] = {
    "migrate": ("coordinator.cli.migrate:migrate", "Move a running guest to another host, and watch it."),
    "migration": ("coordinator.cli.migration:migration", "List, show, watch, change, cancel and resolve migrations."),
    "host": ("coordinator.cli.host:host", "List and show hosts, set their limits, close and open them."),
    "domain": ("coordinator.cli.domain:domain", "List guests, and write their settings."),
    "network": ("coordinator.cli.network:network", "List, show, add, change and remove the networks of the cluster."),
    "agent": ("coordinator.cli.daemons:agent", "Run the agent of this host."),
    "coordinator": ("coordinator.cli.daemons:coordinator", "Run the coordinator of a cluster."),
    "completion": ("coordinator.cli.completion:completion", "Print shell completion for bash, zsh or fish."),
}
"""Command name -> (``module:attribute``, help in one line)."""

# gRPC's core reads this when it is loaded. At its default level it writes the text of a peer's GOAWAY to stderr unescaped.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

DAEMONS = ("agent.main", "coordinator.main")
"""Modules that run as daemons."""

NEEDLESS = ("ssl",)
"""Modules that asyncio imports only if they exist. Hiding them saves a tenth of a command's start; gRPC brings its own TLS."""

DEFAULT_SERVER = "unix:/run/drover/coordinator.sock"


class LazyGroup(click.Group):
    """A group that knows its commands by name and imports a command only to run it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        gc.disable()  # `coordinator.command` has done so already, if the program was started through it
        try:
            with _without(NEEDLESS):
                command: click.Command = getattr(importlib.import_module(module), attribute)
        finally:
            gc.freeze()
            gc.enable()
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            # The message may quote a name chosen by a server or by a guest's owner.
            raise click.UsageError(printable(error.format_message()), error.ctx) from None
        except BrokenPipeError:
            # The reader of the output closed it, as in "| head". Python flushes stdout once more at exit: send that to /dev/null.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(int(ExitCode.PIPE_CLOSED)) from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        items = [CompletionItem(name, help=text) for name, (_, text) in COMMANDS.items() if name.startswith(incomplete)]
        return items + click.Command.shell_complete(self, ctx, incomplete)


@contextlib.contextmanager
def _without(modules: tuple[str, ...]) -> Iterator[None]:
    """Make importing those `modules` that are not imported yet fail until the context ends."""
    kept_out = [name for name in modules if name not in sys.modules]
    sys.modules.update(dict.fromkeys(kept_out))  # type: ignore[arg-type]  # None: "there is no such module"
    try:
        yield
    finally:
        for name in kept_out:
            del sys.modules[name]


def _check_server(ctx: click.Context, param: click.Parameter, value: str) -> str:
    # Imported here, not at the top: help and completion need no addresses.
    parse_address: Any = importlib.import_module("agent.runtime.address").parse_address
    try:
        parse_address(value)
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, param) from None
    return value


@click.group(cls=LazyGroup, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--server",
    metavar="ADDRESS",
    envvar="DROVER_SERVER",
    default=DEFAULT_SERVER,
    show_default=True,
    show_envvar=True,
    callback=_check_server,
    help="Address of the coordinator, or of one agent (its own guests only, peer to peer): unix:/path or ip:port.",
)
@click.version_option(package_name="drover", message="drover %(version)s")
@click.pass_context
def main(ctx: click.Context, server: str) -> None:
    """Move running virtual machines between KVM hosts."""
    ctx.obj = server


def run() -> None:
    """Run `main` as a program. A command exits without the interpreter's cleanup of gRPC's modules, which takes a quarter as long
    as importing them. A daemon exits as any program does.
    """
    try:
        main(prog_name="drover")
    except SystemExit as ended:
        if not isinstance(ended.code, int) or any(daemon in sys.modules for daemon in DAEMONS):
            raise
        with contextlib.suppress(BrokenPipeError):  # `LazyGroup.invoke` has handled a closed output already
            sys.stdout.flush()
        os._exit(ended.code)
