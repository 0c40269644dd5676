"""The destination's calls: ReserveSlot, Prepare, Finish and Abandon, and the lease of its slot."""

import time
from typing import Any, Final

from agent.handshake.host.arrival import check_arrival, tombstone_fields
from agent.handshake.host.attempt import Attempt
from agent.handshake.host.attempts import Attempts
from agent.handshake.host.owner import Owner
from agent.handshake.host.path import PathProbes
from agent.handshake.host.peer_record import PeerRecords
from agent.handshake.host.phases import (
    LocalHost,
    check_same,
    check_statement,
    overtaken,
    phase_changes,
    stated_changes,
    wait_of,
)
from agent.handshake.host.records import AttemptRecord, Role
from agent.handshake.host.signs import MAX_WAIT
from agent.handshake.host.slots import RecordSlots, check_transferring
from agent.handshake.host.stopwatch import timed
from agent.handshake.host.stored import changes_of, check_documents
from agent.handshake.machines.destination import DestinationEvent, DestinationState
from agent.hypervisor.features import settled
from agent.hypervisor.wire import options_from_proto
from agent.runtime.errors import DroverError, Reason
from agent.runtime.failure import Failure
from drover.agent.v1 import handshake_pb2 as pb

_S, _E = DestinationState, DestinationEvent

_AFTER_PREPARE: Final = frozenset(_S) - {_S.RESERVED, _S.PREPARING, _S.ABANDONING}
_DECIDED: Final = frozenset({_S.RUNNING, _S.GONE})


