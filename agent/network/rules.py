"""The rules of a network: their checks, and which of a host's interfaces belong to it. Pure."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_interface, ip_network

from agent.runtime.errors import DroverError, Reason, invalid_field
from agent.runtime.wire import MOST_RATE
from drover.agent.v1 import host_pb2

MIGRATION_ROLE = "migration"
DRAINED_ROLE = "draining"
"""In place of a migration role that is being taken: the network takes no new migration."""

MOST_TENANT_BYTES = 253
_NO_TENANT = "none"
_LEAST_RATE = 1 << 20
"""Least rate in bytes per second: libvirt enforces limits in MiB/s."""
_RATES = ("capacity", "cap", "max", "default")
_ORDERED = (("max", "cap"), ("max", "capacity"), ("default", "max"), ("default", "cap"), ("default", "capacity"))
"""Pairs of rates of which the first, where both are set, may not exceed the second."""


def checked(rules: host_pb2.NetworkRules) -> host_pb2.NetworkRules:
    """Return the rules in their normal form: ranges without host bits, tenants sorted, nothing twice. Raises INVALID_FIELD,
    NETWORK_OVERLAPS (two of its own ranges overlap)."""
    normal = host_pb2.NetworkRules()
    normal.CopyFrom(rules)
    cidrs = [_network(cidr, f"rules.cidrs[{index}]") for index, cidr in enumerate(rules.cidrs)]
    for index, cidr in enumerate(cidrs):
        for other in cidrs[:index]:
            if cidr.overlaps(other):
                raise invalid_field(f"rules.cidrs[{index}]", f"{cidr} overlaps {other} of the same network", Reason.NETWORK_OVERLAPS)
    for index, tenant in enumerate(rules.tenants):
        check_tenant(tenant, f"rules.tenants[{index}]")
        if not tenant:
            raise invalid_field(f"rules.tenants[{index}]", "expected the name of a tenant")
    normal.cidrs[:] = [str(cidr) for cidr in cidrs]
    normal.tenants[:] = sorted(set(rules.tenants))
    rates = {name: int(getattr(rules, f"{name}_bytes_per_second")) for name in _RATES}
    for name, rate in rates.items():
        if not 0 <= rate <= MOST_RATE:
            raise invalid_field(f"rules.{name}_bytes_per_second", f"{rate} is not between 0 and {MOST_RATE}")
        if 0 < rate < _LEAST_RATE:
            text = f"{rate} cannot be enforced: the least rate is {_LEAST_RATE} bytes per second (1 MiB/s); 0 means none"
            raise invalid_field(f"rules.{name}_bytes_per_second", text)
    for less, more in _ORDERED:
        if 0 < rates[more] < rates[less]:
            raise invalid_field(
                f"rules.{less}_bytes_per_second", f"{rates[less]} is more than {more}_bytes_per_second, which is {rates[more]}"
            )
    return normal


def bound_rates(rules: host_pb2.NetworkRules) -> None:
    """Lower rates that an older version has accepted."""
    for name in _RATES:
        field = f"{name}_bytes_per_second"
        setattr(rules, field, min(getattr(rules, field), MOST_RATE))


def tenant_problem(tenant: str) -> str:
    """Return why no guest, network or migration can have a tenant of that name; empty: nothing is wrong, or it is none."""
    if tenant != tenant.strip() or not tenant.isprintable():
        return "the tenant has characters that cannot be printed, or spaces around it"
    if tenant == _NO_TENANT:
        return f'"{_NO_TENANT}" stands for no tenant on the command line, so no tenant can have that name'
    return f"the tenant has more than {MOST_TENANT_BYTES} bytes" if len(tenant.encode()) > MOST_TENANT_BYTES else ""


def check_tenant(tenant: str, field: str) -> None:
    """Raise INVALID_FIELD for what `tenant_problem` names."""
    if problem := tenant_problem(tenant):
        raise invalid_field(field, problem)


def _network(cidr: str, field: str) -> IPv4Network | IPv6Network:
    try:
        if "%" in cidr:  # a zone, which is another one on each host
            raise ValueError
        network = ip_network(cidr, strict=False)
    except ValueError:
        raise invalid_field(field, f'expected a range such as "10.92.0.0/24" or "fd00:92::/64", got "{cidr}"') from None
    problems = {
        "every address": network.prefixlen == 0,
        "multicast": network.is_multicast,
        "link-local, which is another network on each interface": network.is_link_local,
        "made of IPv4 addresses; write it as such": isinstance(network, IPv6Network) and network.network_address.ipv4_mapped,
    }
    for what, holds in problems.items():
        if holds:
            raise invalid_field(field, f"{network} is {what}")
    return network


def check_apart(name: str, rules: host_pb2.NetworkRules, others: Mapping[str, host_pb2.NetworkRules]) -> None:
    """Raise NETWORK_OVERLAPS if a range of the network `name` overlaps one of another. All rules are in their normal form."""
    for index, cidr in enumerate(map(ip_network, rules.cidrs)):
        for other, theirs in others.items():
            for taken in map(ip_network, theirs.cidrs):
                if other != name and cidr.overlaps(taken):
                    raise DroverError(
                        Reason.NETWORK_OVERLAPS,
                        f"{cidr} of network {name} overlaps {taken} of network {other}, and an address belongs to one network. "
                        f"Nothing was changed; `drover network show {other}` shows that one",
                        metadata={"network": name, "other": other, "field": f"rules.cidrs[{index}]"},
                    )


def on_network(network: host_pb2.Network, interfaces: Sequence[host_pb2.Interface]) -> list[host_pb2.Network]:
    """Return a host's side of a network, one entry for each address family of its ranges, in their order; none where the host has no
    address in them. Of several addresses in one family, that of an interface that is up, in an earlier range, earlier among those of
    its interface, the lowest."""
    best: dict[int, tuple[tuple[bool, int, int, bytes], host_pb2.Network]] = {}
    sides = [(order, *side) for interface in interfaces for order, side in enumerate(addresses_of([interface]))]
    for place, cidr in enumerate(map(ip_network, network.rules.cidrs)):
        for order, interface, own in sides:
            if own in cidr:
                rank = not interface.up, place, order, own.packed
                if own.version not in best or rank < best[own.version][0]:
                    best[own.version] = rank, at_interface(network, own, interface)
    return [side for _, side in sorted(best.values(), key=lambda ranked: ranked[0][1])]


def own_sides(network: host_pb2.Network, address: str, interfaces: Sequence[host_pb2.Interface]) -> list[host_pb2.Network]:
    """Return a host's side of a network of its own: at `address` if that is given, which it may lack now; else as `on_network`."""
    if not address:
        return on_network(network, interfaces)
    wanted = ip_address(address)
    at = next((interface for interface, own in addresses_of(interfaces) if own == wanted), host_pb2.Interface())
    return [at_interface(network, wanted, at)]


