"""The calls that change a running transfer: the switch to post-copy, and its bandwidth."""

from collections.abc import Callable, Collection
from typing import Final

from agent.handshake.host.attempt import Attempt
from agent.handshake.host.attempts import Attempts
from agent.handshake.host.peer import HandshakePeer
from agent.handshake.host.peer_record import differs
from agent.handshake.host.phases import LocalHost
from agent.handshake.host.records import BandwidthClaim, Role, state_from_proto
from agent.handshake.machines.destination import DestinationState
from agent.handshake.machines.source import SourceState
from agent.hypervisor.features import check_bandwidth, max_downtime_of
from agent.hypervisor.interface import Outgoing
from agent.hypervisor.reasons import translated
from agent.runtime.errors import DroverError, Reason
from agent.runtime.wire import duration
from drover.agent.v1 import handshake_pb2 as pb

_MAY_FLOW: Final = frozenset({SourceState.PERFORMING, SourceState.PERFORMED, SourceState.REMOVING})
"""States in which memory may flow: in post-copy a hypervisor reports Perform's success at the switch."""


class Transfers:
    """The calls about transfers that leave this host."""

    def __init__(
        self,
        host: LocalHost,
        attempts: Attempts,
        session_of: Callable[[Attempt], Outgoing],
        destination_of: Callable[[Attempt], HandshakePeer | None],
    ) -> None:
        self._host = host
        self._attempts = attempts
        self._session_of = session_of
        self._destination_of = destination_of

    async def start_post_copy(self, request: pb.StartPostCopyRequest) -> pb.StartPostCopyResponse:
        attempt = await self._transferring(request.ref)
        if attempt.record.options.get("post_copy") is False:
            raise _not_armed("the transfer was started with the option post_copy=off, so it cannot be switched")
        await self._check_armed(attempt)
        with translated(self._host.name):
            await self._session_of(attempt).start_postcopy()
        return pb.StartPostCopyResponse(record=self._host.show(attempt.record, attempt.progress))

    async def _check_armed(self, attempt: Attempt) -> None:
        """Raise POST_COPY_NOT_ARMED unless the destination's record is ARMED. The switch is the commit: a copy that is only
        prepared may be given up at any moment, and half of the guest with it; an armed one becomes RUNNING, or ends when the
        stream breaks before the switch.
        """
        peer = self._destination_of(attempt)
        if peer is None:
            raise _not_armed(
                "this attempt was begun without the address of the destination's agent, so it is not known whether it is armed"
            )
        record = (await peer.get_record(pb.GetRecordRequest(ref=attempt.record.ref))).record
        if wrong := differs(attempt.record, record, self._host.name):
            raise _not_armed(
                f"the record at the address of the destination {attempt.record.peer_host} is not this attempt's: {wrong}"
            )
        state = state_from_proto(record)
        if state != DestinationState.ARMED:
            raise _not_armed(
                f"the record of the destination {attempt.record.peer_host} is {state}, not armed: call Finish there first"
            )

    async def set_bandwidth(self, request: pb.SetBandwidthRequest) -> pb.SetBandwidthResponse:
        attempt = await self._transferring(request.ref, _MAY_FLOW)
        limit = check_bandwidth(request.bandwidth_bytes_per_second, self._host.features, f"the source {self._host.name}")
        with translated(self._host.name):
            applied = await self._session_of(attempt).set_bandwidth(limit)
        claim = BandwidthClaim.of(request.claim) if request.HasField("claim") else attempt.record.claim
        if (attempt.record.bandwidth, attempt.record.claim) != (limit, claim):  # else it was only read back
            await attempt.note(bandwidth=limit, claim=claim)
        shown = self._host.show(attempt.record, attempt.progress)
        return pb.SetBandwidthResponse(record=shown, applied_bytes_per_second=applied)

    async def set_max_downtime(self, request: pb.SetMaxDowntimeRequest) -> pb.SetMaxDowntimeResponse:
        attempt = await self._transferring(request.ref)
        wanted = max_downtime_of(request.max_downtime)
        with translated(self._host.name):
            applied = await self._session_of(attempt).set_max_downtime(wanted)
        if attempt.record.max_downtime != wanted:
            await attempt.note(max_downtime=wanted)
        shown = self._host.show(attempt.record, attempt.progress)
        return pb.SetMaxDowntimeResponse(record=shown, applied_max_downtime=duration(applied))

    async def _transferring(self, ref: pb.AttemptRef, states: Collection[SourceState] = (SourceState.PERFORMING,)) -> Attempt:
        attempt = await self._attempts.find(ref)
        if attempt.record.role is not Role.SOURCE or attempt.record.state not in states:
            raise DroverError(
                Reason.WRONG_PHASE,
                f"no transfer is running: the attempt is {attempt.record.state} on this {attempt.record.role}, {self._host.name}",
                metadata={"state": attempt.record.state},
            )
        return attempt


def _not_armed(why: str) -> DroverError:
    return DroverError(Reason.POST_COPY_NOT_ARMED, f"{why}. The transfer goes on unchanged")
