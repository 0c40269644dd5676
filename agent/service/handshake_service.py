"""`drover.agent.v1.HandshakeService`, both ends of the wire: the servicer of an engine, and the other host, far away.

Neither decides anything. The servicer hands a request to the engine; the peer makes a call of a method and gives it a deadline
that leaves the other side's `wait` room.
"""

from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc.aio

from agent.handshake.host.engine import Engine
from agent.handshake.host.phases import wait_of
from agent.handshake.host.signs import MAX_WAIT
from agent.service.bounds import checked_answer
from agent.service.status import errors_of
from drover.agent.v1 import handshake_pb2 as pb
from drover.agent.v1 import handshake_pb2_grpc as rpc
from drover.agent.v1 import host_pb2, host_pb2_grpc

CALL_SECONDS = MAX_WAIT + 10.0
"""Deadline of a call that lasts as long as the hypervisor takes."""

QUESTION_SECONDS = 5.0
"""Deadline of a call that asks for what is known; beyond its `wait`, also of one that waits."""

SERVICE = pb.DESCRIPTOR.services_by_name["HandshakeService"].full_name

_Context = grpc.aio.ServicerContext[Any, Any]


class HandshakeServicer(rpc.HandshakeServiceServicer):
    """Serves an engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def ReserveSlot(self, request: pb.ReserveSlotRequest, context: _Context) -> pb.ReserveSlotResponse:  # noqa: N802
        return await self._engine.reserve_slot(request)

    async def Begin(self, request: pb.BeginRequest, context: _Context) -> pb.BeginResponse:  # noqa: N802
        return await self._engine.begin(request)

    async def Prepare(self, request: pb.PrepareRequest, context: _Context) -> pb.PrepareResponse:  # noqa: N802
        return await self._engine.prepare(request)

    async def Perform(self, request: pb.PerformRequest, context: _Context) -> pb.PerformResponse:  # noqa: N802
        return await self._engine.perform(request)

    async def Finish(self, request: pb.FinishRequest, context: _Context) -> pb.FinishResponse:  # noqa: N802
        return await self._engine.finish(request)

    async def Confirm(self, request: pb.ConfirmRequest, context: _Context) -> pb.ConfirmResponse:  # noqa: N802
        return await self._engine.confirm(request)

    async def Abort(self, request: pb.AbortRequest, context: _Context) -> pb.AbortResponse:  # noqa: N802
        return await self._engine.abort(request)

    async def Abandon(self, request: pb.AbandonRequest, context: _Context) -> pb.AbandonResponse:  # noqa: N802
        return await self._engine.abandon(request)

    async def StartPostCopy(self, request: pb.StartPostCopyRequest, context: _Context) -> pb.StartPostCopyResponse:  # noqa: N802
        return await self._engine.start_post_copy(request)

    async def SetBandwidth(self, request: pb.SetBandwidthRequest, context: _Context) -> pb.SetBandwidthResponse:  # noqa: N802
        return await self._engine.set_bandwidth(request)

    async def GetRecord(self, request: pb.GetRecordRequest, context: _Context) -> pb.GetRecordResponse:  # noqa: N802
        return await self._engine.get_record(request)

    async def WatchRecord(  # noqa: N802
        self, request: pb.WatchRecordRequest, context: _Context
    ) -> AsyncIterator[pb.WatchRecordResponse]:
        async for response in self._engine.watch_record(request):
            yield response

    async def ListRecords(self, request: pb.ListRecordsRequest, context: _Context) -> pb.ListRecordsResponse:  # noqa: N802
        return await self._engine.list_records(request)


class RemotePeer:
    """A `HandshakePeer` over a channel, asked for at every call: it is another one when the agent has moved. What asking for it
    raises, the call raises. `name` is the host's, for errors. `heard` is handed every record that it answers a call about an attempt
    with; None where it answers none.
    """

    def __init__(
        self,
        channel: Callable[[], grpc.aio.Channel],
        name: str,
        heard: Callable[[pb.AttemptRef, pb.Record | None], None] = lambda _ref, _record: None,
    ) -> None:
        self._channel = channel
        self._name = name
        self._heard = heard
        self._made: tuple[grpc.aio.Channel, rpc.HandshakeServiceAsyncStub] | None = None

    async def _call(self, method: str, request: Any, timeout: float = CALL_SECONDS) -> Any:
        if "wait" in request.DESCRIPTOR.fields_by_name:
            timeout = wait_of(request.wait, unset=0.0) + QUESTION_SECONDS
        record = None
        try:
            with errors_of(self._name):
                response = checked_answer(await getattr(self._stub(), method)(request, timeout=timeout), self._name)
            record = response.record
        finally:
            self._heard(request.ref, record)
        return response

    def _stub(self) -> "rpc.HandshakeServiceAsyncStub":
        """Made once for each channel: it holds an object for each of its methods."""
        channel = self._channel()
        if self._made is None or self._made[0] is not channel:
            self._made = channel, rpc.HandshakeServiceStub(channel)
        return self._made[1]

    async def reserve_slot(self, request: pb.ReserveSlotRequest) -> pb.ReserveSlotResponse:
        return await self._call("ReserveSlot", request, QUESTION_SECONDS)  # type: ignore[no-any-return]

    async def begin(self, request: pb.BeginRequest) -> pb.BeginResponse:
        return await self._call("Begin", request)  # type: ignore[no-any-return]

    async def prepare(self, request: pb.PrepareRequest) -> pb.PrepareResponse:
        return await self._call("Prepare", request)  # type: ignore[no-any-return]

    async def perform(self, request: pb.PerformRequest) -> pb.PerformResponse:
        return await self._call("Perform", request)  # type: ignore[no-any-return]

    async def finish(self, request: pb.FinishRequest) -> pb.FinishResponse:
        return await self._call("Finish", request)  # type: ignore[no-any-return]

    async def confirm(self, request: pb.ConfirmRequest) -> pb.ConfirmResponse:
        return await self._call("Confirm", request)  # type: ignore[no-any-return]

    async def abort(self, request: pb.AbortRequest) -> pb.AbortResponse:
        return await self._call("Abort", request)  # type: ignore[no-any-return]

    async def abandon(self, request: pb.AbandonRequest) -> pb.AbandonResponse:
        return await self._call("Abandon", request)  # type: ignore[no-any-return]

    async def get_record(self, request: pb.GetRecordRequest) -> pb.GetRecordResponse:
        return await self._call("GetRecord", request, QUESTION_SECONDS)  # type: ignore[no-any-return]

    async def get_host(self, request: host_pb2.GetHostRequest) -> host_pb2.GetHostResponse:
        call = host_pb2_grpc.HostServiceStub(self._channel()).GetHost
        with errors_of(self._name):
            return checked_answer(await call(request, timeout=QUESTION_SECONDS), self._name)

    async def get_domain(self, request: host_pb2.GetDomainRequest) -> host_pb2.GetDomainResponse:
        call = host_pb2_grpc.HostServiceStub(self._channel()).GetDomain
        with errors_of(self._name):
            return checked_answer(await call(request, timeout=QUESTION_SECONDS), self._name)

    async def watch_record(self, request: pb.WatchRecordRequest) -> AsyncIterator[pb.WatchRecordResponse]:
        with errors_of(self._name):
            call = self._stub().WatchRecord(request)
            try:
                async for response in call:
                    yield checked_answer(response, self._name)
            finally:
                call.cancel()  # leaving the loop early leaks the call otherwise
