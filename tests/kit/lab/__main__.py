"""`scripts/lab`: the lab by hand. `status -o json` shows everything as JSON."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from tests.kit.lab.errors import LabError
from tests.kit.lab.hosts import Node
from tests.kit.lab.lab import STATE, Lab, known_labs, take_down
from tests.kit.lab.settings import SETTINGS, VARIABLE

F = TypeVar("F", bound=Callable[..., Any])


class Group(click.Group):
    """A group that reports the lab's errors as a message with exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except LabError as error:
            raise click.ClickException(str(error)) from error


def lab_options(command: F) -> F:
    """Add --id and --state, which every command takes."""
    where = click.option("--state", type=click.Path(path_type=Path), default=STATE, show_default=True, help="Folder of all labs.")
    which = click.option("--id", "lab_id", default="lab", show_default=True, help="Which lab: 1-10 of a-z and 0-9.")
    return which(where(command))


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Test hosts on this machine: network namespaces, bridges and a libvirtd each. Needs root."""


@main.command()
@lab_options
@click.option("--hosts", type=int, default=2, show_default=True, help="How many hosts: h1, h2, …")
@click.option("--networks", type=int, default=1, show_default=True, help="How many migration networks: mig1, …")
@click.option("--setting", type=click.Choice(list(SETTINGS)), help=f"Configuration of libvirt. Default: ${VARIABLE}, else stock.")
def up(lab_id: str, state: Path, hosts: int, networks: int, setting: str | None) -> None:
    """Bring a lab up; return when all of it is ready, and leave it running."""
    lab = Lab.up(lab_id, hosts, networks, state, setting)
    _show(lab)


@main.command()
@lab_options
@click.option("--all", "everything", is_flag=True, help="All labs of this machine.")
def down(lab_id: str, state: Path, everything: bool) -> None:
    """End every process of a lab and remove its namespaces and files, also after a crash. Safe to repeat."""
    for name in known_labs(state) if everything else [lab_id]:
        take_down(name, state)
        click.echo(f"lab {name} is down")


@main.command()
@lab_options
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", show_default=True)
def status(lab_id: str, state: Path, output: str) -> None:
    """Show a lab's hosts, addresses and guests. Exit code 1 if there is no such lab."""
    lab = Lab.attach(lab_id, state)
    if output == "json":
        click.echo(json.dumps({"id": lab.id, "path": str(lab.path), "nodes": [_node(node) for node in lab.nodes]}))
    else:
        _show(lab)


@main.command(name="list")
@lab_options
def list_labs(lab_id: str, state: Path) -> None:
    """List the ids of all labs on this machine, also of those that a crash left incomplete."""
    for name in known_labs(state):
        click.echo(name)


@main.command()
@lab_options
@click.argument("host")
def shell(lab_id: str, state: Path, host: str) -> None:
    """Open a shell inside HOST (h1, h2, … or co)."""
    _become(Lab.attach(lab_id, state).node(host), [os.environ.get("SHELL", "/bin/sh")])


@main.command(name="exec", context_settings={"ignore_unknown_options": True})
@lab_options
@click.argument("host")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def execute(lab_id: str, state: Path, host: str, command: tuple[str, ...]) -> None:
    """Run COMMAND inside HOST: lab exec h1 -- virsh list."""
    _become(Lab.attach(lab_id, state).node(host), list(command))


def _become(node: Node, argv: list[str]) -> None:
    words = node.inside(argv)
    sys.stdout.flush()
    os.execvp(words[0], words)


def _node(node: Node) -> dict[str, Any]:
    """Return a node as plain data."""
    known: dict[str, Any] = {"name": node.name, "up": node.init_pid is not None, "addresses": dict(node.addresses)}
    return known | node.details()


def _show(lab: Lab) -> None:
    click.echo(f"lab {lab.id} in {lab.path}")
    for node in lab.nodes:
        data = _node(node)
        addresses = "  ".join(f"{name} {address}" for name, address in data["addresses"].items())
        click.echo(f"  {node.name:4} {'up  ' if data['up'] else 'DOWN'} {addresses}")
        if "libvirt_uri" in data:
            running = ", ".join(f"{guest['guest']} (pid {guest['pid']})" for guest in data["guests"]) or "none"
            click.echo(f"       {data['libvirt_uri']}  libvirtd {data['libvirtd_pid'] or 'DOWN'}  guests: {running}")


if __name__ == "__main__":
    main(prog_name="lab")
