"""The transfers of migrations as `agent.transfer.shares` divides bandwidth among them. Pure."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Final

from agent.network.rules import interface_to
from agent.runtime.errors import DroverError, Reason
from agent.runtime.units import rate
from agent.transfer.shares import Flow, Shortage
from drover.agent.v1 import host_pb2
from drover.agent.v1 import migration_pb2 as pb

WEIGHTS: Final[Mapping[pb.Importance.ValueType, int]] = {pb.IMPORTANCE_LOW: 1, pb.IMPORTANCE_MEDIUM: 2, pb.IMPORTANCE_HIGH: 4}
PAYLOAD: Final = 0.94
"""Part of a line's speed that carries data; the rest are headers of packets."""
MIB: Final = 1 << 20

HostOf = Callable[[str], host_pb2.Host | None]
"""Returns a host by its name, with its sides of the networks as they are now; None if it is not known."""


def flow_of(migration: pb.Migration, host: HostOf) -> tuple[Flow, dict[str, int]]:
    """Return the migration's transfer, and the capacities of the links that it passes, in bytes per second (0: unknown). The line of
    a host that is not known, or is not on the migration's network, is left out; so is every one where the source cannot limit rates.
    Of a network of the cluster, the rules in the migration's choice count: agents know no others.
    """
    lines: dict[str, int] = {}
    caps: dict[str, int] = {}
    source, choice = host(migration.source_host), migration.network_choice
    most = [migration.settings.bandwidth_bytes_per_second, choice.rules.max_bytes_per_second]
    if choice.rules.cap_bytes_per_second:
        caps[f"network {migration.network}"] = choice.rules.cap_bytes_per_second
    for end, address, way in (
        (source, choice.source_address, "out of"),
        (host(migration.destination_host), choice.destination_address, "into"),
    ):
        if end is None or (side := _side(end, migration.network, address, choice.destination_address)) is None:
            continue
        rules = choice.rules if choice.HasField("rules") else side.rules
        lines[f"the line {way} {end.name} ({side.interface or side.name})"] = int(
            PAYLOAD * (rules.capacity_bytes_per_second or side.line_bytes_per_second)
        )
        most.append(rules.max_bytes_per_second)
        if cap := _least([rules.cap_bytes_per_second, *caps.values()]):
            caps[f"network {migration.network}"] = cap
    if source is not None and not source.migration_features.bandwidth:
        lines = {}
    flow = Flow(
        lines=tuple(lines),
        caps=tuple(caps),
        weight=WEIGHTS.get(migration.settings.importance, WEIGHTS[pb.IMPORTANCE_MEDIUM]),
        least=migration.settings.min_bandwidth_bytes_per_second,
        most=_least(most),
        unit=source.migration_features.bandwidth_unit or MIB if source is not None else MIB,
    )
    return flow, lines | caps


def _side(host: host_pb2.Host, network: str, address: str, reached: str) -> host_pb2.Network | None:
    """Return the host's side of a network: of those of several address families, that with the address. Of one that it does not know
    by that name (an agent has taken the migration over), that from which the address `reached` is reached."""
    sides = [side for side in host.networks if side.name == network]
    if not sides:
        interface = interface_to(reached, host.interfaces)
        sides = [side for side in host.networks if interface and side.interface == interface]
    return next((side for side in sides if side.address == address), sides[0] if sides else None)


def _least(limits: Iterable[int]) -> int:
    """Return the lowest limit; 0: there is none."""
    return min((limit for limit in limits if limit), default=0)


def insufficient(migration: pb.Migration, found: Shortage) -> DroverError:
    """Return the error for a guaranteed minimum that does not fit."""
    what = "its guaranteed minimum" if migration.settings.min_bandwidth_bytes_per_second else "the least that can be enforced"
    fits = found.wanted <= found.capacity
    return DroverError(
        Reason.BANDWIDTH_INSUFFICIENT,
        f"guest {migration.domain_name} needs {rate(found.wanted)} ({what}) on {found.link}, where {rate(found.left)} are "
        f"left: {rate(found.guaranteed)} of {rate(found.capacity)} are guaranteed to others. Nothing was done to the "
        f"guest; ask for a lower minimum{', or wait until other migrations have ended' if fits else ''}",
        metadata={
            **{name: str(value) for name, value in asdict(found).items()},
            "left": str(found.left),
            **({"wait": "bandwidth"} if fits else {}),
        },
    )
