"""The handshake of one host: both sides, the journal behind them, and the queries that anyone may make.

The engine is a `HandshakePeer`: the gRPC service and a driver in the same process call the same methods.
"""

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

import structlog

from agent.admission.desk import Desk
from agent.handshake.host.aftercare import Aftercare
from agent.handshake.host.attempt import Attempt
from agent.handshake.host.attempts import Attempts
from agent.handshake.host.departure import Departures
from agent.handshake.host.destination_effects import DestinationEffects
from agent.handshake.host.destination_side import DestinationSide
from agent.handshake.host.journal import Journal
from agent.handshake.host.owner import Owner
from agent.handshake.host.peer import OtherHost
from agent.handshake.host.peer_record import PeerRecords
from agent.handshake.host.phases import LocalHost, see, why_unresponsive
from agent.handshake.host.record_cache import RecordCache
from agent.handshake.host.records import MACHINES, AttemptRecord, Role
from agent.handshake.host.slots import RecordSlots
from agent.handshake.host.source_effects import SourceEffects
from agent.handshake.host.source_side import SourceSide
from agent.handshake.host.transfer import Transfers
from agent.handshake.machines.destination import DestinationEvent
from agent.handshake.machines.source import SourceEvent
from agent.runtime.errors import DroverError, Reason
from agent.runtime.failure import Failure
from agent.runtime.paging import Paging
from agent.runtime.wire import methods_of
from drover.agent.v1 import admission_pb2
from drover.agent.v1 import handshake_pb2 as pb

log = structlog.get_logger()

_SERVICES: Final = (
    pb.DESCRIPTOR.services_by_name["HandshakeService"],
    admission_pb2.DESCRIPTOR.services_by_name["AdmissionService"],
)
_RECENT: Final = 200
"""How many of the newest records tell at the start whose turn it is."""

RPCS: Final = frozenset(name for service in _SERVICES for name in methods_of(service))
"""Names of the methods that serve them."""