def addresses_of(interfaces: Iterable[host_pb2.Interface]) -> Iterator[tuple[host_pb2.Interface, IPv4Address | IPv6Address]]:
    """Yield each address with its interface. Leaves out what is none: another host may have sent it."""
    for interface in interfaces:
        for text in interface.addresses:
            try:
                yield interface, ip_interface(text).ip
            except ValueError:
                continue


def interface_to(address: str, interfaces: Iterable[host_pb2.Interface]) -> str:
    """Return the name of the interface on whose subnet an address is. Empty: there is none."""
    with contextlib.suppress(ValueError):
        reached = ip_address(address)
        for interface in interfaces:
            if any(reached in ip_interface(own).network for own in interface.addresses):
                return interface.name
    return ""


def at_interface(network: host_pb2.Network, address: IPv4Address | IPv6Address, interface: host_pb2.Interface) -> host_pb2.Network:
    """Return a host's side of the network with that address on that interface."""
    return host_pb2.Network(
        name=network.name,
        address=str(address),
        roles=network.roles,
        line_bytes_per_second=network.line_bytes_per_second or interface.line_bytes_per_second,
        interface=interface.name,
        mtu=interface.mtu,
        down=not interface.up,
        rules=network.rules if network.HasField("rules") else None,
        cluster=network.cluster,
    )


def is_in(network: host_pb2.Network, address: IPv4Address | IPv6Address) -> bool:
    """Return whether an address is the host's own one on a network, or in its ranges."""
    try:
        return ip_address(network.address) == address or any(address in ip_network(cidr) for cidr in network.rules.cidrs)
    except ValueError:  # another host may have sent them
        return False


def effective(
    own: Sequence[host_pb2.Network], defined: Sequence[host_pb2.Network], interfaces: Sequence[host_pb2.Interface]
) -> list[host_pb2.Network]:
    """Return a host's networks in a cluster that has defined `defined` (without addresses): its sides of these, and its `own` ones
    that no defined network replaces, by name or by range."""
    names = {network.name for network in defined}
    ranges = [ip_network(cidr) for network in defined for cidr in network.rules.cidrs]

    def replaced(network: host_pb2.Network) -> bool:
        try:
            return network.name in names or any(ip_address(network.address) in cidr for cidr in ranges)
        except ValueError:
            return False

    return [*(side for network in defined for side in on_network(network, interfaces)), *(n for n in own if not replaced(n))]


def seen(host: host_pb2.Host, defined: Sequence[host_pb2.Network]) -> host_pb2.Host:
    """Return the host with its sides of these networks in place of its own ones of the same names or ranges."""
    copy = host_pb2.Host()
    copy.CopyFrom(host)
    del copy.networks[:]
    copy.networks.extend(effective(host.networks, defined, host.interfaces))
    return copy


def without_tenants(rules: host_pb2.NetworkRules) -> host_pb2.NetworkRules:
    """Return the rules that count once a network was chosen."""
    copy = host_pb2.NetworkRules()
    copy.CopyFrom(rules)
    del copy.tenants[:]
    return copy
