"""Choice of the network that carries a guest's memory. Pure.

In this order: the user's word; the role "migration"; tenants (a guest whose tenant any network lists uses only those that list it,
every other guest only networks without tenants); an address on both hosts, of one family, on interfaces that are up; room for the
guaranteed minimum; then the most free capacity for this migration, then the name. Where nothing is left: a network whose rules make
it the fallback, chosen in the same way, with a warning."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Final

from agent.network.rules import MIGRATION_ROLE, rate_text
from agent.runtime.errors import DroverError, Reason
from agent.runtime.wire import cut
from drover.agent.v1 import host_pb2
from drover.agent.v1 import migration_pb2 as pb


@dataclass(frozen=True)
class NetworkUse:
    """What another migration takes of a network, or will take: it is planned, waits, or runs."""

    network: str
    source: str
    destination: str
    bandwidth: int = 0
    """Its limit in bytes per second; 0: none, so that it wants the whole line."""


UNKNOWN_LINE: Final = 125_000_000
"""Bytes per second by which a line of unknown speed is compared with others: 1 Gbit/s."""
MOST_RULED_OUT: Final = 8


@dataclass(frozen=True)
class Wish:
    """What a migration asks of its network."""

    named: str = ""
    """The user's word. Empty: any."""
    tenant: str = ""
    minimum: int = 0
    """Guaranteed bytes per second."""


@dataclass(frozen=True)
class Choice:
    """The network of one migration, as both hosts have it."""

    source: host_pb2.Network
    destination: host_pb2.Network
    why: str
    ruled_out: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def to_proto(self) -> pb.NetworkChoice:
        ruled_out = [pb.RuledOutNetwork(name=name, why=cut(why, 256)) for name, why in list(self.ruled_out.items())[:MOST_RULED_OUT]]
        return pb.NetworkChoice(
            network=self.destination.name,
            why=cut(self.why, 1024),
            ruled_out=ruled_out,
            source_address=self.source.address,
            destination_address=self.destination.address,
        )


@dataclass(frozen=True)
class _Network:
    """One network as both hosts and the cluster know it."""

    name: str
    source: tuple[host_pb2.Network, ...]
    destination: tuple[host_pb2.Network, ...]
    defined: tuple[host_pb2.Network, ...]
    """Without addresses."""

    @property
    def sides(self) -> tuple[host_pb2.Network, ...]:
        return self.defined + self.source + self.destination

    @property
    def tenants(self) -> frozenset[str]:
        return frozenset(tenant for side in self.sides for tenant in side.rules.tenants)

    def all(self, *, role: bool) -> bool:
        """Return whether it has the migration role (else: is the fallback), as far as anybody knows it."""
        return all(MIGRATION_ROLE in side.roles if role else side.rules.fallback for side in self.sides)

    def admits(self, tenant: str) -> bool:
        return all(not side.rules.tenants or tenant in side.rules.tenants for side in self.sides)


@dataclass(frozen=True)
class _Pair:
    source: host_pb2.Network
    destination: host_pb2.Network
    free: int
    capacity: int

    @property
    def rank(self) -> tuple[int, int, str]:
        most = self.destination.rules.max_bytes_per_second
        return -min(self.free, most or self.free), -self.free, self.destination.name


@dataclass(frozen=True)
class _Out:
    """Why a network cannot be used."""

    why: str
    passes: bool = False
    """It may pass by itself: an interface comes up, an address comes back."""
    too_slow: bool = False
    """It cannot give the guaranteed minimum."""


