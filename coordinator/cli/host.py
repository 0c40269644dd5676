"""``drover host list|show|slots|set|cordon|uncordon|remove``"""

from collections.abc import Callable
from typing import Any

import click

from agent.runtime.units import rate, size
from coordinator.cli.parse import LimitValue, once_option
from coordinator.cli.session import remove_named, show_list, show_one, whoami
from coordinator.cli.show import output_option, print_pairs, print_table
from coordinator.cli.units import ago, eta, seconds
from coordinator.client import Host, HostState, SettingsChange, Slot

SKEW_SECONDS = 2.0
"""Smallest difference between two clocks that is shown."""


@click.group()
def host() -> None:
    """List, show and remove hosts, set their limits, close and open them."""


@host.command("list")
@output_option
def list_hosts(output: str) -> None:
    """List hosts by name."""

    header = ("NAME", "STATE", "INCOMING", "OUTGOING", "WAITING", "HYPERVISOR", "NETWORKS", "ADDRESS")
    show_list(output, "hosts", lambda session: session.client.list_hosts(), header, _host_row, notes=_notes)


def _notes(host: Host) -> list[str]:
    silent = [f"{host.name} is unreachable: {host.unreachable_reason}"] if host.unreachable_reason else []
    return [*silent, *([f"warning: the clock of {host.name} is {clock}"] if (clock := _clock(host)) else [])]


def _host_row(host: Host) -> tuple[str, ...]:
    used = (f"{host.incoming_in_use}/{host.incoming_limit}", f"{host.outgoing_in_use}/{host.outgoing_limit}")
    networks = ",".join(network.name for network in host.networks if "migration" in network.roles)
    waiting = str(host.incoming_queue + host.outgoing_queue)
    return (host.name, _state(host), *used, waiting, host.hypervisor, networks, host.address)


def _clock(host: Host) -> str:
    """Return how the host's wall clock differs from the coordinator's; empty if by less than `SKEW_SECONDS`, or unknown."""
    skew = host.clock_skew or 0.0
    if abs(skew) < SKEW_SECONDS:
        return ""
    return f"{seconds(abs(skew))} {'ahead of' if skew > 0 else 'behind'} the coordinator's: check the time service of both"


def _state(host: Host) -> str:
    """Return the state of the host; of one that is up also that it is closed for automatic use, or stops."""
    if host.state is not HostState.UP:
        return host.state.value
    return "draining" if host.draining else "cordoned" if host.cordoned else host.state.value


@host.command()
@click.argument("name")
@output_option
def show(name: str, output: str) -> None:
    """Show one host: its hypervisor, networks and capabilities."""

    show_one(output, lambda session: session.client.get_host(name), _print_host)


@host.command()
@click.argument("name")
@output_option
def remove(name: str, output: str) -> None:
    """Forget a host that does not answer. It comes back when its agent registers again."""

    remove_named(output, name, lambda session: session.client.remove_host(name))


def _print_host(host: Host) -> None:
    by_support: dict[str, list[str]] = {}
    for option, support in sorted(host.option_support.items()):
        by_support.setdefault(support, []).append(option)
    print_pairs(
        [
            ("name", host.name),
            ("state", _state(host)),
            ("because", host.unreachable_reason),
            ("address", host.address),
            ("last seen", ago(host.last_seen_age, by_wall_clock=host.last_seen_by_wall_clock)),
            ("clock", _clock(host)),
            ("hypervisor", f"{host.hypervisor} ({host.driver})"),
            ("agent", host.agent_version),
            *_limits(host),
            ("limits set", _change(host.settings_change)),
            ("cordoned", f"{_change(host.cordon_change)} (only a migration that names it may choose it)" if host.cordoned else ""),
            ("transports", ", ".join(host.uri_transports)),
            ("bandwidth limit", "yes" if host.bandwidth else "no"),
            ("split phases", "yes" if host.split_phases else "no: whole migrations only"),
            *((support.replace("_", " "), ", ".join(options)) for support, options in sorted(by_support.items())),
            *((("coordinators", "; ".join(host.proto.host.coordinators)),) if len(host.proto.host.coordinators) > 1 else ()),
            *((f"no {option}", why) for option, why in sorted(host.option_reasons.items())),
        ]
    )
    rows = [(n.name, n.address, ",".join(n.roles), _line(n.line_rate)) for n in host.networks]
    print_table(("NETWORK", "ADDRESS", "ROLES", "LINE"), rows)
    links = [(i.name, ",".join(i.addresses), str(i.mtu), _line(i.line_rate), "up" if i.up else "down") for i in host.interfaces]
    print_table(("INTERFACE", "ADDRESSES", "MTU", "LINE", "STATE"), links)


