"""``drover domain list|show|set``"""

import click

from agent.runtime.units import rate, size
from coordinator.cli.parse import once_option, rate_option
from coordinator.cli.session import Session, run, show_one
from coordinator.cli.show import output_option, print_json, print_pairs, print_table, to_json, with_server
from coordinator.cli.text import printable
from coordinator.cli.units import seconds
from coordinator.client import Domain, DomainList, NotFound


@click.group()
def domain() -> None:
    """List and show guests, and write their settings."""


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
        header = ("NAME", "HOST", "STATE", "MEMORY", "CPUS", "MIGRATION", "TENANT", "BANDWIDTH", "QEMU", "UUID")
        print_table(header, [_row(domain) for domain in found])
        if not found:
            click.echo("no guests", err=True)
        _print_missing(found)

    run(body, output)


def _row(domain: Domain) -> tuple[str, ...]:
    size_ = (size(domain.memory_bytes), str(domain.vcpus))
    settings = (domain.tenant or "none", _bandwidth(domain) or "none")
    return (domain.name, domain.host, _domain_state(domain), *size_, domain.job or "none", *settings, _versions(domain), domain.uuid)


def _print_missing(found: DomainList) -> None:
    if found.unreachable_hosts:
        hosts, hint = ", ".join(found.unreachable_hosts), with_server("`drover domain list --host NAME` says why")
        click.echo(printable(f"the guests of these hosts are missing: {hosts} (no valid answer; {hint})"), err=True)


@domain.command()
@click.argument("guest")
@click.option("--host", metavar="HOST", default="", help="The host that has it. Default: every host is looked at.")
@output_option
def show(guest: str, host: str, output: str) -> None:
    """Show GUEST (name or UUID), on each host that has it."""

    async def body(session: Session) -> None:
        found = await session.client.list_domains(host)
        copies = [domain for domain in found if guest in (domain.name, domain.uuid)]
        if not copies:
            _print_missing(found)
            text = f'no host that answered has a guest "{guest}"; `drover domain list` shows the guests'
            raise NotFound(text, reason="DOMAIN_NOT_FOUND", metadata={"domain": guest})
        if output == "json":
            print_json({"domains": [to_json(copy.proto) for copy in copies], "unreachable_hosts": list(found.unreachable_hosts)})
            return
        for copy in copies:
            _print_domain(copy)
        _print_missing(found)

    run(body, output)


@domain.command("set")
@click.argument("guest")
@click.option("--host", metavar="HOST", default="", help="The host that has it. Default: where it is found.")
@once_option("--tenant", metavar="TENANT", text='The tenant to which it belongs; "none" removes it.')
@rate_option("--min-bandwidth", 'Least rate that its migrations are guaranteed, such as 100MiB/s; "none" removes it.')
@rate_option("--max-bandwidth", 'Highest rate of its migrations; "none" removes it.')
@output_option
def set_(guest: str, host: str, tenant: str | None, min_bandwidth: int | None, max_bandwidth: int | None, output: str) -> None:
    """Write settings of GUEST (name or UUID) into its definition, with which they travel.

    The options of a migration go before them.
    """
    if tenant is None and min_bandwidth is None and max_bandwidth is None:
        raise click.UsageError("nothing to change: give --tenant, --min-bandwidth or --max-bandwidth")
    if tenant == "":
        raise click.UsageError('--tenant: the name is empty; "none" removes the tenant')

    bounds = {"min_bandwidth": min_bandwidth, "max_bandwidth": max_bandwidth}
    tenant = "" if tenant == "none" else tenant
    show_one(output, lambda session: session.client.update_domain(guest, host=host, tenant=tenant, **bounds), _print_domain)


def _print_domain(domain: Domain) -> None:
    print_pairs(
        [
            ("name", domain.name),
            ("uuid", domain.uuid),
            ("host", domain.host),
            ("state", _domain_state(domain)),
            ("memory", size(domain.memory_bytes)),
            ("cpus", str(domain.vcpus)),
            ("definition", "persistent" if domain.persistent else "transient"),
            ("migration", domain.job or "none"),
            ("tenant", domain.tenant or "none"),
            ("bandwidth", _bandwidth(domain) or "none of its own"),
            ("qemu", _versions(domain)),
        ]
    )


def _bandwidth(domain: Domain) -> str:
    """Return the guaranteed and the highest rate of its migrations; empty if it has neither."""
    bounds = (("at least", domain.min_bandwidth), ("at most", domain.max_bandwidth))
    return ", ".join(f"{word} {rate(bound)}" for word, bound in bounds if bound)


def _domain_state(domain: Domain) -> str:
    silent = f" (no answer for {seconds(domain.silent_for)})" if domain.silent_for else ""
    return f"{domain.state.value}{silent}"


def _versions(domain: Domain) -> str:
    differ = domain.running_version and domain.installed_version and domain.installed_version != domain.running_version
    return f"{domain.running_version} ({domain.installed_version} installed)" if differ else domain.running_version