def choose(
    wish: Wish,
    source: host_pb2.Host,
    destination: host_pb2.Host,
    defined: Sequence[host_pb2.Network] = (),
    uses: Sequence[NetworkUse] = (),
) -> Choice:
    """Return the network of a migration. `defined`: networks that the cluster knows, without addresses.

    Raises NETWORK_NOT_FOUND (with metadata ``wait=network`` where one is only down, or without an address, now), NETWORK_FORBIDDEN
    (the named network does not admit the guest's tenant), BANDWIDTH_INSUFFICIENT (none can give the guaranteed minimum)."""
    known = _known(source, destination, defined)
    if wish.named:
        return _named(wish, known, source, destination, uses)
    out: dict[str, _Out] = {}
    for role in (True, False):
        pairs: list[_Pair] = []
        for network in known:
            found = _judge(network, wish, known, (source, destination), uses, role=role)
            if isinstance(found, _Pair):
                pairs.append(found)
                out.pop(network.name, None)
            elif role or network.all(role=False):
                out[network.name] = found
        if pairs:
            best = min(pairs, key=lambda pair: pair.rank)
            return _chosen(best, [pair for pair in pairs if pair is not best], out, role=role)
    raise _none(wish, source, destination, out)


def _known(source: host_pb2.Host, destination: host_pb2.Host, defined: Sequence[host_pb2.Network]) -> list[_Network]:
    names = sorted({network.name for networks in (source.networks, destination.networks, defined) for network in networks})
    return [
        _Network(
            name, *(tuple(n for n in networks if n.name == name) for networks in (source.networks, destination.networks, defined))
        )
        for name in names
    ]


def _judge(
    network: _Network,
    wish: Wish,
    known: Sequence[_Network],
    hosts: tuple[host_pb2.Host, host_pb2.Host],
    uses: Sequence[NetworkUse],
    *,
    role: bool,
) -> _Pair | _Out:
    if not network.all(role=role):
        return _Out("it does not have the migration role" if role else "it is not the fallback")
    listed = any(wish.tenant in other.tenants for other in known)
    if not network.admits(wish.tenant):
        return _Out(f"it is for the tenants {', '.join(sorted(network.tenants)[:3])}" + (" …" if len(network.tenants) > 3 else ""))
    if listed and wish.tenant not in network.tenants:
        return _Out(f"tenant {wish.tenant} has networks of its own")
    return _pair(network, wish, hosts, uses)


def _pair(network: _Network, wish: Wish, hosts: tuple[host_pb2.Host, host_pb2.Host], uses: Sequence[NetworkUse]) -> _Pair | _Out:
    """Return the addresses of both hosts on the network, of one family, by the destination's order; or why there are none."""
    for host, sides in zip(hosts, (network.source, network.destination), strict=True):
        if not sides:
            return _Out(f"{host.name} has no address on it", passes=True)
    both = [(s, d) for d in network.destination for s in network.source if _family(s) == _family(d)]
    if not both:
        return _Out(f"{hosts[0].name} and {hosts[1].name} have no addresses of one family on it", passes=True)
    up = [pair for pair in both if not (pair[0].down or pair[1].down)]
    if not up:
        down = [host.name for host, side in zip(hosts, both[0], strict=True) if side.down]
        return _Out(f"it is down on {' and '.join(down)}", passes=True)
    pair = _measured(*up[0], hosts, uses)
    most = min(filter(None, (pair.capacity, up[0][1].rules.max_bytes_per_second)), default=0)
    if wish.minimum > most:
        text = f"the guaranteed minimum of {rate_text(wish.minimum)} is more than the {rate_text(most)} that it can give"
        return _Out(text, too_slow=True)
    return pair


def _family(side: host_pb2.Network) -> int:
    try:
        return ip_address(side.address).version
    except ValueError:
        return 0


def _measured(
    source: host_pb2.Network, destination: host_pb2.Network, hosts: tuple[host_pb2.Host, host_pb2.Host], uses: Sequence[NetworkUse]
) -> _Pair:
    """Return the pair with its capacity, and what of it the other migrations leave: less than nothing where they want more."""
    others = [use for use in uses if use.network == destination.name]
    bounds = [
        (capacity_of(source), [use for use in others if use.source == hosts[0].name]),
        (capacity_of(destination), [use for use in others if use.destination == hosts[1].name]),
        *((side.rules.cap_bytes_per_second, others) for side in (source, destination) if side.rules.cap_bytes_per_second),
    ]
    free = min(most - sum(use.bandwidth or most for use in taking) for most, taking in bounds)
    return _Pair(source, destination, free, min(most for most, _ in bounds))


