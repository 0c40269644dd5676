"""Checks of migration URIs, and where a destination listens. Pure.

A migration URI is an injection surface (requirement H7): a peer could point a source's hypervisor at any address. So its scheme must
be one that the destination declared, its host one of the destination's addresses, its port within the destination's range."""

import ipaddress
from collections.abc import Sequence

from agent.network.choice import listing
from agent.network.rules import MIGRATION_ROLE, addresses_of, is_in
from agent.network.uri import MigrationUri, same_address
from agent.runtime.errors import DroverError, Reason
from drover.agent.v1 import host_pb2, options_pb2


def listen_on(
    networks: Sequence[host_pb2.Network],
    features: options_pb2.MigrationFeatures,
    named: str,
    uri: str,
    interfaces: Sequence[host_pb2.Interface] = (),
) -> MigrationUri:
    """Return where this host listens for one migration: at the address of the URI, which one of its networks or interfaces must have
    (a coordinator may know the network by a name that this host does not know); without a URI, at its address on the network `named`
    (empty: its first with the migration role). With a port only if one was asked for. Raises URI_NOT_ALLOWED, NETWORK_NOT_FOUND."""
    if not uri:
        return MigrationUri(features.uri_transports[0], ipaddress.ip_address(_own_network(networks, named).address))
    asked = checked_uri(uri, features)
    _check_own(asked, networks, interfaces)
    return asked


def _own_network(networks: Sequence[host_pb2.Network], named: str) -> host_pb2.Network:
    for network in networks:
        if network.name == named or (not named and MIGRATION_ROLE in network.roles):
            return network
    wanted = f'no network "{named}"' if named else f'no network with the role "{MIGRATION_ROLE}"'
    text = f"this host has {wanted}: it has {listing(networks)}; name one that it has, or add it to its agent's configuration"
    raise DroverError(Reason.NETWORK_NOT_FOUND, text, metadata={"network": named})


def _check_own(uri: MigrationUri, networks: Sequence[host_pb2.Network], interfaces: Sequence[host_pb2.Interface]) -> None:
    own = [network.address for network in networks] + [str(address) for _, address in addresses_of(interfaces)]
    if not any(same_address(address, uri.host) for address in own):
        known = ", ".join(sorted(set(own))[:16])
        raise refused(str(uri), f"its host is not an address of the destination, which has {known or 'none'}")


def checked_uri(uri: str, features: options_pb2.MigrationFeatures) -> MigrationUri:
    """Parse the URI of a request, whose scheme and port the destination must have declared. Raises URI_NOT_ALLOWED."""
    asked = read_uri(uri, features.uri_transports)
    if asked.port and not features.first_port <= asked.port <= features.last_port:
        raise refused(uri, f"port {asked.port} is outside this host's range {features.first_port}-{features.last_port}")
    return asked


def network_of(uri: MigrationUri, destination: host_pb2.Host) -> host_pb2.Network:
    """Return the destination's network in which the URI's address is. Raises URI_NOT_ALLOWED for an address that the destination
    does not have, or that is in no network."""
    _check_own(uri, destination.networks, destination.interfaces)
    for network in destination.networks:
        if is_in(network, uri.host):
            return network
    raise refused(str(uri), f"its host is in no network that {destination.name} has: {listing(destination.networks)}")


def read_uri(uri: str, transports: Sequence[str]) -> MigrationUri:
    """Parse a migration URI, whose scheme must be declared. Raises URI_NOT_ALLOWED."""
    try:
        read = MigrationUri.parse(uri)
    except ValueError as error:
        raise refused(uri, str(error)) from None
    if read.scheme not in transports:
        raise refused(uri, f'scheme "{read.scheme}" is not one that this host declared: {", ".join(transports) or "none"}')
    return read


def check_destination_uri(uri: str, address: str, features: options_pb2.MigrationFeatures) -> str:
    """Return the normal form of a destination's `uri_out`. Raises URI_NOT_ALLOWED unless it names the address that was chosen, and a
    port of the destination."""
    read = read_uri(uri, features.uri_transports)
    if not same_address(address, read.host):
        raise refused(uri, f"its host is not the address of the destination that was chosen: {address or 'none'}")
    if not features.first_port <= read.port <= features.last_port:
        raise refused(uri, f"its port is outside the destination's range {features.first_port}-{features.last_port}")
    return str(read)


def refused(uri: str, why: str) -> DroverError:
    """Return the error for a migration URI that is not used."""
    return DroverError(Reason.URI_NOT_ALLOWED, f"migration URI {uri} is refused: {why}", metadata={"uri": uri})
