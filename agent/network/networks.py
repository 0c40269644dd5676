"""Choice of the network that carries a guest's memory, and checks of migration URIs. Pure.

A migration URI is an injection surface (requirement H7): a peer could point a source's hypervisor at any address. So its scheme must
be one that the destination declared, its host one of the destination's addresses, its port within the destination's range."""

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass

from agent.network.uri import MigrationUri, same_address
from agent.runtime.errors import DroverError, Reason
from drover.agent.v1 import host_pb2, options_pb2

MIGRATION_ROLE = "migration"


@dataclass(frozen=True)
class Listen:
    """The one address of one network on which the destination's hypervisor listens."""

    network: str
    address: str
    uri: str
    """In its normal form; with a port only if one was requested."""


def common_network(source: Sequence[host_pb2.Network], destination: Sequence[host_pb2.Network], named: str) -> host_pb2.Network:
    """Return the destination's side of the network for one migration: `named`, which both hosts must have; if that is empty, the
    first (by the destination's order) with the migration role on both. Raises NETWORK_NOT_FOUND, with what each host has."""
    theirs = {network.name: network for network in source}
    for network in destination:
        other = theirs.get(network.name)
        if other is None:
            continue
        if network.name == named or (not named and MIGRATION_ROLE in network.roles and MIGRATION_ROLE in other.roles):
            return network
    wanted = f'network "{named}"' if named else f'a network with the role "{MIGRATION_ROLE}"'
    raise DroverError(
        Reason.NETWORK_NOT_FOUND,
        f"{wanted} is not on both hosts: the source has {_listing(source)}, the destination has {_listing(destination)}; "
        "name one that both have, or add it to the agents' configuration",
        metadata={"network": named},
    )


def _listing(networks: Sequence[host_pb2.Network]) -> str:
    return ", ".join(f"{n.name} ({'/'.join(n.roles) or 'no role'})" for n in networks) or "none"


def own_network(networks: Sequence[host_pb2.Network], named: str) -> host_pb2.Network:
    """Return this host's network of that name; if that is empty, its first with the migration role."""
    return common_network(networks, networks, named)


def listen_on(networks: Sequence[host_pb2.Network], features: options_pb2.MigrationFeatures, named: str, uri: str) -> Listen:
    """Return where to listen for one migration, from the requested network or URI. Raises URI_NOT_ALLOWED, NETWORK_NOT_FOUND."""
    if not uri:
        network = own_network(networks, named)
        own = ipaddress.ip_address(network.address)
        return Listen(network.name, str(own), str(MigrationUri(features.uri_transports[0], own)))
    asked = read_uri(uri, features.uri_transports)
    network = _network_of(networks, asked)
    if named and network.name != named:
        raise _refused(uri, f"its host is on network {network.name}, and network {named} was asked for")
    if asked.port and not features.first_port <= asked.port <= features.last_port:
        raise _refused(uri, f"port {asked.port} is outside this host's range {features.first_port}-{features.last_port}")
    return Listen(network.name, str(asked.host), str(asked))


def read_uri(uri: str, transports: Sequence[str]) -> MigrationUri:
    """Parse a migration URI, whose scheme must be declared. Raises URI_NOT_ALLOWED."""
    try:
        read = MigrationUri.parse(uri)
    except ValueError as error:
        raise _refused(uri, str(error)) from None
    if read.scheme not in transports:
        raise _refused(uri, f'scheme "{read.scheme}" is not one that this host declared: {", ".join(transports) or "none"}')
    return read


def check_destination_uri(uri: str, networks: Sequence[host_pb2.Network], features: options_pb2.MigrationFeatures) -> str:
    """Return the normal form of a destination's `uri_out`. Raises URI_NOT_ALLOWED unless the destination has its address and
    port."""
    read = read_uri(uri, features.uri_transports)
    _network_of(networks, read)
    if not features.first_port <= read.port <= features.last_port:
        raise _refused(uri, f"its port is outside the destination's range {features.first_port}-{features.last_port}")
    return str(read)


def _network_of(networks: Sequence[host_pb2.Network], uri: MigrationUri) -> host_pb2.Network:
    for network in networks:
        if same_address(network.address, uri.host):
            return network
    raise _refused(str(uri), "its host is not an address of the destination: it has " + ", ".join(n.address for n in networks))


def _refused(uri: str, why: str) -> DroverError:
    return DroverError(Reason.URI_NOT_ALLOWED, f"migration URI {uri} is refused: {why}", metadata={"uri": uri})
