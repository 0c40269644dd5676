"""``drover network list|show|add|set|grant|revoke|remove``"""

from typing import TYPE_CHECKING, Any, cast

import click

from agent.runtime.units import rate
from coordinator.cli.parse import rate_option
from coordinator.cli.session import remove_named, show_list, show_one
from coordinator.cli.show import output_option, print_pairs, print_table
from coordinator.client import ClusterNetwork, NetworkDetails

if TYPE_CHECKING:
    from coordinator.client.networks import Rules

_RATES = {
    "capacity": 'Line speed of each host on it, such as 10Gbit/s; "none": as its interface reports.',
    "cap": 'Most of all migrations together; "none": no cap.',
    "max-bandwidth": 'Most of one migration; "none": no maximum.',
    "default-bandwidth": 'Limit of a migration that names none; "none": no limit.',
}


def rules_options(command: Any) -> Any:
    """Add the options of a network's rules."""
    decorators = (
        click.option(
            "--cidr", "cidrs", multiple=True, metavar="RANGE", help="Range of its addresses, such as 10.92.0.0/24; repeatable."
        ),
        click.option(
            "--tenant",
            "tenants",
            multiple=True,
            metavar="TENANT",
            help='Tenant whose guests may use it; repeatable; "none": all guests.',
        ),
        click.option(
            "--fallback/--no-fallback",
            default=None,
            help="It carries guests' memory, with a warning, where no network with the migration role can.",
        ),
        *(rate_option(f"--{name}", text) for name, text in _RATES.items()),
    )
    for decorator in reversed(decorators):
        command = decorator(command)
    return command


def _rules(cidrs: tuple[str, ...], tenants: tuple[str, ...], **others: Any) -> "Rules":
    """Return the rules that were given."""
    rules = {name: value for name, value in others.items() if value is not None}
    if cidrs:
        rules["cidrs"] = cidrs
    if tenants:
        rules["tenants"] = () if tenants == ("none",) else tenants
    return cast("Rules", rules)


@click.group()
def network() -> None:
    """List, show, add, change and remove the networks of the cluster."""


@network.command("list")
@output_option
def list_networks(output: str) -> None:
    """List networks by name."""

    nothing = "no networks: each host uses those of its agent's configuration"
    header = ("NAME", "ROLE", "RANGES", "TENANTS", "CAP", "MAX")
    show_list(output, "networks", lambda session: session.client.networks.list(), header, _row, nothing)


def _row(network: ClusterNetwork) -> tuple[str, ...]:
    ranges, tenants = ",".join(network.cidrs), ",".join(network.tenants)
    return (network.name, _role(network), ranges, tenants, _limit(network.cap), _limit(network.max_bandwidth))


def _role(network: ClusterNetwork) -> str:
    role = "migration" if network.migration_role else ""
    return ",".join(filter(None, ("revoking" if network.revoking else role, "fallback" if network.fallback else "")))


def _limit(limit: int) -> str:
    return rate(limit) if limit else ""


@network.command()
@click.argument("name", metavar="NETWORK")
@output_option
def show(name: str, output: str) -> None:
    """Show a network: its rules, its hosts, and the migrations that use it."""

    show_one(output, lambda session: session.client.networks.get(name), _print_details)


def _print_network(network: ClusterNetwork) -> None:
    print_pairs(
        [
            ("name", network.name),
            ("role", _role(network) or "none"),
            ("ranges", ", ".join(network.cidrs)),
            ("tenants", ", ".join(network.tenants)),
            ("capacity", _limit(network.capacity)),
            ("cap", _limit(network.cap)),
            ("max bandwidth", _limit(network.max_bandwidth)),
            ("default bandwidth", _limit(network.default_bandwidth)),
        ]
    )


def _print_details(details: NetworkDetails) -> None:
    _print_network(details.network)
    rows = [
        (
            h.host,
            h.address,
            h.interface,
            str(h.mtu or ""),
            _limit(h.line_rate),
            "down" if h.down else "up",
            rate(h.out_rate),
            rate(h.in_rate),
        )
        for h in details.hosts
    ]
    print_table(("HOST", "ADDRESS", "INTERFACE", "MTU", "LINE", "STATE", "OUT", "IN"), rows)
    if not rows:
        click.echo("no host has an address on it", err=True)
    if details.migration_ids:
        click.echo(f"used by {len(details.migration_ids)}: {', '.join(each[:8] for each in details.migration_ids[:16])}")


@network.command()
@click.argument("name", metavar="NETWORK")
@click.option("--migration", is_flag=True, help="Give it the migration role at once.")
@rules_options
@output_option
def add(name: str, migration: bool, output: str, **rules: Any) -> None:
    """Add a network to the cluster. Hosts with an address in its ranges are on it; guests' memory needs the migration role."""
    if not rules["cidrs"]:
        raise click.UsageError("give its address range: --cidr 10.92.0.0/24")
    show_one(output, lambda session: session.client.networks.add(name, migration_role=migration, **_rules(**rules)), _print_network)


@network.command("set")
@click.argument("name", metavar="NETWORK")
@rules_options
@output_option
def set_(name: str, output: str, **rules: Any) -> None:
    """Change rules of a network. What is given replaces what was there; running migrations get their new shares at once."""
    if not _rules(**rules):
        raise click.UsageError("nothing to change: give at least one option")
    show_one(output, lambda session: session.client.networks.set(name, **_rules(**rules)), _print_network)


@network.command()
@click.argument("name", metavar="NETWORK")
@output_option
def grant(name: str, output: str) -> None:
    """Give a network the migration role: it may carry guests' memory."""
    show_one(output, lambda session: session.client.networks.grant(name), _print_network)


@network.command()
@click.argument("name", metavar="NETWORK")
@click.option("--drain", is_flag=True, help="If migrations use it, take no new one, and take the role once they have ended.")
@output_option
def revoke(name: str, drain: bool, output: str) -> None:
    """Take the migration role from a network. Refused while a migration uses it, unless --drain is given."""
    show_one(output, lambda session: session.client.networks.revoke(name, drain=drain), _print_network)


@network.command()
@click.argument("name", metavar="NETWORK")
@output_option
def remove(name: str, output: str) -> None:
    """Remove a network that no migration uses."""

    remove_named(output, name, lambda session: session.client.networks.remove(name))
