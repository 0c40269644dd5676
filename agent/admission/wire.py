"""Conversion of admission to and from the wire, and its errors."""

import time
from typing import Final

from agent.admission.values import MEDIUM, Ask, Claim, Direction, Kind, Slot, Standing
from agent.runtime.errors import DroverError, Reason, invalid_field
from agent.runtime.wire import duration, timestamp
from drover.agent.v1 import admission_pb2 as pb
from drover.agent.v1 import migration_pb2

_DIRECTIONS: Final = {pb.SLOT_DIRECTION_INCOMING: Direction.INCOMING, pb.SLOT_DIRECTION_OUTGOING: Direction.OUTGOING}
_WIRE_DIRECTIONS: Final = {value: key for key, value in _DIRECTIONS.items()}
_KINDS: Final = {
    pb.SLOT_KIND_UNSPECIFIED: Kind.TRANSFERRING,
    pb.SLOT_KIND_PREPARED: Kind.PREPARED,
    pb.SLOT_KIND_TRANSFERRING: Kind.TRANSFERRING,
}
_REASONS: Final = {
    Direction.INCOMING: migration_pb2.WAIT_REASON_SLOT,
    Direction.OUTGOING: migration_pb2.WAIT_REASON_OUTGOING_SLOT,
}
_VERBS: Final = {Direction.INCOMING: "come to", Direction.OUTGOING: "leave"}


def direction_of(request: pb.AcquireSlotRequest | pb.ReleaseSlotRequest) -> Direction:
    if request.direction not in _DIRECTIONS:
        raise invalid_field("direction", "must be SLOT_DIRECTION_INCOMING or SLOT_DIRECTION_OUTGOING")
    return _DIRECTIONS[request.direction]


def importance_of(value: int) -> int:
    """Return the importance as a number that orders queues: 1 to 3."""
    return min(value, 3) if value > 0 else MEDIUM


def ask_of(request: pb.AcquireSlotRequest) -> Ask:
    if request.kind not in _KINDS:
        raise invalid_field("kind", "must be SLOT_KIND_PREPARED or SLOT_KIND_TRANSFERRING")
    if request.memory_bytes < 0:
        raise invalid_field("memory_bytes", f"must not be negative, but is {request.memory_bytes}")
    return Ask(
        request.migration_id, _KINDS[request.kind], request.peer_host, importance_of(request.importance), request.memory_bytes
    )


def slot_to_proto(claim: Claim, slot: Slot, direction: Direction, now: float, lease: float) -> pb.SlotHolder:
    """Convert a taken slot. `now`: by the clock of the book."""
    holder = _holder(claim, direction, now, slot.since)
    holder.kind, holder.epoch, holder.cost = slot.kind.value, slot.epoch, slot.cost  # type: ignore[assignment]
    if not slot.attached:
        holder.expire_time.CopyFrom(timestamp(time.time() + claim.seen + lease - now))
    return holder


def waiter_to_proto(claim: Claim, direction: Direction, now: float, position: int, until: tuple[float, float]) -> pb.SlotHolder:
    """Convert a waiter. `until`: the likely time until its turn."""
    holder = _holder(claim, direction, now, claim.since)
    holder.waiting, holder.position = True, position
    holder.estimate_low.CopyFrom(duration(until[0]))
    holder.estimate_high.CopyFrom(duration(until[1]))
    return holder


def _holder(claim: Claim, direction: Direction, now: float, since: float) -> pb.SlotHolder:
    return pb.SlotHolder(
        migration_id=claim.migration_id,
        direction=_WIRE_DIRECTIONS[direction],
        kind=claim.ask.kind.value,  # type: ignore[arg-type]
        peer_host=claim.ask.peer,
        importance=claim.ask.importance,  # type: ignore[arg-type]
        since_time=timestamp(time.time() - now + since),
        age=duration(max(0.0, now - since)),
    )


def wait_to_proto(standing: Standing, host: str) -> migration_pb2.Wait:
    return migration_pb2.Wait(
        reason=_REASONS[standing.direction],
        host=host,
        limit=f"{standing.direction}_limit",
        limit_value=standing.limit,
        in_use=standing.in_use,
        holders=standing.holders,
        position=standing.position,
        queue_length=standing.queue_length,
        estimate_low=duration(standing.low),
        estimate_high=duration(standing.high),
    )


def busy(standing: Standing, host: str) -> DroverError:
    """Return the error for a migration that does not wait."""
    before = standing.position - 1
    queue = f", and {before} {'migration waits' if before == 1 else 'migrations wait'} before this one" if before else ""
    return DroverError(
        Reason.BUSY,
        f"{standing.in_use} of {standing.limit} {standing.direction} slots of {host} are taken{queue}. Nothing was done to the "
        f"guest; its turn would come in about {standing.low:.0f} to {standing.high:.0f} s: let it wait (--wait), or choose another "
        "host",
        metadata={
            "host": host,
            "limit": f"{standing.direction}_limit",
            "limit_value": str(standing.limit),
            "in_use": str(standing.in_use),
            "position": str(standing.position),
            "queue_length": str(standing.queue_length),
            "estimate_low": f"{standing.low:.1f}",
            "estimate_high": f"{standing.high:.1f}",
            "holders": ",".join(standing.holders),
        },
        retry_after=max(1.0, standing.low),
    )


def closed(direction: Direction, host: str) -> DroverError:
    return DroverError(
        Reason.HOST_CLOSED,
        f"{host} is closed: its {direction}_limit is 0, so no guest can {_VERBS[direction]} it. Nothing was done to the guest; "
        f"choose another host, or raise the limit: drover host set {host} --{direction}-limit N",
        metadata={"host": host, "limit": f"{direction}_limit", "limit_value": "0"},
    )


def queue_full(direction: Direction, host: str, most: int) -> DroverError:
    return DroverError(
        Reason.OVERLOADED,
        f"{most} migrations wait for the {direction} slots of {host} already. Nothing was done to the guest; try again later",
        metadata={"host": host, "limit": f"{direction}_queue", "limit_value": str(most)},
        retry_after=30.0,
    )


def given_back(direction: Direction, host: str) -> DroverError:
    return DroverError(Reason.CANCELLED, f"the place in the queue for {direction} slots of {host} was given back")


def was_cancelled(migration_id: str, host: str, seconds_ago: float) -> DroverError:
    return DroverError(
        Reason.CANCELLED,
        f"migration {migration_id} was cancelled on request, as {host} was told {seconds_ago:.0f} s ago. Nothing was done to the "
        "guest; to move it, start a new migration, with a new id",
        metadata={"host": host, "cancelled": f"{seconds_ago:.0f}"},
    )
