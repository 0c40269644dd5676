"""The handshake as its driver sees it: one interface, over the wire or within the process."""

from collections.abc import AsyncIterator
from typing import Protocol

from drover.agent.v1 import handshake_pb2 as pb
from drover.agent.v1 import host_pb2


class HandshakePeer(Protocol):
    """One host's side of the handshake; see `drover.agent.v1.HandshakeService`. Raises `DroverError`."""

    async def reserve_slot(self, request: pb.ReserveSlotRequest) -> pb.ReserveSlotResponse: ...

    async def begin(self, request: pb.BeginRequest) -> pb.BeginResponse: ...

    async def prepare(self, request: pb.PrepareRequest) -> pb.PrepareResponse: ...

    async def perform(self, request: pb.PerformRequest) -> pb.PerformResponse: ...

    async def finish(self, request: pb.FinishRequest) -> pb.FinishResponse: ...

    async def confirm(self, request: pb.ConfirmRequest) -> pb.ConfirmResponse: ...

    async def abort(self, request: pb.AbortRequest) -> pb.AbortResponse: ...

    async def abandon(self, request: pb.AbandonRequest) -> pb.AbandonResponse: ...

    async def get_record(self, request: pb.GetRecordRequest) -> pb.GetRecordResponse: ...

    def watch_record(self, request: pb.WatchRecordRequest) -> AsyncIterator[pb.WatchRecordResponse]: ...


class OtherHost(HandshakePeer, Protocol):
    """The host on the other side of an attempt, which is asked for what is true there as well."""

    async def get_domain(self, request: host_pb2.GetDomainRequest) -> host_pb2.GetDomainResponse: ...
