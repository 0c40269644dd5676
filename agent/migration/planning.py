"""The plan of a migration, from the user's request and the descriptions of both hosts. Pure. Whatever these show to be impossible is
refused here, before a host has done anything."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from ipaddress import ip_address

import grpc

from agent.handshake.drive.ends import Ends, Side
from agent.handshake.drive.plan import Plan
from agent.hypervisor.features import check_bandwidth, check_options, check_protocol, settled
from agent.hypervisor.guest_fact import fact_of_description
from agent.migration.settings import check, settings_of
from agent.migration.waits import slot_of
from agent.migration.whereabouts import whereabouts
from agent.network.choice import Choice, Wish, choose
from agent.network.networks import checked_uri, network_of, refused
from agent.network.rules import MIGRATION_ROLE, seen
from agent.network.uri import MigrationUri, address_problem, same_address
from agent.runtime.errors import DroverError, Reason, said_by_peer
from agent.runtime.units import rate
from agent.runtime.wire import cut, enum_name
from drover.agent.v1 import host_pb2, options_pb2
from drover.agent.v1 import migration_pb2 as pb


def make_plan(
    spec: pb.MigrationSpec, ends: Ends, others: Sequence[pb.Migration] = (), *, network_later: bool = False
) -> tuple[Plan, list[str]]:
    """Return the plan, and warnings for the user. `others`: the migrations beside it. `network_later`: while no
    network can be used for reasons that may pass, the plan has none, and `network_choice.why` says why.

    Raises SAME_HOST, DOMAIN_NOT_RUNNING, OPTION_UNSUPPORTED, BANDWIDTH_UNSUPPORTED, PROTOCOL_MISMATCH, SPLIT_PHASES_MISSING,
    NETWORK_NOT_FOUND, NETWORK_FORBIDDEN, URI_NOT_ALLOWED; the guest's obstacle to leaving (DOMAIN_BUSY, INCOMPATIBLE_GUEST, …)."""
    source, destination, guest = ends.source.host, ends.destination.host, ends.guest
    _check_hosts(source, destination)
    _check_guest(guest, source)
    _check_end(spec, guest, source, f"the source {source.name}")
    _check_end(spec, guest, destination, f"the destination {destination.name}")
    try:
        choice, uri = _choose_network(spec, ends, others)
    except DroverError as error:
        if not network_later or error.metadata.get("wait") != "network":
            raise
        choice, uri = Choice(pb.NetworkChoice(why=cut(error.message, 1024))), ""
    settings = settings_of(spec, guest.domain.settings, choice.default_limit)
    check(settings, source.migration_features, f"the source {source.name}")
    warnings = [*choice.warnings]
    warnings += _rounded(settings.bandwidth_bytes_per_second, source)
    _check_obstacle(guest)  # last: errors of the request come first
    warnings += _losses(spec.options, guest.domain, source.name, destination.name)
    return (
        Plan(
            domain_name=guest.domain.name,
            domain_uuid=guest.domain.uuid,
            destination_name=spec.destination_name or guest.domain.name,
            source_host=source.name,
            source_agent=ends.source.agent_address,
            destination_host=destination.name,
            destination_agent=ends.destination.agent_address,
            network=choice.message.network,
            uri=uri,
            settings=settings,
            options=settled(spec.options, source.migration_features, destination.migration_features),
            requirements=guest.requirements,
            network_choice=choice.message,
            destination_features=destination.migration_features,
        ),
        warnings,
    )


def check_source(spec: pb.MigrationSpec, source: host_pb2.Host, guest: host_pb2.GetDomainResponse) -> None:
    """Raise what keeps the guest from leaving its host, wherever it is to go; see `make_plan`."""
    _check_guest(guest, source)
    _check_end(spec, guest, source, f"the source {source.name}")
    _check_obstacle(guest)


def _check_end(spec: pb.MigrationSpec, guest: host_pb2.GetDomainResponse, host: host_pb2.Host, end: str) -> None:
    check_protocol(host.min_protocol_version, host.max_protocol_version, end)
    _check_split_phases(host, end)
    check_options(spec.options, host.migration_features, end)
    check(settings_of(spec, guest.domain.settings), host.migration_features, end)


def _check_obstacle(guest: host_pb2.GetDomainResponse) -> None:
    if guest.HasField("obstacle"):
        obstacle = guest.obstacle
        raise said_by_peer(obstacle.reason, obstacle.message, obstacle.metadata, code=grpc.StatusCode.FAILED_PRECONDITION)