def capacity_of(side: host_pb2.Network) -> int:
    """Return the bytes per second of a host's line on a network."""
    return side.rules.capacity_bytes_per_second or side.line_bytes_per_second or UNKNOWN_LINE


def _chosen(best: _Pair, others: Sequence[_Pair], out: Mapping[str, _Out], *, role: bool) -> Choice:
    name = best.destination.name
    why = f"most free capacity: {rate_text(max(best.free, 0))} of {rate_text(best.capacity)}" if others else "no other can carry it"
    ruled_out = {
        o.destination.name: f"it has less free capacity: {rate_text(max(o.free, 0))} of {rate_text(o.capacity)}" for o in others
    }
    ruled_out |= {other: found.why for other, found in out.items()}
    if role:
        return Choice(best.source, best.destination, why, ruled_out)
    reasons = "; ".join(f"{other}: {why}" for other, why in ruled_out.items() if other != name)
    warning = (
        f"no network with the migration role can carry the guest's memory ({reasons or 'there is none'}); network {name} carries "
        "it, because its rules make it the fallback"
    )
    return Choice(best.source, best.destination, f"it is the fallback, and {why}", ruled_out, (cut(warning, 1024),))


def _named(
    wish: Wish, known: Sequence[_Network], source: host_pb2.Host, destination: host_pb2.Host, uses: Sequence[NetworkUse]
) -> Choice:
    network = next((network for network in known if network.name == wish.named), None)
    if network is None:
        raise _none(wish, source, destination, {})
    if not network.admits(wish.tenant):
        who = f"of tenant {wish.tenant}" if wish.tenant else "of no tenant"
        raise DroverError(
            Reason.NETWORK_FORBIDDEN,
            f"network {wish.named} is for guests of the tenants {', '.join(sorted(network.tenants))}, and the guest is {who}. "
            "Nothing was done to the guest; name another network, or none",
            metadata={"network": wish.named, "tenant": wish.tenant},
        )
    found = _pair(network, wish, (source, destination), uses)
    if isinstance(found, _Out):
        raise _none(wish, source, destination, {wish.named: found})
    warning = f"network {wish.named} has no migration role; it carries the guest's memory because it was named"
    return Choice(found.source, found.destination, "it was named", warnings=() if network.all(role=True) else (warning,))


def _none(wish: Wish, source: host_pb2.Host, destination: host_pb2.Host, out: Mapping[str, _Out]) -> DroverError:
    if wish.named:
        wanted, what_next = f'network "{wish.named}"', "name one that both hosts have, or none"
    else:
        wanted, what_next = f'a network with the role "{MIGRATION_ROLE}"', "name one that both hosts have, or make one the fallback"
    reasons = "; ".join(f"{name}: {found.why}" for name, found in out.items())
    passes = any(found.passes for found in out.values())
    too_slow = any(found.too_slow for found in out.values())
    return DroverError(
        Reason.BANDWIDTH_INSUFFICIENT if too_slow and not passes else Reason.NETWORK_NOT_FOUND,
        cut(
            f"{wanted} cannot be used from {source.name} to {destination.name}{f' ({reasons})' if reasons else ''}: the source has "
            f"{listing(source.networks)}, the destination has {listing(destination.networks)}. Nothing was done to the guest; "
            f"{what_next}",
            4000,
        ),
        metadata={"network": wish.named, **({"wait": "network"} if passes else {})},
    )


def listing(networks: Sequence[host_pb2.Network]) -> str:
    """Return the networks with their roles, for a person."""
    return ", ".join(f"{n.name} ({'/'.join(n.roles) or 'no role'})" for n in networks) or "none"
