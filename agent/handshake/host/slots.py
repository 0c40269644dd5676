"""The slots that records hold: incoming ones at the destination, outgoing ones at the source. Serves the calls about slots.

The record is the truth of its slot (epoch, kind, cost): the desk counts the records again after a restart.
"""

import asyncio
import contextlib
import functools
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

from agent.admission.desk import Desk
from agent.admission.queue import Queue
from agent.admission.values import Ask, Claim, Direction, Kind, Slot
from agent.admission.wire import ask_of, direction_of, holder_to_proto
from agent.handshake.host.attempt import Attempt
from agent.handshake.host.attempts import Attempts
from agent.handshake.host.phases import LocalHost, check_address, overtaken, wait_of
from agent.handshake.host.records import AttemptRecord, Role
from agent.handshake.machines.destination import DestinationEffect, DestinationState
from agent.handshake.machines.facts import sends
from agent.handshake.machines.source import SourceState
from agent.hypervisor.reasons import translated
from agent.runtime.alongside import outlasting
from agent.runtime.errors import Reason
from agent.runtime.paging import Paging
from drover.agent.v1 import admission_pb2 as pb

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

PAGE: Final = 100
"""Slots and waiters of a page whose size the request does not say."""

_GIVEN_UP: Final = frozenset({SourceState.KEPT, DestinationState.GONE})