class Engine:
    """Every attempt in which this host takes part."""

    def __init__(
        self,
        host: LocalHost,
        journal: Journal,
        desk: Desk,
        take_over: Callable[[Attempt], None],
        other_side: Callable[[Attempt], OtherHost | None],
        heard: RecordCache,
    ) -> None:
        self.host = host
        self.desk = desk
        self._journal = journal
        look, why = functools.partial(see, host), functools.partial(why_unresponsive, host)
        peers = PeerRecords(host.name, other_side, heard)
        leaving, self._arriving = SourceEffects(host, peers), DestinationEffects(host, journal)
        effects = {Role.SOURCE: leaving.run, Role.DESTINATION: self._arriving.run}
        self._attempts = Attempts(journal, effects, look, why, self._put, host.clock, host.bus, desk.changed)
        self._slots = RecordSlots(host, self._attempts, desk)
        self._aftercare = Aftercare(host, other_side)
        self._owner = Owner(host, self._attempts, other_side)
        self._source = SourceSide(host, self._attempts, take_over, peers, Departures(host, self._attempts, self._owner), self._slots)
        self._destination = DestinationSide(host, self._attempts, self._slots, peers, self._owner)
        self._parts = (self._destination, self._source, self._slots, Transfers(host, self._attempts, leaving.session, other_side))
        self.check_leaving = self._source.check_leaving
        self.changed = self._attempts.changed
        """Rings whenever an attempt starts or ends here, and at every change of slots."""

    def __getattr__(self, name: str) -> Any:
        """Return the method of the part that serves the RPC of that name; see `RPCS`."""
        if name in RPCS:
            for part in self._parts:
                if hasattr(part, name):
                    return getattr(part, name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name}")

    async def recover(self) -> None:
        """Resume every attempt in the journal that has not ended, by its machine's RESTARTED event, and unfinished aftercare."""
        active = await self._journal.active()
        recent = await self._journal.page_of_attempts(active_only=False, before=None, limit=_RECENT)
        self._slots.recount(active, [record for _, record in recent])
        await self.desk.open()
        for record in active:
            attempt = self._attempts.adopt(record)
            log.info("recovering", migration=record.migration_id, role=record.role.value, state=record.state)
            if record.role is Role.SOURCE:
                self._source.recover(attempt)
                await attempt.apply(SourceEvent.RESTARTED, functools.partial(self._why, record, SourceEvent.RESTARTED))
            else:
                self._destination.recover(attempt)
                await attempt.apply(DestinationEvent.RESTARTED, functools.partial(self._why, record, DestinationEvent.RESTARTED))

        for record in await self._journal.aftercare():
            self._aftercare.start(self._attempts.adopt(record))

    def _why(self, record: AttemptRecord, restarted: str) -> dict[str, object]:
        """Return the failure to record if the restart ends the attempt; else no change."""
        transition = MACHINES[record.role].step(record.state, restarted)
        if record.failure is not None or transition is None or transition.state == record.state:
            return {}
        message = (
            f"the agent of {self.host.name} was restarted while this attempt was {record.state} there, so it was given up; the "
            "guest was not touched"
        )
        return {"failure": Failure(Reason.RESTARTED, message)}

    async def settle(self) -> None:
        """Settle arrivals with their sources, for as long as the agent runs: see `Owner.run`."""
        await self._owner.run()

    async def close(self) -> None:
        """Cancel the tasks of every attempt. Leaves the hypervisor and the journal as they are."""
        await asyncio.gather(self.desk.close(), *(attempt.close() for attempt in self._attempts.all()))
        self._destination.close()

    def _put(self, attempt: Attempt, before: AttemptRecord) -> None:
        self._slots.changed(attempt, before)
        if attempt.record.role is Role.DESTINATION:
            self._destination.changed(attempt, before)
        if attempt.record.final and not before.final:
            self._ended(attempt)

    def _ended(self, attempt: Attempt) -> None:
        attempt.signs.end()
        if attempt.record.role is Role.DESTINATION:
            attempt.start("close", self._arriving.close(attempt))
        self._aftercare.start(attempt)
        self.changed.ring()

    def active(self) -> list[Attempt]:
        """Return every attempt that has not ended here."""
        return [*self._attempts.active(Role.SOURCE), *self._attempts.active(Role.DESTINATION)]

    async def idle(self, timeout: float) -> bool:
        """Wait until no attempt is active. Return False if one still is after `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                while self.active():
                    await self.changed.next.wait()
        except TimeoutError:
            return False
        return True

    # ---- queries

    async def get_record(self, request: pb.GetRecordRequest) -> pb.GetRecordResponse:
        try:
            attempt = await self._attempts.find(request.ref)
        except DroverError as error:
            older = await self._older(request.ref) if error.reason is Reason.STALE_ATTEMPT else None
            if older is None:
                raise
            return pb.GetRecordResponse(record=self.host.show(older))
        return pb.GetRecordResponse(record=self.host.show(attempt.record, attempt.progress))

    async def _older(self, ref: pb.AttemptRef) -> AttemptRecord | None:
        """Return the record of an attempt that a later one has followed: it takes no more calls, but still shows the decision."""
        return await self._journal.get_attempt(ref.migration_id, ref.attempt)

    async def watch_record(self, request: pb.WatchRecordRequest) -> AsyncIterator[pb.WatchRecordResponse]:
        """Yield the record now and after each change, until it has ended. A slow reader skips records, never the last one."""
        attempt = await self._attempts.find(request.ref)
        async with contextlib.AsyncExitStack() as stack:
            counts = False
            async for record in attempt.changes():
                if not counts and attempt.signs.is_driver(request.driver):
                    await stack.enter_async_context(attempt.called(request_id=f"{request.driver}-"))
                    counts = True
                yield pb.WatchRecordResponse(record=self.host.show(record, attempt.progress))

    async def list_records(self, request: pb.ListRecordsRequest) -> pb.ListRecordsResponse:
        paging = Paging(request, int)
        before = None if paging.after is None else -int(paging.after[0])
        found = await self._journal.page_of_attempts(active_only=request.active_only, before=before, limit=paging.size + 1)
        page = paging.take(((-number,), self.host.show(record)) for number, record in found)
        return pb.ListRecordsResponse(records=page.items, next_page_token=page.token)