def planned(
    migration_id: str, spec: pb.MigrationSpec, plan: Plan, warnings: list[str], guest: host_pb2.GetDomainResponse
) -> pb.Migration:
    """Return the migration in its first state: it waits for its slot, and the guest is untouched."""
    migration = pb.Migration(
        migration_id=migration_id,
        spec=spec,
        state=pb.MIGRATION_STATE_PENDING,
        phase="reserve",
        attempt=1,
        source_host=plan.source_host,
        destination_host=plan.destination_host,
        domain_name=plan.domain_name,
        domain_uuid=plan.domain_uuid,
        source_guest=fact_of_description(guest.domain),
        network=plan.network,
        network_choice=plan.network_choice,
        options=plan.options,
        settings=plan.settings,
        tenant=spec.tenant or guest.domain.settings.tenant,
        warnings=warnings,
        waiting_for=slot_of(plan.destination_host) if plan.network else plan.network_choice.why,
        wait_reason=pb.WAIT_REASON_SLOT if plan.network else pb.WAIT_REASON_NETWORK,
    )
    migration.runs_on = whereabouts(migration).runs_on
    return migration


def to_host(spec: pb.MigrationSpec, host: str) -> pb.MigrationSpec:
    """Return the spec with a destination, for one that names none."""
    named = deepcopy(spec)
    named.destination_host = host
    return named


def as_chosen(ends: Ends, migration: pb.Migration) -> Ends:
    """Return the ends for planning a migration again. An agent that has taken it over does not know the networks of the cluster; it
    knows the one that was chosen by the migration itself."""
    choice = migration.network_choice
    if not choice.HasField("rules") or migration.driver != migration.source_host:
        return ends
    network = host_pb2.Network(name=choice.network, roles=[MIGRATION_ROLE], rules=choice.rules, cluster=True)
    source, destination = (replace(side, host=seen(side.host, [network])) for side in (ends.source, ends.destination))
    others = [other for other in ends.networks if other.name != network.name]
    return Ends(source, destination, ends.guest, [*others, network])


def same_guest(migration: pb.Migration) -> pb.MigrationSpec:
    """Return the spec for planning a migration again, for the same guest even if another has its name now, and for the destination
    that it has."""
    spec = to_host(migration.spec, migration.spec.destination_host or migration.destination_host)
    spec.domain, spec.source_host = migration.domain_uuid, migration.source_host
    return spec


def check_same_hosts(migration: pb.Migration, plan: Plan) -> None:
    """Raise HOST_NOT_FOUND if the destination's name or address now belongs to another host."""
    if plan.destination_host != migration.destination_host:
        raise DroverError(
            Reason.HOST_NOT_FOUND,
            f"{migration.spec.destination_host} is {plan.destination_host} now, not {migration.destination_host}. Nothing was done "
            "to the guest; start a new migration",
            metadata={"host": migration.destination_host},
        )


def resume_plan(migration: pb.Migration, source: Side, destination: Side) -> Plan:
    """Return the plan of a migration that has its slot, without the guest's requirements, which are no longer needed."""
    spec, choice = migration.spec, migration.network_choice
    if not choice.destination_address:  # an older version has planned it
        address = next((n.address for n in destination.host.networks if n.name == migration.network), "")
        choice = pb.NetworkChoice(network=migration.network, destination_address=address)
    return Plan(
        domain_name=migration.domain_name,
        domain_uuid=migration.domain_uuid,
        destination_name=spec.destination_name or migration.domain_name,
        source_host=migration.source_host,
        source_agent=source.agent_address,
        destination_host=migration.destination_host,
        destination_agent=destination.agent_address,
        network=migration.network,
        uri=spec.uri or _listening(choice.destination_address, destination.host),
        settings=migration.settings,
        options=migration.options if migration.HasField("options") else spec.options,
        requirements=None,
        network_choice=choice,
        destination_features=destination.host.migration_features,
    )


def _rounded(limit: int, source: host_pb2.Host) -> list[str]:
    enforced = check_bandwidth(limit, source.migration_features, source.name)
    if enforced == limit:
        return []
    unit = source.migration_features.bandwidth_unit
    return [f"the bandwidth is limited to {rate(enforced)}: {source.name} takes multiples of {rate(unit)}"]


