"""The calls of one attempt: builds each request from the plan and from earlier answers, and hands each record to the view."""

import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Final

from agent.handshake.drive.plan import Limits, Plan
from agent.handshake.drive.slots import MOST_WHY
from agent.handshake.drive.view import View
from agent.handshake.host.path import RENEWED
from agent.handshake.host.peer import HandshakePeer
from agent.handshake.host.records import LISTENS, state_from_proto
from agent.handshake.machines.decide import Call
from agent.handshake.machines.destination import DestinationState as Dst
from agent.handshake.machines.source import SourceState as Src
from agent.network.networks import check_destination_uri
from agent.runtime.errors import DroverError, Reason
from agent.runtime.wire import cut, duration
from drover.agent.v1 import handshake_pb2 as pb
from drover.agent.v1 import host_pb2

LONG_POLL: Final = 5.0
"""Seconds for which a call waits before it is made again, so that a host that hangs is noticed soon."""


class NotCalledError(DroverError):
    """A call that was not made, as what it needs is not there. It says nothing about the host."""


class Calls:
    """Makes the calls of one driver to both hosts. `plan`: None for a driver that takes over, which can make none before Perform."""

    def __init__(self, view: View, source: HandshakePeer, destination: HandshakePeer, plan: Plan | None) -> None:
        self.view = view
        self.token = secrets.token_hex(8)
        """Names this driver to both hosts."""
        self.transfer_asked = False
        """Whether Perform was called, so that memory may flow."""
        self._source = source
        self._destination = destination
        self._plan = plan
        self.limits = Limits.of(plan.settings, plan.network_choice) if plan is not None else Limits()
        """With which Perform begins."""
        self.start: Callable[[], Awaitable[Limits]] | None = None
        """Makes room for the transfer, and returns `limits`. Called before Perform."""
        self.begun_with: Limits | None = None
        """The limits of the Perform that this driver has called; None: it has called none."""
        self._made = 0
        self._probe = pb.PathProbe()
        self._probe_renewed = False
        self._begun = pb.BeginResponse()
        self._prepared = pb.PrepareResponse()
        self._finish_cookie = b""
        self._perform_cookie = b""
        self._epoch = 0

    @property
    def can_reserve(self) -> bool:
        """Whether the plan says what the guest needs: that of a resumed migration does not."""
        return self._plan is not None and self._plan.requirements is not None

    def due(self, call: Call) -> Call:
        """Return the call to make for `call`: an earlier one where its answer was lost, or came before this driver was restarted."""
        if call is Call.PERFORM and self.view.source_state is Src.BEGUN and not self._prepared.uri_out:
            call = Call.PREPARE
        if call is Call.PREPARE and not self._begun.domain_xml:
            call = Call.BEGIN
        reserved = self.view.destination_state in (None, Dst.RESERVED)
        if call is Call.BEGIN and not self._probe.nonce and self.view.source_state is None and reserved:
            return Call.RESERVE
        return call

    async def make(self, call: Call) -> None:
        """Make a call. Raises `DroverError`."""
        await self._methods[call]()

    def renew_probe(self, found: str) -> bool:
        """Forget the probe, so that the slot is reserved once more: a destination whose agent was restarted answers at another port.
        Return False where that cannot explain what was found at the present one, was done before, or there is no probe.
        """
        if not self._probe.nonce or self._probe_renewed or found not in RENEWED:
            return False
        self._probe, self._probe_renewed = pb.PathProbe(), True
        return True

    @property
    def _methods(self) -> Mapping[Call, Callable[[], Awaitable[None]]]:
        return {
            Call.RESERVE: self._reserve,
            Call.BEGIN: self._begin,
            Call.PREPARE: self._prepare,
            Call.PERFORM: self._perform,
            Call.FINISH: self._finish,
            Call.CONFIRM_RUNNING: lambda: self.confirm(pb.DECISION_RUNNING),
            Call.CONFIRM_GONE: lambda: self.confirm(pb.DECISION_GONE),
            Call.ABORT: self._abort,
            Call.ABANDON: lambda: self.abandon(source_kept=False),
            Call.ABANDON_SOURCE_KEPT: lambda: self.abandon(source_kept=True),
        }

    def _request_id(self) -> str:
        self._made += 1
        return f"{self.token}-{self._made}"

    def _planned(self) -> Plan:
        if self._plan is None:
            raise NotCalledError(
                Reason.DRIVER_SILENT, "the driver went away before the transfer started, so the migration is given up"
            )
        return self._plan

    async def _reserve(self) -> None:
        plan = self._planned()
        if plan.requirements is None and self.view.destination_record is None:
            raise NotCalledError(Reason.LEASE_EXPIRED, f"the slot on {plan.destination_host} was lost while the driver was away")
        needs = plan.requirements or host_pb2.GuestRequirements(name=plan.domain_name, uuid=plan.domain_uuid)
        response = await self._destination.reserve_slot(
            pb.ReserveSlotRequest(
                ref=self.view.ref,
                request_id=self._request_id(),
                requirements=needs,
                destination_name=plan.destination_name,
                source_host=plan.source_host,
                source_agent=plan.source_agent,
                options=plan.options,
                network=plan.network,
                uri_in=plan.uri,
            )
        )
        self._epoch = response.record.slot.epoch
        self.view.read_clock("destination", response.record)
        self._probe = response.probe
        self.view.saw_destination(response.record)

    async def _begin(self) -> None:
        plan = self._planned()
        self._begun = await self._source.begin(
            pb.BeginRequest(
                ref=self.view.ref,
                request_id=self._request_id(),
                domain=plan.domain_name,
                domain_uuid=plan.domain_uuid,
                destination_name=plan.destination_name,
                destination_host=plan.destination_host,
                destination_agent=plan.destination_agent,
                options=plan.options,
                slot_epoch=self._epoch,
                probe=self._probe,
                source_address=plan.network_choice.source_address,
            )
        )
        self.view.path = self._begun
        self.view.read_clock("source", self._begun.record)
        self.view.saw_source(self._begun.record)

    async def _prepare(self) -> None:
        plan = self._planned()
        if not self._epoch and self.view.destination_record is not None:
            self._epoch = self.view.destination_record.slot.epoch
        prepared = await self._destination.prepare(
            pb.PrepareRequest(
                ref=self.view.ref,
                request_id=self._request_id(),
                slot_epoch=self._epoch,
                domain_xml=self._begun.domain_xml,
                cookie_in=self._begun.cookie_out,
                network=plan.network,
                uri_in=plan.uri,
                stored=self._begun.stored if self._begun.HasField("stored") else None,
            )
        )
        if state_from_proto(prepared.record) not in LISTENS:  # Prepare takes longer than a call may last, so the call is made again
            self.view.saw_destination(prepared.record)
            return
        prepared.uri_out = check_destination_uri(
            prepared.uri_out, plan.network_choice.destination_address, plan.destination_features
        )
        self._prepared = prepared
        self.view.uri = prepared.uri_out
        self.view.saw_destination(prepared.record)

    async def _perform(self) -> None:
        """Start the transfer, or wait for its end. The first call returns as soon as it runs, so that Finish can be called."""
        if self.view.source_state is Src.BEGUN:
            self.limits = await self.start() if self.start is not None else self.limits
            if self.view.cancelling:
                return
            request = pb.PerformRequest(
                uri=self._prepared.uri_out,
                cookie_in=self._prepared.cookie_out,
                bandwidth_bytes_per_second=self.limits.bandwidth,
                claim=self.limits.claim,
                destination_record=self._prepared.record,
            )
            if self.limits.max_downtime:
                request.max_downtime.CopyFrom(duration(self.limits.max_downtime))
            self.begun_with = self.limits
        else:
            request = pb.PerformRequest(uri="joined", wait=duration(LONG_POLL))
        request.ref.CopyFrom(self.view.ref)
        request.request_id = self._request_id()
        self.transfer_asked = True
        response = await self._source.perform(request)
        self._perform_cookie = response.cookie_out
        self.view.saw_source(response.record)

    async def limit(self, limits: Limits) -> Limits:
        """Apply limits to the transfer that runs. Return them as the source's hypervisor reports them now."""
        ref = self.view.ref
        rate = pb.SetBandwidthRequest(
            ref=ref,
            request_id=self._request_id(),
            bandwidth_bytes_per_second=limits.bandwidth,
            claim=limits.claim,
        )
        applied = Limits((await self._source.set_bandwidth(rate)).applied_bytes_per_second)
        if limits.max_downtime:
            pause = pb.SetMaxDowntimeRequest(ref=ref, request_id=self._request_id(), max_downtime=duration(limits.max_downtime))
            answer = await self._source.set_max_downtime(pause)
            applied = replace(applied, max_downtime=answer.applied_max_downtime.ToNanoseconds() / 1e9)
        return applied

    async def _finish(self) -> None:
        response = await self._destination.finish(
            pb.FinishRequest(
                ref=self.view.ref, request_id=self._request_id(), cookie_in=self._perform_cookie, wait=duration(LONG_POLL)
            )
        )
        self._finish_cookie = response.cookie_out
        self.view.saw_destination(response.record)

    async def confirm(self, decision: pb.Decision.ValueType) -> None:
        response = await self._source.confirm(
            pb.ConfirmRequest(
                ref=self.view.ref,
                request_id=self._request_id(),
                decision=decision,
                cookie_in=self._finish_cookie,
                wait=duration(LONG_POLL),
                statement=self.view.statements.get("destination") if decision == pb.DECISION_GONE else None,
                destination_record=self.view.destination_record,
            )
        )
        self.view.saw_source(response.record)

    async def _abort(self) -> None:
        request = pb.AbortRequest(ref=self.view.ref, request_id=self._request_id())
        if self.view.failure is not None and self.view.failure.reason is not Reason.CANCELLED:
            request.given_up_for = cut(self.view.failure.message, MOST_WHY)
        self.view.saw_source((await self._source.abort(request)).record)

    async def abandon(self, *, source_kept: bool) -> None:
        response = await self._destination.abandon(
            pb.AbandonRequest(
                ref=self.view.ref,
                request_id=self._request_id(),
                source_kept=source_kept,
                statement=self.view.statements.get("source") if source_kept else None,
                source_record=self.view.source_record,
                domain_uuid=self.view.parties.domain_uuid if self.view.parties else "",
                source_host=self.view.parties.source if self.view.parties else "",
            )
        )
        self.view.saw_destination(response.record)