def _line(line_rate: int) -> str:
    return rate(line_rate) if line_rate else ""


def _limits(host: Host) -> list[tuple[str, str]]:
    """Return the limits of a host as lines, with what is in use and how many wait, and what a special value means."""
    incoming = _limit(host.incoming_in_use, host.incoming_limit, host.incoming_queue, "closed: no guest can come in")
    outgoing = _limit(host.outgoing_in_use, host.outgoing_limit, host.outgoing_queue, "closed: no guest can leave")
    unit = f"; one unit is {size(host.unit_memory)} of memory" if host.unit_memory else ""
    return [("incoming", incoming), ("outgoing", outgoing), ("prepared", f"{host.prepared_limit} beside those, each way{unit}")]


def _limit(in_use: int, limit: int, queue: int, closed: str) -> str:
    text = f"{in_use} of {limit} slots in use, {queue} waiting"
    if limit == 0:
        return f"{text} ({closed})"
    return f"{text} (above the limit: they go on, and no further one starts before)" if in_use > limit else text


def _change(change: SettingsChange | None) -> str:
    """Return who made a change, when and why; empty if nobody has."""
    if change is None or change.changed is None:
        return ""
    when = change.changed.strftime("%Y-%m-%d %H:%M:%S UTC")
    return f"by {change.changed_by or 'an unknown caller'} at {when}{': ' if change.comment else ''}{change.comment}"


comment_option = click.option("--comment", metavar="TEXT", default="", help="Why, for whoever looks at the host.")


def limit_option(name: str, meaning: str) -> Callable[[Any], Any]:
    text = f'{meaning} "default": as in its configuration file.'
    return once_option(name, metavar="N", text=text, kind=LimitValue())


@host.command("set")
@click.argument("name", metavar="HOST")
@limit_option("--incoming-limit", "Most guests that come in at once; 0 closes the host for them.")
@limit_option("--outgoing-limit", "Most guests that leave at once; 0: none leaves.")
@limit_option("--prepared-limit", "Most migrations in each direction that are prepared beside those.")
@comment_option
@output_option
def set_(name: str, comment: str, output: str, **limits: Any) -> None:
    """Change limits of a host while it runs. They last until they are changed again.

    Lowering a limit ends nothing: what is above it goes on to its end. Limits are in units: a guest takes one, or more where the
    host counts by memory.
    """
    if all(limit is None for limit in limits.values()):
        raise click.UsageError("nothing to change: give --incoming-limit, --outgoing-limit or --prepared-limit")
    _update(name, output, comment=comment, **limits)


@host.command()
@click.argument("name", metavar="HOST")
@comment_option
@output_option
def cordon(name: str, comment: str, output: str) -> None:
    """Close a host for automatic use: no migration to any host chooses it. One that names it still works."""
    _update(name, output, comment=comment, cordoned=True)


@host.command()
@click.argument("name", metavar="HOST")
@comment_option
@output_option
def uncordon(name: str, comment: str, output: str) -> None:
    """Open a host for automatic use again."""
    _update(name, output, comment=comment, cordoned=False)


def _update(name: str, output: str, **changes: Any) -> None:
    show_one(output, lambda session: session.client.update_host(name, changed_by=whoami(), **changes), _print_settings)


def _print_settings(host: Host) -> None:
    cordoned = "cordoned" if host.cordoned else "uncordoned"
    limits = [*_limits(host), ("limits set", _change(host.settings_change))]
    print_pairs([("name", host.name), *limits, (cordoned, _change(host.cordon_change))])


@host.command()
@click.argument("name", metavar="HOST")
@output_option
def slots(name: str, output: str) -> None:
    """Show which migrations hold the slots of a host, and which wait for one, in their order."""

    header = ("DIRECTION", "PLACE", "MIGRATION", "KIND", "PEER", "IMPORTANCE", "COST", "FOR", "TURN IN")
    nothing = f"no migration holds or waits for a slot of {name}"
    show_list(output, "slots", lambda session: session.client.list_slots(name), header, _slot_row, nothing)


def _slot_row(slot: Slot) -> tuple[str, ...]:
    importance = "medium" if slot.importance == "unspecified" else slot.importance
    since = seconds(slot.age) if slot.age is not None else ""
    turn = eta(slot.estimate_low, slot.estimate_high) or "unknown" if slot.waiting else ""
    place = str(slot.position) if slot.waiting else "holds"
    return (slot.direction, place, slot.migration_id[:8], slot.kind, slot.peer, importance, str(slot.cost or ""), since, turn)
