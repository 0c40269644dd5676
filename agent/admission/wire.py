"""Conversion of admission to and from the wire, and its errors."""

import time
from typing import Final, Literal

from agent.admission.book import Book
from agent.admission.estimate import likely
from agent.admission.values import MEDIUM, Ask, Claim, Direction, Kind, Slot
from agent.runtime.errors import DroverError, Reason, invalid_field
from agent.runtime.events import SlotChanged
from agent.runtime.wire import duration, timestamp
from drover.agent.v1 import admission_pb2 as pb
from drover.agent.v1 import migration_pb2
from drover.agent.v1.migration_pb2 import Wait

_DIRECTIONS: Final = {pb.SLOT_DIRECTION_INCOMING: Direction.INCOMING, pb.SLOT_DIRECTION_OUTGOING: Direction.OUTGOING}
_WIRE_DIRECTIONS: Final = {value: key for key, value in _DIRECTIONS.items()}
_UNENDED: Final = frozenset(
    {migration_pb2.MIGRATION_STATE_PENDING, migration_pb2.MIGRATION_STATE_ACTIVE, migration_pb2.MIGRATION_STATE_CANCELLING}
)
_MOST_ATTEMPTS: Final = 1_000_000
"""Of a migration that waits: more than it makes in 7 days."""
_VERBS: Final = {Direction.INCOMING: "come to", Direction.OUTGOING: "leave"}


def direction_of(request: pb.AcquireSlotRequest | pb.ReleaseSlotRequest) -> Direction:
    if request.direction not in _DIRECTIONS:
        raise invalid_field("direction", "must be SLOT_DIRECTION_INCOMING or SLOT_DIRECTION_OUTGOING")
    return _DIRECTIONS[request.direction]


def ask_of(request: pb.AcquireSlotRequest) -> Ask:
    if request.kind not in (pb.SLOT_KIND_UNSPECIFIED, *Kind):
        raise invalid_field("kind", "must be SLOT_KIND_PREPARED or SLOT_KIND_TRANSFERRING")
    if request.memory_bytes < 0:
        raise invalid_field("memory_bytes", f"must not be negative, but is {request.memory_bytes}")
    return Ask(
        request.migration_id,
        Kind(request.kind or Kind.TRANSFERRING),
        request.peer_host,
        min(request.importance, 3) if request.importance > 0 else MEDIUM,
        request.memory_bytes,
        request.driver,
        _pending_of(request),
        request.peer_agent,
    )


def _pending_of(request: pb.AcquireSlotRequest) -> bytes:
    """Return the migration that the source is to take over. Raises INVALID_FIELD for one that could not go on, or would for ever."""
    if request.direction != pb.SLOT_DIRECTION_OUTGOING or not request.HasField("pending"):
        return b""
    pending = request.pending
    valid = {
        "pending.migration_id": pending.migration_id == request.migration_id,
        "pending.spec": pending.HasField("spec"),
        "pending.state": pending.state in _UNENDED,
        "pending.attempt": 1 <= pending.attempt <= _MOST_ATTEMPTS,
        "pending.domain_uuid": bool(pending.domain_uuid),
        "pending.slot_wait": pending.slot_wait.ToNanoseconds() > 0,
        "peer_agent": bool(request.peer_agent),
    }
    for field, holds in valid.items():
        if not holds:
            raise invalid_field(field, f"must be that of migration {request.migration_id}, which waits for this slot")
    return pending.SerializeToString()


def holder_to_proto(claim: Claim, slot: Slot, book: Book, now: float) -> pb.SlotHolder:
    """Convert the slot of a claim. `now`: by the clock of the book."""
    holder = _shown(claim, book, now, slot.since)
    holder.kind, holder.epoch, holder.cost = slot.kind.value, slot.epoch, slot.cost  # type: ignore[assignment]
    if not slot.attached:
        holder.expire_time.CopyFrom(timestamp(time.time() + claim.seen + book.lease - now))
    return holder


def waiter_to_proto(claim: Claim, book: Book, now: float, position: int, turn: tuple[float, float]) -> pb.SlotHolder:
    """Convert a claim at a position of the queue. `turn`: the likely least and most seconds until its turn."""
    waiter = _shown(claim, book, now, claim.since)
    waiter.waiting, waiter.position = True, position
    waiter.estimate_low.CopyFrom(duration(turn[0]))
    waiter.estimate_high.CopyFrom(duration(turn[1]))
    return waiter


def _shown(claim: Claim, book: Book, now: float, since: float) -> pb.SlotHolder:
    return pb.SlotHolder(
        migration_id=claim.migration_id,
        direction=_WIRE_DIRECTIONS[book.direction],
        kind=claim.ask.kind.value,  # type: ignore[arg-type]
        peer_host=claim.ask.peer,
        importance=claim.ask.importance,  # type: ignore[arg-type]
        since_time=timestamp(time.time() - now + since),
        age=duration(max(0.0, now - since)),
    )


def slot_changed(claim: Claim, slot: Slot, book: Book, change: Literal["taken", "changed", "freed"]) -> SlotChanged:
    return SlotChanged(
        migration_id=claim.migration_id,
        direction=book.direction.value,
        slot_kind="prepared" if slot.kind is Kind.PREPARED else "transferring",
        change=change,
        in_use=book.transferring,
        limit=book.limits.limit,
    )


def busy(wait: Wait) -> DroverError:
    """Return the error for a migration that does not wait."""
    before, low, high = wait.position - 1, wait.estimate_low.ToNanoseconds() / 1e9, wait.estimate_high.ToNanoseconds() / 1e9
    queue = f", and {before} {'migration waits' if before == 1 else 'migrations wait'} before this one" if before else ""
    return DroverError(
        Reason.BUSY,
        f"{wait.in_use} of {wait.limit_value} {wait.limit.removesuffix('_limit')} slots of {wait.host} are taken{queue}. Nothing "
        f"was done to the guest; its turn would likely come {likely(low, high)}: let it wait (--wait), or choose another host",
        metadata={
            "host": wait.host,
            "limit": wait.limit,
            "limit_value": str(wait.limit_value),
            "in_use": str(wait.in_use),
            "position": str(wait.position),
            "queue_length": str(wait.queue_length),
            "estimate_low": f"{low:.1f}",
            "estimate_high": f"{high:.1f}",
            "holders": ",".join(wait.holders),
        },
        retry_after=max(1.0, low),
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


def was_cancelled(migration_id: str, host: str, seconds_ago: float, given_up_for: str) -> DroverError:
    how, why = ("given up by its driver", f": {given_up_for}") if given_up_for else ("cancelled on request", "")
    return DroverError(
        Reason.GIVEN_UP if given_up_for else Reason.CANCELLED,
        f"migration {migration_id} was {how}, as {host} was told {seconds_ago:.0f} s ago{why}. Nothing was done to the guest; to "
        "move it, start a new migration, with a new id",
        metadata={"host": host, "cancelled": f"{seconds_ago:.0f}"},
    )
