"""Ranks the hosts that may take a guest, for a migration that names no destination, and plans it to each. Pure."""

from collections.abc import Mapping, Sequence
from typing import Final

from agent.admission.values import Limits
from agent.handshake.drive.ends import Candidate, Ends, Side
from agent.migration.planning import check_source, make_plan
from agent.runtime.errors import DroverError, Reason
from agent.runtime.wire import cut
from drover.agent.v1 import host_pb2
from drover.agent.v1 import migration_pb2 as pb

SILENT: Final = "it does not answer"
MOST_RANKED: Final = 16
"""Where so many are busy, a longer search would find no other; to plan takes some 0.4 ms."""
MOST_NAMED: Final = 32
"""Most hosts whose exclusion an error explains."""


def rank(
    spec: pb.MigrationSpec,
    source: Side,
    guest: host_pb2.GetDomainResponse,
    hosts: Mapping[str, Side | None],
    others: Sequence[pb.Migration] = (),
    networks: Sequence[host_pb2.Network] = (),
    planned: Mapping[str, int] | None = None,
) -> list[Candidate]:
    """Return hosts that may take the guest, at most `MOST_RANKED`, the best first: by free incoming units, then the shorter queue,
    then the name.

    `hosts`: those that may be chosen, by the name by which a spec names them; None for one that does not answer. `others`: as in
    `make_plan`. `networks`: as in `Ends`. `planned`: how many migrations have lately chosen each host, which their reports may not
    count yet: so many that start at once spread.

    Raises what keeps the guest from leaving its source; NO_HOST, with the reason for each host, if none may take it.
    """
    check_source(spec, source.host, guest)
    excluded: dict[str, str] = {}
    opened: list[tuple[tuple[int, int, str], Side]] = []
    for name, side in hosts.items():
        if side is not None and side.host.host_uuid == source.host.host_uuid:
            continue
        if side is None or (why := _closed(side.host)):
            excluded[name] = SILENT if side is None else why
        else:
            left = side.host.incoming_limit - side.host.incoming_in_use - (planned or {}).get(name, 0)
            opened.append(((-left, side.host.incoming_queue, name), side))
    ranked: list[Candidate] = []
    for (_, _, name), side in sorted(opened, key=lambda pair: pair[0]):
        if len(ranked) == MOST_RANKED:
            break
        ends = Ends(source, side, guest, networks)
        try:
            plan, warnings = make_plan(spec, ends, others)
        except DroverError as error:
            excluded[name] = f"{error.reason}: {error.message.partition('. Nothing was done')[0]}"
        else:
            ranked.append(Candidate(ends, plan, warnings, name, free=_is_free(side.host, guest.domain.memory_bytes)))
    if not ranked:
        raise _no_host(spec, source.host, excluded)
    return ranked


def _is_free(host: host_pb2.Host, memory_bytes: int) -> bool:
    cost = Limits(host.incoming_limit, host.prepared_limit, host.unit_memory_bytes).cost_of(memory_bytes)
    return not host.incoming_queue and host.incoming_limit - host.incoming_in_use >= cost


def _closed(host: host_pb2.Host) -> str:
    """Return why the host takes no guest that does not name it; empty: it does."""
    if host.draining:
        return "its agent is stopping"
    if host.settings.cordoned:
        change = host.cordon_change
        return "it is cordoned" + (f" by {change.changed_by}" if change.changed_by else "")
    return "" if host.incoming_limit else "its incoming limit is 0"


def _no_host(spec: pb.MigrationSpec, source: host_pb2.Host, excluded: Mapping[str, str]) -> DroverError:
    named = [f"{name}: {cut(why, 256)}" for name, why in sorted(excluded.items())[:MOST_NAMED]]
    more = f"; and {len(excluded) - MOST_NAMED} more" if len(excluded) > MOST_NAMED else ""
    reasons = "; ".join(named) + more or f"there is no host but {source.name}"
    return DroverError(
        Reason.NO_HOST,
        cut(f'no host can take guest "{spec.domain}" from {source.name} now ({reasons}). Nothing was done to it', 4000),
        metadata={"domain": spec.domain, "hosts": cut(reasons, 1024)},
    )
