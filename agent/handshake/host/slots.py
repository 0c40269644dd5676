"""The slots that records hold: incoming ones at the destination, outgoing ones at the source. Serves the calls about slots.

The record is the truth of its slot (epoch, kind, cost): the desk counts the records again after a restart.
"""

import asyncio
import contextlib
import weakref
from collections.abc import AsyncIterator, Iterable
from typing import Any, Final

from agent.admission.desk import Desk
from agent.admission.places import Caller
from agent.admission.values import Ask, Claim, Direction, Kind
from agent.admission.wire import ask_of, direction_of, slot_to_proto, wait_to_proto
from agent.handshake.host.attempt import Attempt
from agent.handshake.host.attempts import Attempts
from agent.handshake.host.phases import check_address, overtaken, wait_of
from agent.handshake.host.records import AttemptRecord, Role
from agent.handshake.machines.destination import DestinationEffect, DestinationState
from agent.handshake.machines.facts import sends
from agent.handshake.machines.source import SourceState
from agent.runtime.alongside import outlasting
from agent.runtime.errors import Reason, invalid_field
from agent.runtime.paging import Paging
from drover.agent.v1 import admission_pb2 as pb
from drover.agent.v1 import migration_pb2

_DIRECTIONS: Final = {Role.SOURCE: Direction.OUTGOING, Role.DESTINATION: Direction.INCOMING}

_BEFORE_TRANSFER: Final = frozenset(
    {
        SourceState.BEGINNING,
        SourceState.BEGUN,
        DestinationState.RESERVED,
        DestinationState.PREPARING,
        DestinationState.PREPARED,
    }
)
"""States in which a prepared slot is enough."""

_FLOWS: Final = frozenset({SourceState.PERFORMING, DestinationState.ARMED})
"""States in which memory may flow."""

_COMPLETED: Final = frozenset({SourceState.PERFORMED, DestinationState.RUNNING})
"""States after which the time for which the slot was held counts for estimates."""

_GIVEN_UP: Final = frozenset({SourceState.KEPT, DestinationState.GONE})

_UNENDED: Final = frozenset(
    {migration_pb2.MIGRATION_STATE_PENDING, migration_pb2.MIGRATION_STATE_ACTIVE, migration_pb2.MIGRATION_STATE_CANCELLING}
)