def _check_hosts(source: host_pb2.Host, destination: host_pb2.Host) -> None:
    if source.host_uuid == destination.host_uuid:
        raise DroverError(
            Reason.SAME_HOST,
            f"source {source.name} and destination {destination.name} are the same host{_twins(source, destination)}. "
            "Nothing was done to the guest",
            metadata={"host": source.name},
        )


def _twins(source: host_pb2.Host, destination: host_pb2.Host) -> str:
    if source.name == destination.name:
        return "; choose another destination"
    return (
        f", as libvirt takes them: both have the host_uuid {source.host_uuid}. If they are two, set another host_uuid in "
        f"{destination.name}'s /etc/libvirt/libvirtd.conf, and restart libvirtd and the agent there"
    )


def _check_guest(guest: host_pb2.GetDomainResponse, source: host_pb2.Host) -> None:
    if guest.domain.state not in (host_pb2.DOMAIN_STATE_RUNNING, host_pb2.DOMAIN_STATE_PAUSED):
        state = enum_name(host_pb2.DomainState, guest.domain.state)
        raise DroverError(
            Reason.DOMAIN_NOT_RUNNING,
            f"guest {guest.domain.name} on {source.name} is {state}, and only a running guest can be migrated live; start it first",
            metadata={"state": state},
        )


def _check_split_phases(host: host_pb2.Host, end: str) -> None:
    if not host.migration_features.split_phases:
        text = f"the libvirt library of {end} does not export the split phases that Drover needs; update libvirt there"
        raise DroverError(Reason.SPLIT_PHASES_MISSING, text, metadata={"host": host.name})


def _losses(options: options_pb2.Options, domain: host_pb2.Domain, source: str, destination: str) -> list[str]:
    """Return the warnings of what the guest loses by the user's options."""
    if not domain.persistent or not options.HasField("persist_destination") or options.persist_destination:
        return []
    kept = options.HasField("undefine_source") and not options.undefine_source
    where = f"only {source} keeps it" if kept else "no host will have it"
    return [
        f"persist_destination is off: {destination} does not store the definition of guest {domain.name}, so after the migration "
        f"{where}, and once the guest is shut down there it is gone"
    ]


def _choose_network(spec: pb.MigrationSpec, ends: Ends, others: Sequence[pb.Migration]) -> tuple[Choice, str]:
    """Return the network, and the URI at which the destination is to listen."""
    source, destination, settings = ends.source.host, ends.destination.host, ends.guest.domain.settings
    minimum = spec.min_bandwidth_bytes_per_second or settings.min_bandwidth_bytes_per_second
    wish = Wish(spec.network, spec.tenant or settings.tenant, minimum)
    if not spec.uri:
        choice = choose(wish, source, destination, ends.networks, others)
        _check_address(choice.message, source, destination)
        return choice, _listening(choice.message.destination_address, destination)
    asked = checked_uri(spec.uri, destination.migration_features)
    network = network_of(asked, destination)
    if wish.named not in ("", network.name):
        raise refused(spec.uri, f"its host is on network {network.name}, and network {wish.named} was asked for")
    at = deepcopy(destination)
    del at.networks[:]
    at.networks.add().CopyFrom(network)
    at.networks[0].address = str(asked.host)
    choice = choose(replace(wish, named=network.name), source, at, ends.networks, others)
    _check_address(choice.message, source, destination)
    return choice, str(asked)


def _listening(address: str, destination: host_pb2.Host) -> str:
    """Return the URI of an address, without a port; empty where none can be made, so that the destination proposes its own."""
    try:
        return str(MigrationUri(destination.migration_features.uri_transports[0], ip_address(address)))
    except (ValueError, IndexError):
        return ""


def _check_address(choice: pb.NetworkChoice, source: host_pb2.Host, destination: host_pb2.Host) -> None:
    """Raise NETWORK_NOT_FOUND unless the destination's address is its alone. Simulated hosts share those of one machine."""
    if destination.driver == "sim":
        return
    try:
        address = ip_address(choice.destination_address)
        problem = address_problem(address)
        if any(same_address(other.address, address) for other in source.networks):
            problem = f"is an address of the source {source.name}, too"
    except ValueError:
        problem = "is not an IP address"
    if problem:
        raise DroverError(
            Reason.NETWORK_NOT_FOUND,
            f"on network {choice.network}, {destination.name} has the address {choice.destination_address}, which {problem}. "
            f"Nothing was done to the guest; name another network, or correct the configuration of the agent of {destination.name}",
            metadata={"network": choice.network, "host": destination.name},
        )
