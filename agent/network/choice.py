"""Choice of the network that carries a guest's memory. Pure.

In this order: the user's word; the role "migration"; tenants (a guest whose tenant any network lists uses only those that list it,
every other guest only networks without tenants); an address on both hosts, of one family, on interfaces that are up; room for the
guaranteed minimum; then the most free capacity for this migration, then the name. Where nothing is left: a network whose rules make
it the fallback, chosen in the same way, with a warning."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Final

from agent.network.rules import DRAINED_ROLE, MIGRATION_ROLE, without_tenants
from agent.runtime.errors import DroverError, Reason
from agent.runtime.units import rate
from agent.runtime.wire import cut
from drover.agent.v1 import host_pb2
from drover.agent.v1 import migration_pb2 as pb

UNKNOWN_LINE: Final = 125_000_000
"""Bytes per second by which a line of unknown speed is compared with others: 1 Gbit/s."""
MOST_RULED_OUT: Final = 8

_Hosts = tuple[host_pb2.Host, host_pb2.Host]
"""Source and destination."""


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
    """The network of one migration."""

    message: pb.NetworkChoice
    default_limit: int = 0
    """Bytes per second of a migration that names no limit, by the network's rules. 0: none."""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Network:
    """One network as both hosts and the cluster know it. The cluster's own definition has no address."""

    name: str
    defined: tuple[host_pb2.Network, ...]
    source: tuple[host_pb2.Network, ...]
    destination: tuple[host_pb2.Network, ...]

    @property
    def sides(self) -> tuple[host_pb2.Network, ...]:
        return self.defined + self.source + self.destination

    @property
    def tenants(self) -> frozenset[str]:
        return frozenset(tenant for side in self.sides for tenant in side.rules.tenants)

    def all(self, *, role: bool) -> bool:
        """Return whether it has the migration role (else: is the fallback), as far as anybody knows it."""
        return all(MIGRATION_ROLE in side.roles if role else side.rules.fallback for side in self.sides)

    @property
    def drained(self) -> bool:
        return any(DRAINED_ROLE in side.roles for side in self.sides)

    def admits(self, tenant: str) -> bool:
        return all(not side.rules.tenants or tenant in side.rules.tenants for side in self.sides)


@dataclass(frozen=True)
class _Pair:
    """A network that can be used, with the address of each host."""

    network: _Network
    source: host_pb2.Network
    destination: host_pb2.Network
    free: int
    """What the other migrations leave of `capacity`: less than nothing where they want more."""
    capacity: int

    @property
    def rank(self) -> tuple[int, int, str]:
        most = self.destination.rules.max_bytes_per_second
        return -min(self.free, most or self.free), -self.free, self.network.name

    @property
    def figures(self) -> str:
        return f"free capacity: {rate(max(self.free, 0))} of {rate(self.capacity)}"

    def chosen(self, why: str, ruled_out: Mapping[str, str], *warnings: str) -> Choice:
        out = [pb.RuledOutNetwork(name=name, why=cut(reason, 256)) for name, reason in ruled_out.items()]
        message = pb.NetworkChoice(
            network=self.network.name,
            why=why,
            ruled_out=out[:MOST_RULED_OUT],
            source_address=self.source.address,
            destination_address=self.destination.address,
            rules=without_tenants(self.destination.rules) if self.destination.cluster else None,
        )
        defaults = [side.rules.default_bytes_per_second for side in self.network.sides]
        return Choice(message, next(filter(None, defaults), 0), warnings)


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
    others: Sequence[pb.Migration] = (),
) -> Choice:
    """Return the network of a migration. `defined`: networks that the cluster knows, without addresses. `others`: migrations that
    are planned, wait or run. One without a limit wants the whole line.

    Raises NETWORK_NOT_FOUND (with metadata ``wait=network`` where one is only down, or without an address, now), NETWORK_FORBIDDEN
    (the named network does not admit the guest's tenant, or is being drained), BANDWIDTH_INSUFFICIENT (none can give the guaranteed
    minimum)."""
    hosts, all_sides = (source, destination), (defined, source.networks, destination.networks)
    names = sorted({side.name for sides in all_sides for side in sides})
    known = [_Network(name, *(tuple(side for side in sides if side.name == name) for sides in all_sides)) for name in names]
    if wish.named:
        return _named(wish, known, hosts, others)
    listed = any(wish.tenant in network.tenants for network in known)
    out: dict[str, _Out] = {}
    for role in (True, False):
        pairs: list[_Pair] = []
        for network in known:
            found = _excluded(network, wish.tenant, listed=listed, role=role) or _pair(network, wish, hosts, others)
            if isinstance(found, _Pair):
                pairs.append(found)
                out.pop(network.name, None)
            elif role or network.all(role=False):
                out[network.name] = found
        if pairs:
            return _best(sorted(pairs, key=lambda pair: pair.rank), out, role=role)
    raise _none(wish, hosts, out)


