"""The source's calls: Begin, Perform, Abort and Confirm, and what it does when the driver goes silent."""

import functools
from collections.abc import Callable
from typing import Final

from agent.handshake.host.attempt import Attempt
from agent.handshake.host.attempts import Attempts
from agent.handshake.host.departure import Departures
from agent.handshake.host.path import check_proved, prove
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
from agent.handshake.host.records import BandwidthClaim, Role
from agent.handshake.host.signs import MAX_WAIT
from agent.handshake.host.slots import RecordSlots, check_transferring
from agent.handshake.host.stopwatch import Stopwatch
from agent.handshake.host.stored import changes_of, read_stored, stored_to_proto
from agent.handshake.machines.source import SourceEvent, SourceState
from agent.hypervisor.features import check_bandwidth, max_downtime_of, settled
from agent.hypervisor.guest_fact import fact_of
from agent.hypervisor.wire import options_from_proto
from agent.network.networks import read_uri
from agent.runtime.alongside import alongside
from agent.runtime.errors import Reason, invalid_field
from agent.runtime.failure import Failure
from agent.runtime.wire import duration
from drover.agent.v1 import handshake_pb2 as pb

_S, _E = SourceState, SourceEvent

_AFTER_BEGIN: Final = frozenset(_S) - {_S.BEGINNING}
_AFTER_PERFORM: Final = frozenset(_S) - {_S.BEGINNING, _S.BEGUN, _S.PERFORMING}
_ENDED: Final = frozenset({_S.REMOVED, _S.KEPT})
_STOPPED: Final = frozenset({_S.PERFORMED, _S.LOST})
"""States in which the guest does not run here and only the destination's record decides what to do."""