class RecordSlots:
    """The slots of the attempts of one host."""

    def __init__(self, attempts: Attempts, desk: Desk) -> None:
        self._attempts = attempts
        self._desk = desk
        self._changing: weakref.WeakKeyDictionary[Attempt, asyncio.Lock] = weakref.WeakKeyDictionary()

    # ---- records

    def recount(self, active: Iterable[AttemptRecord], recent: Iterable[AttemptRecord]) -> None:
        """Count the slots of the active records of earlier lives, before anything else is done with the desk. Whose turn it is
        follows from them, and from recent ones that have ended."""
        records = {record.key: record for record in (*recent, *active)}
        for record in sorted(records.values(), key=lambda record: record.epoch):
            direction = _DIRECTIONS[record.role]
            if record.holds_slot:
                kind = Kind.TRANSFERRING if record.transferring else Kind.PREPARED
                ask = Ask(record.migration_id, kind, record.peer_host)
                flows = record.state in _FLOWS
                self._desk.ledger.recount(direction, ask, epoch=record.epoch, cost=record.cost, since=record.created, flows=flows)
            elif not _returned(record):
                self._desk.books[direction].served(record.peer_host, record.epoch)

    @contextlib.asynccontextmanager
    async def taking(self, attempt: Attempt, peer_host: str, memory: int) -> AsyncIterator[dict[str, Any]]:
        """Hold a slot while the block makes the record of the attempt, with the yielded fields. Without the record it is as before.

        Raises:
            DroverError: BUSY, HOST_CLOSED, DRAINING.
        """
        direction = _DIRECTIONS[attempt.record.role]
        async with self._desk.taking(direction, Ask(attempt.record.migration_id, peer=peer_host, memory=memory)) as claim:
            yield _fields(claim)
            if attempt.record.holds_slot:
                self._desk.attach(direction, claim)

    def changed(self, attempt: Attempt, before: AttemptRecord) -> None:
        """Free the slot of a record that does not hold it any more."""
        record = attempt.record
        direction = _DIRECTIONS[record.role]
        if record.state in _FLOWS and before.state not in _FLOWS:
            self._desk.flows(direction, record.migration_id)
        if before.holds_slot and not record.holds_slot:
            if _returned(record):
                self._desk.returned(direction, record.migration_id, silent=_reason(record) is Reason.DRIVER_SILENT)
            elif transfer := _post_copy(attempt):
                attempt.start("slot", self._end_after(transfer, direction, record))
            else:
                self._end(direction, record)

    def _end(self, direction: Direction, record: AttemptRecord) -> None:
        self._desk.ended(direction, record.migration_id, completed=record.state in _COMPLETED)

    async def _end_after(self, transfer: Iterable[asyncio.Task[None]], direction: Direction, record: AttemptRecord) -> None:
        """Free the slot once the memory has been sent. After a restart of the agent meanwhile it counts no more."""
        await asyncio.wait(transfer)
        self._end(direction, record)

    async def allow_transfer(self, attempt: Attempt) -> None:
        """Make sure that the attempt's slot allows the transfer: a prepared one becomes a transferring one if it is its turn now.

        Raises:
            DroverError: BUSY; HOST_CLOSED.
        """
        record = attempt.record
        if record.transferring or not record.holds_slot:
            return
        direction = _DIRECTIONS[record.role]
        known = self._desk.books[direction].find(record.migration_id)
        memory, importance = (known.ask.memory, known.ask.importance) if known is not None else (0, Ask("").importance)
        ask = Ask(record.migration_id, Kind.TRANSFERRING, record.peer_host, importance, memory)
        claim, _ = await self._desk.acquire(direction, ask)
        await self._record(direction, claim)

    async def force_transfer(self, attempt: Attempt) -> None:
        """Let the attempt's slot transfer, also beyond the limit, as its memory flows."""
        direction = _DIRECTIONS[attempt.record.role]
        if (claim := self._desk.force(direction, attempt.record.migration_id)) is not None:
            await self._record(direction, claim)

    # ---- calls

    async def acquire_slot(self, request: pb.AcquireSlotRequest) -> pb.AcquireSlotResponse:
        direction, ask = direction_of(request), ask_of(request)
        check_address(request.peer_agent, "peer_agent")
        pending = _pending_of(request) if direction is Direction.OUTGOING and request.HasField("pending") else b""
        caller = Caller(request.driver, pending, request.peer_agent)
        if request.place_only:
            claim, before = await self._desk.keep_place(direction, ask, caller)
        else:
            claim, before = await self._desk.acquire(direction, ask, wait=wait_of(request.wait, unset=0.0), caller=caller)
            await self._record(direction, claim)
        response = pb.AcquireSlotResponse(other_driver=before if before != request.driver else "")
        ledger = self._desk.ledger
        if claim.slot is not None and claim.has(ask.kind):
            response.slot.CopyFrom(slot_to_proto(claim, claim.slot, direction, ledger.now, ledger.books[direction].lease))
        else:
            response.wait.CopyFrom(wait_to_proto(self._desk.standing(direction, claim), self._desk.host))
        return response

    async def release_slot(self, request: pb.ReleaseSlotRequest) -> pb.ReleaseSlotResponse:
        direction = direction_of(request)
        attempt = self._holder(direction, request.migration_id)
        if attempt is None:
            if request.cancelled and direction is Direction.OUTGOING:
                await self._desk.cancel(request.migration_id)
            self._desk.release(direction, request.migration_id, keep_place=request.keep_place)
        else:
            await outlasting(self._prepare_only(attempt, direction, keep_place=request.keep_place))
        return pb.ReleaseSlotResponse()

    async def _prepare_only(self, attempt: Attempt, direction: Direction, *, keep_place: bool) -> None:
        """Turn the slot of a record into a prepared one, unless its transfer has begun: then it ends with that."""
        async with self._changes(attempt):
            if await self._note(attempt, transferring=False):
                self._desk.release(direction, attempt.record.migration_id, keep_place=keep_place)

    async def list_slots(self, request: pb.ListSlotsRequest) -> pb.ListSlotsResponse:
        page = Paging(request, int, int, int).take(self._desk.slots())
        return pb.ListSlotsResponse(slots=page.items, next_page_token=page.token)

    # ---- parts

    def _holder(self, direction: Direction, migration_id: str) -> Attempt | None:
        """Return the attempt whose record holds the migration's slot."""
        attempt = self._attempts.newest(migration_id)
        holds = attempt is not None and attempt.record.holds_slot and _DIRECTIONS[attempt.record.role] is direction
        return attempt if holds else None

    async def _record(self, direction: Direction, claim: Claim) -> None:
        """Make it durable in the record that its slot allows the transfer."""
        attempt = self._holder(direction, claim.migration_id)
        if attempt is not None and not attempt.record.transferring:
            await outlasting(self._raise(attempt, direction, claim))

    async def _raise(self, attempt: Attempt, direction: Direction, claim: Claim) -> None:
        async with self._changes(attempt):
            if claim.slot is not None and claim.attached and claim.has(Kind.TRANSFERRING):
                await self._note(attempt, transferring=True, cost=claim.slot.cost)
                self._desk.attach(direction, claim)

    def _changes(self, attempt: Attempt) -> asyncio.Lock:
        """Return the lock that is held while the kind of a record's slot changes, in the record and at the desk."""
        return self._changing.setdefault(attempt, asyncio.Lock())

    async def _note(self, attempt: Attempt, **fields: Any) -> bool:
        """Change the record's slot, unless the transfer has begun. Return whether the record has these fields now."""

        def late() -> dict[str, Any]:
            return fields if attempt.record.state in _BEFORE_TRANSFER else {}

        if any(getattr(attempt.record, name) != value for name, value in fields.items()):
            await attempt.amend(late)
        return all(getattr(attempt.record, name) == value for name, value in fields.items())