class RecordSlots:
    """The slots of the attempts of one host."""

    def __init__(self, host: LocalHost, attempts: Attempts, desk: Desk) -> None:
        self._host = host
        self._attempts = attempts
        self._desk = desk
        self._changing: weakref.WeakKeyDictionary[Attempt, asyncio.Lock] = weakref.WeakKeyDictionary()

    # ---- records

    def recount(self, active: Iterable[AttemptRecord], recent: Iterable[AttemptRecord]) -> None:
        """Count the slots of the active records of earlier lives, before anything else is done with the desk. Whose turn it is
        follows from them, and from recent ones that have ended."""
        records = {record.key: record for record in (*recent, *active)}
        for record in sorted(records.values(), key=lambda record: record.epoch):
            queue = self._queue(record)
            if record.holds_slot:
                kind = Kind.TRANSFERRING if record.transferring else Kind.PREPARED
                since = queue.now - max(0.0, time.time() - record.created)
                slot = Slot(kind, record.cost, record.epoch, since, attached=True, flows=record.state in _FLOWS)
                queue.book.adopt(Claim(Ask(record.migration_id, kind, record.peer_host), record.epoch, since, slot), queue.now)
            elif not _returned(record):
                queue.book.served(record.peer_host, record.epoch)

    @contextlib.contextmanager
    def taking(self, attempt: Attempt, peer_host: str, memory: int) -> Iterator[dict[str, Any]]:
        """Hold a slot while the block makes the record of the attempt, with the yielded fields. Without the record it is as before.

        Raises:
            DroverError: BUSY, HOST_CLOSED, DRAINING.
        """
        ask = Ask(attempt.record.migration_id, peer=peer_host, memory=memory)
        with self._queue(attempt.record).taking(ask) as slot:
            yield {"epoch": slot.epoch, "transferring": slot.kind is Kind.TRANSFERRING, "cost": slot.cost}
            if attempt.record.holds_slot:
                slot.attached = True

    def check_not_cancelled(self, attempt: Attempt) -> None:
        """Raise CANCELLED if the migration was given up here, such as just before its record is made."""
        self._queue(attempt.record).check_not_cancelled(attempt.record.migration_id)

    def changed(self, attempt: Attempt, before: AttemptRecord) -> None:
        """Free the slot of a record that does not hold it any more."""
        record = attempt.record
        queue = self._queue(record)
        if record.state in _FLOWS and before.state not in _FLOWS:
            queue.flows(record.migration_id)
        if before.holds_slot and not record.holds_slot:
            silent, completed = _reason(record) is Reason.DRIVER_SILENT, record.state in _COMPLETED
            end = functools.partial(queue.ended, record.migration_id, completed=completed, returned=_returned(record), silent=silent)
            if transfer := _post_copy(attempt):
                attempt.start("slot", self._after(transfer, end))
            else:
                end()

    @staticmethod
    async def _after(transfer: Iterable[asyncio.Task[None]], end: Callable[[], None]) -> None:
        """Free the slot once the memory has been sent. After a restart of the agent meanwhile it counts no more."""
        await asyncio.wait(transfer)
        end()

    async def allow_transfer(self, attempt: Attempt, *, force: bool = False) -> None:
        """Make sure that the attempt's slot allows the transfer: a prepared one becomes a transferring one if it is its turn now.
        `force`: also beyond the limit, as its memory flows.

        Raises:
            DroverError: BUSY; HOST_CLOSED.
        """
        record, queue = attempt.record, self._queue(attempt.record)
        if not record.transferring and record.holds_slot:
            await self._record(queue, queue.transfer(Ask(record.migration_id, peer=record.peer_host), force=force))

    # ---- calls

    async def acquire_slot(self, request: pb.AcquireSlotRequest) -> pb.AcquireSlotResponse:
        queue, ask = self._desk.queues[direction_of(request)], ask_of(request)
        check_address(request.peer_agent, "peer_agent")
        if ask.pending and ((known := queue.book.find(ask.migration_id)) is None or known.row is None):
            with translated(self._host.name, request.pending.domain_uuid):
                await self._host.hypervisor.get_domain(request.pending.domain_uuid)
        known = queue.book.find(ask.migration_id)
        other = known.ask.driver if known is not None and known.ask.driver != ask.driver else ""
        if request.place_only:
            claim = await queue.keep_place(ask)
        else:
            claim = await queue.acquire(ask, wait=wait_of(request.wait, unset=0.0))
            await self._record(queue, claim)
        response = pb.AcquireSlotResponse(other_driver=other)
        if claim.slot is not None and claim.has(ask.kind):
            response.slot.CopyFrom(holder_to_proto(claim, claim.slot, queue.book, queue.now))
        else:
            response.wait.CopyFrom(queue.standing(claim))
        return response

    async def release_slot(self, request: pb.ReleaseSlotRequest) -> pb.ReleaseSlotResponse:
        queue = self._desk.queues[direction_of(request)]
        holder = functools.partial(self._holder, queue, request.migration_id)
        if request.cancelled and queue.book.direction is Direction.OUTGOING and holder() is None:
            await queue.places.cancel(request.migration_id, request.given_up_for)
        if (attempt := holder()) is not None:  # perhaps of a Begin that was under way before
            await outlasting(self._prepare_only(attempt, queue, keep_place=request.keep_place))
        else:
            queue.release(request.migration_id, keep_place=request.keep_place)
        return pb.ReleaseSlotResponse()

    async def _prepare_only(self, attempt: Attempt, queue: Queue, *, keep_place: bool) -> None:
        """Turn the slot of a record into a prepared one, unless its transfer has begun: then it ends with that."""
        async with self._changes(attempt):
            if await self._note(attempt, transferring=False):
                queue.release(attempt.record.migration_id, keep_place=keep_place)

    async def list_slots(self, request: pb.ListSlotsRequest) -> pb.ListSlotsResponse:
        page = Paging(request, int, int, int, default=PAGE).take(self._desk.slots())
        return pb.ListSlotsResponse(slots=page.items, next_page_token=page.token)

    # ---- parts

    def _queue(self, record: AttemptRecord) -> Queue:
        return self._desk.queues[_DIRECTIONS[record.role]]

    def _holder(self, queue: Queue, migration_id: str) -> Attempt | None:
        """Return the attempt whose record holds the migration's slot."""
        attempt = self._attempts.newest(migration_id)
        holds = attempt is not None and attempt.record.holds_slot and self._queue(attempt.record) is queue
        return attempt if holds else None

    async def _record(self, queue: Queue, claim: Claim) -> None:
        """Make it durable in the record that its slot allows the transfer."""
        attempt = self._holder(queue, claim.migration_id)
        if attempt is not None and not attempt.record.transferring:
            await outlasting(self._raise(attempt, claim))

    async def _raise(self, attempt: Attempt, claim: Claim) -> None:
        async with self._changes(attempt):
            if claim.slot is not None and claim.attached and claim.has(Kind.TRANSFERRING):
                await self._note(attempt, transferring=True, cost=claim.slot.cost)

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
    return attempt.running("progress") if sends(attempt.record.state, attempt.progress) else []