class SourceSide:
    """The source's calls on one host. `take_over` is called for an attempt whose driver went silent after Perform began."""

    def __init__(
        self,
        host: LocalHost,
        attempts: Attempts,
        take_over: Callable[[Attempt], None],
        peers: PeerRecords,
        departures: Departures,
        slots: RecordSlots,
    ) -> None:
        self._host = host
        self._attempts = attempts
        self._take_over = take_over
        self._peers = peers
        self._departures = departures
        self._slots = slots
        self.check_leaving = departures.check_leaving

    # ---- calls

    async def begin(self, request: pb.BeginRequest) -> pb.BeginResponse:
        attempt = await self._attempts.of(request.ref, Role.SOURCE)
        async with attempt.called(_E.BEGIN, request.request_id):
            if not attempt.record.state:
                await self._attempts.open(attempt, lambda: self._open(attempt, request))
                self._joined(attempt, request)  # a concurrent call of another migration may have opened it
            else:
                self._joined(attempt, request)  # first: refuse another migration with this id, whatever the state
                await attempt.apply(_E.BEGIN)
            record = await attempt.until(_AFTER_BEGIN, MAX_WAIT)
            if record.state == _S.KEPT and record.failure is not None:
                raise record.failure.error()
            stored = stored_to_proto(record.stored, record.domain_name, self._host.name)
            cookie, shown = record.cookies.get("begin", b""), self._host.show(record)
            response = pb.BeginResponse(record=shown, domain_xml=record.domain_xml, cookie_out=cookie, stored=stored)
            if attempt.measured is not None:
                response.round_trip.CopyFrom(duration(attempt.measured.round_trip))
                response.mtu = attempt.measured.mtu
            return response

    def _joined(self, attempt: Attempt, request: pb.BeginRequest) -> dict[str, object]:
        """Check that a Begin of a known attempt is about the same migration. Raises MIGRATION_EXISTS, REQUEST_ID_REUSED."""
        changes = phase_changes(attempt, "begin", request)
        check_same(
            attempt,
            self._host.name,
            agent=request.destination_agent,
            peer_host=request.destination_host,
            destination_name=request.destination_name,
            options=options_from_proto(request.options),
            **({"domain_uuid": request.domain_uuid} if request.domain_uuid else {"domain_name": request.domain}),
        )
        return changes

    async def _open(self, attempt: Attempt, request: pb.BeginRequest) -> None:
        self._departures.check_request(request)
        watch = attempt.stopwatch = Stopwatch("begin")
        probe = request.probe if request.HasField("probe") else None
        async with (
            alongside(
                prove(probe, self._host.name, request.destination_host, request.source_address, self._host.interfaces)
            ) as proving,
            alongside(self._departures.settle(request.domain_uuid, request.domain)) as settling,
        ):
            with watch.asking():
                domain = await self._departures.check(request)
            await settling
            if not request.domain_uuid:
                await self._departures.settle(domain.uuid, domain.name)
            with (
                self._attempts.claim(domain.uuid, domain.name),
                self._slots.taking(attempt, request.destination_host, domain.memory_bytes) as slot,
            ):
                attempt.saw(fact_of(domain))
                with watch.asking():
                    stored = await read_stored(self._host, domain)
                proof = await proving
                attempt.measured = proof.measured
                await attempt.apply(
                    _E.BEGIN,
                    lambda: self._begins(attempt, request),
                    host=self._host.name,
                    domain_name=domain.name,
                    domain_uuid=domain.uuid,
                    destination_name=request.destination_name or domain.name,
                    peer_host=request.destination_host,
                    peer_agent=request.destination_agent,
                    options=options_from_proto(settled(request.options, self._host.features)),
                    **slot,
                    **changes_of(stored, arrives=False),
                    proved=proof.address,
                )
        self.recover(attempt)

    def _begins(self, attempt: Attempt, request: pb.BeginRequest) -> dict[str, object]:
        self._slots.check_not_cancelled(attempt)  # whoever gave the migration up then reads that there is no record
        return phase_changes(attempt, "begin", request)

    async def perform(self, request: pb.PerformRequest) -> pb.PerformResponse:
        attempt = await self._attempts.of(request.ref, Role.SOURCE)
        async with attempt.called(_E.PERFORM, request.request_id):
            if checked := attempt.record.state == _S.BEGUN:
                uri = read_uri(request.uri, self._host.features.uri_transports)
                check_proved(attempt.record, str(uri.host), self._host.name)
                await self._peers.check_uri(attempt, uri, request.destination_record)
                await self._slots.allow_transfer(attempt)
            await attempt.apply(_E.PERFORM, lambda: self._performed(attempt, request, checked=checked))
            record = await attempt.until(_AFTER_PERFORM, wait_of(request.wait, unset=0.0))
            return pb.PerformResponse(
                record=self._host.show(record, attempt.progress), cookie_out=record.cookies.get("perform", b"")
            )

    def _performed(self, attempt: Attempt, request: pb.PerformRequest, *, checked: bool) -> dict[str, object]:
        """Return what the first Perform adds to the record; nothing for one that joins it. `checked`: its URI was checked with the
        destination."""
        changes = phase_changes(attempt, "perform", request)
        if attempt.record.state != _S.BEGUN:
            return {}
        if not checked:
            raise overtaken(attempt)
        check_transferring(attempt)
        uri = read_uri(request.uri, self._host.features.uri_transports)
        self._host.check_sends_to(uri)
        limit = check_bandwidth(request.bandwidth_bytes_per_second, self._host.features, f"the source {self._host.name}")
        return changes | {
            "uri": str(uri),
            "bandwidth": limit,
            "claim": BandwidthClaim.of(request.claim) if request.HasField("claim") else None,
            "max_downtime": max_downtime_of(request.max_downtime) if request.HasField("max_downtime") else 0.0,
            "cookies": {**attempt.record.cookies, "prepare": request.cookie_in},
        }

    async def abort(self, request: pb.AbortRequest) -> pb.AbortResponse:
        attempt = await self._attempts.of(request.ref, Role.SOURCE)
        async with attempt.called(_E.ABORT, request.request_id):
            why = (Reason.CANCELLED, "the migration was cancelled")
            if request.given_up_for:
                why = (Reason.GIVEN_UP, f"its driver gave the migration up: {request.given_up_for}")
            await attempt.apply(_E.ABORT, lambda: self._why(attempt, *why))
            record = await attempt.until(_AFTER_PERFORM, MAX_WAIT)
            return pb.AbortResponse(record=self._host.show(record, attempt.progress))

    async def confirm(self, request: pb.ConfirmRequest) -> pb.ConfirmResponse:
        claimed = {pb.DECISION_RUNNING: _E.CONFIRM_RUNNING, pb.DECISION_GONE: _E.CONFIRM_GONE}.get(request.decision)
        if claimed is None:
            raise invalid_field("decision", "must be DECISION_RUNNING or DECISION_GONE")
        attempt = await self._attempts.of(request.ref, Role.SOURCE)
        wait = wait_of(request.wait, unset=MAX_WAIT)
        async with attempt.called(claimed, request.request_id):
            if request.HasField("statement"):
                check_statement(attempt, request.statement)
            if attempt.record.state == _S.PERFORMING:
                if claimed is _E.CONFIRM_GONE:
                    await attempt.apply(_E.ABORT)
                await attempt.until(_AFTER_PERFORM, wait)
            if attempt.record.state in _STOPPED:
                await self._obey(attempt, claimed, request)
            elif attempt.record.state != _S.PERFORMING:
                await attempt.apply(claimed, lambda: self._confirmed_unread(attempt, claimed, request))
            record = await attempt.until(_ENDED, wait)
            return pb.ConfirmResponse(record=self._host.show(record, attempt.progress))

    async def _obey(self, attempt: Attempt, claimed: SourceEvent, request: pb.ConfirmRequest) -> None:
        """Read the decision from the destination and act on it, whatever the caller claims. Raises UNDECIDED, NOT_IN_DOUBT."""
        stated = request.HasField("statement") and claimed is _E.CONFIRM_GONE
        decision = await self._peers.decision(attempt, request.destination_record, stated_dead=stated)
        changes = functools.partial(self._confirmed, attempt, decision.event, request, by_statement=decision.by_statement)
        await attempt.apply(decision.event, changes)

    def _confirmed_unread(self, attempt: Attempt, event: SourceEvent, request: pb.ConfirmRequest) -> dict[str, object]:
        """Return what a Confirm adds to the record that needed no decision when it came. Raises WRONG_PHASE if it needs one now."""
        if attempt.record.state in _STOPPED:
            raise overtaken(attempt)
        return self._confirmed(attempt, event, request, by_statement=False)

    def _confirmed(
        self, attempt: Attempt, event: SourceEvent, request: pb.ConfirmRequest, *, by_statement: bool
    ) -> dict[str, object]:
        """Return what a Confirm adds to the record. `by_statement`: an operator's statement replaces the destination's record."""
        changes: dict[str, object] = {}
        if event is _E.CONFIRM_GONE:
            changes = self._why(attempt, Reason.GIVEN_UP, "the destination has no copy of the guest")
            if by_statement:
                changes = stated_changes(attempt, request.statement)
        if request.cookie_in:
            changes["cookies"] = {**attempt.record.cookies, "finish": request.cookie_in}
        return changes

    @staticmethod
    def _why(attempt: Attempt, reason: Reason, message: str) -> dict[str, object]:
        """Return the failure to record, unless one is known already or the attempt has ended."""
        if attempt.record.failure is not None or attempt.record.final:
            return {}
        return {"failure": Failure(reason, message)}

    # ---- silence

    def recover(self, attempt: Attempt) -> None:
        """Start to wait for the driver's next call, also after a restart: as if it had just called."""
        attempt.signs.on_silence(self._host.takeover_after, lambda: self._silent(attempt))

    def _silent(self, attempt: Attempt) -> None:
        if attempt.record.state in (_S.BEGINNING, _S.BEGUN):
            failure = Failure(
                Reason.DRIVER_SILENT,
                f"no driver called the next phase on {self._host.name} within {self._host.takeover_after:g} s, so the migration was "
                "given up; the guest was not touched",
            )
            attempt.start("silence", attempt.report(_E.DRIVER_SILENT, failure=failure))
        elif not attempt.record.final:
            self._take_over(attempt)