def _excluded(network: _Network, tenant: str, *, listed: bool, role: bool) -> _Out | None:
    """Return why the rules keep the migration from the network. `listed`: whether any network lists its tenant."""
    if network.drained:
        return _Out("it is being drained")
    if not network.all(role=role):
        return _Out("it does not have the migration role" if role else "it is not the fallback")
    if not network.admits(tenant):
        return _Out(f"it is for the tenants {', '.join(sorted(network.tenants)[:3])}" + (" …" if len(network.tenants) > 3 else ""))
    return _Out(f"tenant {tenant} has networks of its own") if listed and tenant not in network.tenants else None


def _pair(network: _Network, wish: Wish, hosts: _Hosts, others: Sequence[pb.Migration]) -> _Pair | _Out:
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
    source, destination = up[0]
    on_it = [other for other in others if other.network_choice.network == network.name]
    bounds = [
        (_capacity(source), [other for other in on_it if other.source_host == hosts[0].name]),
        (_capacity(destination), [other for other in on_it if other.destination_host == hosts[1].name]),
        *((side.rules.cap_bytes_per_second, on_it) for side in up[0] if side.rules.cap_bytes_per_second),
    ]
    free = min(most - sum(other.settings.bandwidth_bytes_per_second or most for other in taking) for most, taking in bounds)
    capacity = min(most for most, _ in bounds)
    most = min(capacity, destination.rules.max_bytes_per_second or capacity)
    if wish.minimum > most:
        text = f"the guaranteed minimum of {rate(wish.minimum)} is more than the {rate(most)} that it can give"
        return _Out(text, too_slow=True)
    return _Pair(network, source, destination, free, capacity)


def _family(side: host_pb2.Network) -> int:
    try:
        return ip_address(side.address).version
    except ValueError:
        return 0


def _capacity(side: host_pb2.Network) -> int:
    """Return the bytes per second of a host's line on a network."""
    return side.rules.capacity_bytes_per_second or side.line_bytes_per_second or UNKNOWN_LINE


def _best(pairs: Sequence[_Pair], out: Mapping[str, _Out], *, role: bool) -> Choice:
    """Return the choice of the first pair, before the others."""
    best, *others = pairs
    why = f"most {best.figures}" if others else "no other can carry it"
    ruled_out = {other.network.name: f"it has less {other.figures}" for other in others}
    ruled_out |= {name: found.why for name, found in out.items()}
    if role:
        return best.chosen(why, ruled_out)
    name = best.network.name
    reasons = "; ".join(f"{other}: {why}" for other, why in ruled_out.items() if other != name)
    warning = (
        f"no network with the migration role can carry the guest's memory ({reasons or 'there is none'}); network {name} carries "
        "it, because its rules make it the fallback"
    )
    return best.chosen(f"it is the fallback, and {why}", ruled_out, cut(warning, 1024))


def _named(wish: Wish, known: Sequence[_Network], hosts: _Hosts, others: Sequence[pb.Migration]) -> Choice:
    network = next((network for network in known if network.name == wish.named), None)
    if network is None:
        raise _none(wish, hosts, {})
    if not network.admits(wish.tenant):
        who = f"of tenant {wish.tenant}" if wish.tenant else "of no tenant"
        raise DroverError(
            Reason.NETWORK_FORBIDDEN,
            f"network {wish.named} is for guests of the tenants {', '.join(sorted(network.tenants))}, and the guest is {who}. "
            "Nothing was done to the guest; name another network, or none",
            metadata={"network": wish.named, "tenant": wish.tenant},
        )
    if network.drained:
        raise DroverError(
            Reason.NETWORK_FORBIDDEN,
            f"network {wish.named} is being drained: its migration role is taken once the migrations on it have ended, and it takes "
            "no new one. Nothing was done to the guest; name another network, or none",
            metadata={"network": wish.named},
        )
    found = _pair(network, wish, hosts, others)
    if isinstance(found, _Out):
        raise _none(wish, hosts, {wish.named: found})
    warning = f"network {wish.named} has no migration role; it carries the guest's memory because it was named"
    return found.chosen("it was named", {}, *([] if network.all(role=True) else [warning]))


def _none(wish: Wish, hosts: _Hosts, out: Mapping[str, _Out]) -> DroverError:
    source, destination = hosts
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