def _pending_of(request: pb.AcquireSlotRequest) -> bytes:
    """Return the migration that this host is to take over. Raises INVALID_FIELD for another one, or one that has ended."""
    if request.pending.migration_id != request.migration_id:
        raise invalid_field("pending.migration_id", f"must be {request.migration_id}")
    if request.pending.state not in _UNENDED:
        raise invalid_field("pending.state", "must be that of a migration that waits")
    return request.pending.SerializeToString()


def check_transferring(attempt: Attempt) -> None:
    """Raise WRONG_PHASE if the slot has become prepared since it was made sure that it allows the transfer."""
    if not attempt.record.transferring:
        raise overtaken(attempt)


def _reason(record: AttemptRecord) -> Reason | None:
    return record.failure.reason if record.failure is not None else None


def _returned(record: AttemptRecord) -> bool:
    """Return whether an ended record gave its slot back unused, so that its migration keeps its place and its turn."""
    return record.state in _GIVEN_UP and _reason(record) is not Reason.CANCELLED


def _post_copy(attempt: Attempt) -> list[asyncio.Task[None]]:
    """Return what lasts as long as memory flows by post-copy, whose record needs no slot any more since the switch."""
    if attempt.record.role is Role.DESTINATION:
        return attempt.running(DestinationEffect.FINISH) if attempt.record.state == DestinationState.RUNNING else []
    return attempt.running("guest") if sends(attempt.record.state, attempt.progress) else []


def _fields(claim: Claim) -> dict[str, Any]:
    """Return the fields of a record that holds the slot."""
    assert claim.slot is not None
    return {"epoch": claim.slot.epoch, "transferring": claim.has(Kind.TRANSFERRING), "cost": claim.slot.cost}
