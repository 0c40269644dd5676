"""``drover host list|show``, ``drover domain list``"""

import click

from coordinator.cli.session import Session, run
from coordinator.cli.show import output_option, print_json, print_pairs, print_table, to_json, with_server
from coordinator.cli.text import printable
from coordinator.cli.units import ago, rate, seconds, size
from coordinator.client import Domain, Host, HostState

SKEW_SECONDS = 2.0
"""Smallest difference between two clocks that is shown."""


@click.group()
def host() -> None:
    """List and show hosts."""


@host.command("list")
@output_option
def list_hosts(output: str) -> None:
    """List hosts by name."""

    async def body(session: Session) -> None:
        hosts = await session.client.list_hosts()
        if output == "json":
            print_json({"hosts": [to_json(host.proto) for host in hosts]})
            return
        print_table(("NAME", "STATE", "INCOMING", "HYPERVISOR", "NETWORKS", "ADDRESS"), [_host_row(host) for host in hosts])
        if not hosts:
            click.echo("no hosts", err=True)
        for host in hosts:
            if host.unreachable_reason:
                click.echo(printable(f"{host.name} is unreachable: {host.unreachable_reason}"), err=True)
            if clock := _clock(host):
                click.echo(printable(f"warning: the clock of {host.name} is {clock}"), err=True)

    run(body, output)


def _host_row(host: Host) -> tuple[str, ...]:
    networks = ",".join(network.name for network in host.networks if "migration" in network.roles)
    return (host.name, _state(host), f"{host.incoming_in_use}/{host.incoming_limit}", host.hypervisor, networks, host.address)


def _clock(host: Host) -> str:
    """Return how the host's wall clock differs from the coordinator's; empty if by less than `SKEW_SECONDS`, or unknown."""
    skew = host.clock_skew or 0.0
    if abs(skew) < SKEW_SECONDS:
        return ""
    return f"{seconds(abs(skew))} {'ahead of' if skew > 0 else 'behind'} the coordinator's: check the time service of both"


def _state(host: Host) -> str:
    return "draining" if host.draining and host.state is HostState.UP else host.state.value


@host.command()
@click.argument("name")
@output_option
def show(name: str, output: str) -> None:
    """Show one host: its hypervisor, networks and capabilities."""

    async def body(session: Session) -> None:
        host = await session.client.get_host(name)
        if output == "json":
            print_json(to_json(host.proto))
        else:
            _print_host(host)

    run(body, output)


@host.command()
@click.argument("name")
@output_option
def remove(name: str, output: str) -> None:
    """Forget a host that does not answer. It comes back when its agent registers again."""

    async def body(session: Session) -> None:
        await session.client.remove_host(name)
        if output == "json":
            print_json({"removed": name})
        else:
            click.echo(f"{name} was removed")

    run(body, output)


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
            ("incoming", f"{host.incoming_in_use} of {host.incoming_limit} slots in use"),
            ("transports", ", ".join(host.uri_transports)),
            ("bandwidth limit", "yes" if host.bandwidth else "no"),
            ("split phases", "yes" if host.split_phases else "no: whole migrations only"),
            *((support.replace("_", " "), ", ".join(options)) for support, options in sorted(by_support.items())),
            *((("coordinators", "; ".join(host.proto.host.coordinators)),) if len(host.proto.host.coordinators) > 1 else ()),
            *((f"no {option}", why) for option, why in sorted(host.option_reasons.items())),
        ]
    )
    rows = [(n.name, n.address, ",".join(n.roles), rate(n.line_rate) if n.line_rate else "") for n in host.networks]
    print_table(("NETWORK", "ADDRESS", "ROLES", "LINE"), rows)


def _domain_state(domain: Domain) -> str:
    silent = f" (no answer for {seconds(domain.silent_for)})" if domain.silent_for else ""
    return f"{domain.state.value}{silent}"


def _versions(domain: Domain) -> str:
    differ = domain.running_version and domain.installed_version and domain.installed_version != domain.running_version
    return f"{domain.running_version} ({domain.installed_version} installed)" if differ else domain.running_version


@click.group()
def domain() -> None:
    """List guests."""


@domain.command("list")
@click.option("--host", metavar="HOST", default="", help="Only the guests of this host.")
@output_option
def list_domains(host: str, output: str) -> None:
    """List guests by name, running or not."""

    async def body(session: Session) -> None:
        found = await session.client.list_domains(host)
        if output == "json":
            domains = [to_json(domain.proto) for domain in found]
            print_json({"domains": domains, "unreachable_hosts": list(found.unreachable_hosts)})
            return
        rows = [
            (d.name, d.host, _domain_state(d), size(d.memory_bytes), str(d.vcpus), d.job or "none", _versions(d), d.uuid)
            for d in found
        ]
        print_table(("NAME", "HOST", "STATE", "MEMORY", "CPUS", "MIGRATION", "QEMU", "UUID"), rows)
        if not rows:
            click.echo("no guests", err=True)
        if found.unreachable_hosts:
            click.echo(
                printable(
                    f"the guests of these hosts are missing: {', '.join(found.unreachable_hosts)} (no valid answer; "
                    + with_server("`drover domain list --host NAME` says why)")
                ),
                err=True,
            )

    run(body, output)
