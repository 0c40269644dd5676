"""``drover agent`` and ``drover coordinator``. Each imports only its own daemon."""

import importlib

import click

from coordinator.cli.exit_codes import ExitCode

config_option = click.option(
    "--config", metavar="FILE", required=True, type=click.Path(exists=True, dir_okay=False), help="Configuration (TOML)."
)


@click.command()
@config_option
def agent(config: str) -> None:
    """Run the agent of this host until SIGTERM. Guests and migrations go on without it."""
    _run("agent.main", config)


@click.command()
@config_option
def coordinator(config: str) -> None:
    """Run the coordinator of a cluster until SIGTERM."""
    _run("coordinator.main", config)


def _run(module: str, config: str) -> None:
    config_error = importlib.import_module("agent.runtime.configuration").ConfigError
    address_error = importlib.import_module("agent.service.server").AddressError
    drover_error = importlib.import_module("agent.runtime.errors").DroverError  # a journal or store that cannot be used
    try:
        importlib.import_module(module).run(config)
    except (config_error, address_error, drover_error) as error:
        click.echo(f"{click.style('error', fg='red', bold=True)}: {error}", err=True)
        raise SystemExit(ExitCode.USAGE) from None