class DestinationSide:
    """The destination's calls on one host."""

    def __init__(self, host: LocalHost, attempts: Attempts, slots: RecordSlots, peers: PeerRecords, owner: Owner) -> None:
        self._host = host
        self._attempts = attempts
        self._slots = slots
        self._owner = owner
        self._peers = peers
        self._probes = PathProbes(host)

    # ---- calls

    async def reserve_slot(self, request: pb.ReserveSlotRequest) -> pb.ReserveSlotResponse:
        attempt = await self._attempts.of(request.ref, Role.DESTINATION)
        async with attempt.called(_E.RESERVE, request.request_id):
            if attempt.record.state:
                self._joined(attempt, request)  # first: refuse another migration with this id, whatever the state
                await attempt.apply(_E.RESERVE, expires=self._expiry())
            else:
                await self._attempts.open(attempt, lambda: self._open(attempt, request))
                self._joined(attempt, request)  # a concurrent call of another migration may have opened it
            probe = await self._probes.open(attempt, attempt.record.listen) if attempt.record.state == _S.RESERVED else None
            self._close_probe(attempt)
            return pb.ReserveSlotResponse(record=self._host.show(attempt.record), probe=probe)

    def _joined(self, attempt: Attempt, request: pb.ReserveSlotRequest) -> dict[str, object]:
        """Check that a ReserveSlot of a known attempt is about the same migration. Raises MIGRATION_EXISTS, REQUEST_ID_REUSED."""
        changes = phase_changes(attempt, "reserve", request)
        check_same(
            attempt,
            self._host.name,
            agent=request.source_agent,
            peer_host=request.source_host,
            domain_uuid=request.requirements.uuid,
            destination_name=request.destination_name or request.requirements.name,
            options=options_from_proto(request.options),
        )
        return changes

    async def _open(self, attempt: Attempt, request: pb.ReserveSlotRequest) -> None:
        wanted = request.requirements
        name = request.destination_name or wanted.name
        try:
            with self._slots.taking(attempt, request.source_host, wanted.memory_bytes) as slot:
                await self._open_with(attempt, request, name, slot)
        finally:
            self._close_probe(attempt)
        self.recover(attempt)

    async def _open_with(self, attempt: Attempt, request: pb.ReserveSlotRequest, name: str, slot: dict[str, Any]) -> None:
        wanted = request.requirements
        with self._attempts.claim(wanted.uuid, wanted.name), self._attempts.claim_name(name, self._host.name):
            with timed("reserve") as watch:
                had_definition = await check_arrival(self._host, request)
            listen = self._host.listen(request)
            await self._probes.open(attempt, str(listen.host))
            await attempt.apply(
                _E.RESERVE,
                lambda: phase_changes(attempt, "reserve", request),
                **slot,
                host=self._host.name,
                had_definition=had_definition,
                expires=self._expiry(),
                domain_name=name,
                domain_uuid=wanted.uuid,
                destination_name=name,
                peer_host=request.source_host,
                peer_agent=request.source_agent,
                options=options_from_proto(settled(request.options, self._host.features)),
                uri=str(listen),
                listen=str(listen.host),
                timings=(watch.timing,),
            )

    def _expiry(self) -> float:
        return time.time() + self._host.lease_seconds

    async def prepare(self, request: pb.PrepareRequest) -> pb.PrepareResponse:
        attempt = await self._attempts.of(request.ref, Role.DESTINATION)
        async with attempt.called(_E.PREPARE, request.request_id):
            await attempt.apply(_E.PREPARE, lambda: self._prepared(attempt, request))
            record = await attempt.until(_AFTER_PREPARE, MAX_WAIT)
            if record.state == _S.GONE and record.failure is not None:
                raise record.failure.error()
            uri = record.uri if record.state != _S.PREPARING else ""  # while PREPARING, the port is not known yet
            return pb.PrepareResponse(record=self._host.show(record), cookie_out=record.cookies.get("prepare", b""), uri_out=uri)

    def _prepared(self, attempt: Attempt, request: pb.PrepareRequest) -> dict[str, object]:
        """Return what the first Prepare adds to the record; nothing for one that joins it."""
        changes = phase_changes(attempt, "prepare", request)
        if attempt.record.state != _S.RESERVED:
            return {}
        self._check_lease(attempt, request.slot_epoch)
        stored = check_documents(self._host, attempt.record.domain_uuid, request)
        cookies = {**attempt.record.cookies, "begin": request.cookie_in}
        if request.network or request.uri_in:
            listen = self._host.listen(request)
            changes |= {"uri": str(listen), "listen": str(listen.host)}
        changes |= {"domain_xml": request.domain_xml, "cookies": cookies, "expires": self._expiry()}
        return changes | changes_of(stored, arrives=True)

    @staticmethod
    def _check_lease(attempt: Attempt, epoch: int) -> None:
        if epoch != attempt.record.epoch:
            raise DroverError(
                Reason.STALE_LEASE,
                f"slot epoch {epoch} is stale: this lease has epoch {attempt.record.epoch}; reserve the slot again",
                metadata={"epoch": str(attempt.record.epoch)},
            )

    async def finish(self, request: pb.FinishRequest) -> pb.FinishResponse:
        attempt = await self._attempts.of(request.ref, Role.DESTINATION)
        async with attempt.called(_E.FINISH, request.request_id):
            if attempt.record.state == _S.PREPARED:
                await self._allow_transfer(attempt)
            await attempt.apply(_E.FINISH, lambda: self._finished(attempt, request))
            record = await attempt.until(_DECIDED, wait_of(request.wait, unset=0.0))
            return pb.FinishResponse(record=self._host.show(record), cookie_out=record.cookies.get("finish", b""))

    async def _allow_transfer(self, attempt: Attempt) -> None:
        """Make sure that the slot allows the transfer. If it was given back just as the source began to send, it is taken beyond the
        limit: the guest would be paused for as long as it waited. Raises BUSY, HOST_CLOSED."""
        try:
            await self._slots.allow_transfer(attempt)
        except DroverError as error:
            if error.reason not in (Reason.BUSY, Reason.HOST_CLOSED) or not await self._peers.source_sends(attempt):
                raise
            await self._slots.allow_transfer(attempt, force=True)

    @staticmethod
    def _finished(attempt: Attempt, request: pb.FinishRequest) -> dict[str, object]:
        """Return what the first Finish adds to the record; nothing for one that joins it."""
        changes = phase_changes(attempt, "finish", request)
        if attempt.record.state != _S.PREPARED:
            return {}
        check_transferring(attempt)
        return changes | {"cookies": {**attempt.record.cookies, "perform": request.cookie_in}}

    async def abandon(self, request: pb.AbandonRequest) -> pb.AbandonResponse:
        attempt = await self._attempts.of(request.ref, Role.DESTINATION)
        event = _E.ABANDON_SOURCE_KEPT if request.source_kept else _E.ABANDON
        stated = request.HasField("statement")
        async with attempt.called(event, request.request_id):
            check_same(attempt, self._host.name, domain_uuid=request.domain_uuid, peer_host=request.source_host)
            outcome: dict[str, object] = {
                "failure": Failure(Reason.GIVEN_UP, "the copy at the destination was given up before it ran")
            }
            if stated:
                check_statement(attempt, request.statement)
            if asked := event is _E.ABANDON_SOURCE_KEPT and attempt.record.state == _S.ARMED:
                by_statement = await self._peers.check_nothing_flows(attempt, request.source_record, stated_dead=stated)
                outcome = stated_changes(attempt, request.statement) if by_statement else outcome
            elif not attempt.record.domain_uuid and request.domain_uuid:
                outcome = await tombstone_fields(self._host, request)

            def changes() -> dict[str, object]:
                record = attempt.record
                if record.state == _S.ARMED and not asked:
                    raise overtaken(attempt)
                explained = record.failure is not None or record.final
                return {} if outcome.keys() <= {"failure"} and explained else outcome  # never replace the reason of the end

            await attempt.apply(event, changes)
            record = await attempt.until(_DECIDED, MAX_WAIT)
            return pb.AbandonResponse(record=self._host.show(record))

    # ---- the lease

    def recover(self, attempt: Attempt) -> None:
        """Start the lease. Every call renews it; its end does not touch an armed copy."""
        attempt.signs.on_silence(self._host.lease_seconds, lambda: self._expired(attempt))

    def _expired(self, attempt: Attempt) -> None:
        attempt.start("lease", self._end_or_renew(attempt))

    async def _end_or_renew(self, attempt: Attempt) -> None:
        """End the lease, or renew it while the source may still send: a silent driver ends no transfer."""
        if attempt.record.state in (_S.PREPARED, _S.ARMED) and await self._owner.may_still_arrive(attempt):
            self.recover(attempt)
            return
        text = f"no driver called the next phase on {self._host.name} within {self._host.lease_seconds:g} s, so the slot was freed"
        await attempt.report(_E.LEASE_EXPIRED, failure=Failure(Reason.LEASE_EXPIRED, text))

    # ---- records

    def changed(self, attempt: Attempt, before: AttemptRecord) -> None:
        """Take note of a change of a record."""
        self._close_probe(attempt)
        if attempt.record.state == _S.RUNNING and before.state != _S.RUNNING:
            self._owner.arrived()

    def _close_probe(self, attempt: Attempt) -> None:
        """Close the probe of an attempt unless its slot is reserved and not used yet."""
        if attempt.record.state != _S.RESERVED:
            self._probes.close(attempt)

    def close(self) -> None:
        """Close all probes: the agent stops."""
        self._probes.close_all()
