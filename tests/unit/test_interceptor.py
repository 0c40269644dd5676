import asyncio
import os
import re
import socket
import stat
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any, cast

import grpc
import grpc.aio
import pytest
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]

from agent.runtime.errors import DroverError, Reason
from agent.runtime.events import Bus, CallHandled
from agent.service.channel import open_channel
from agent.service.server import AddressError, Server, start_server
from agent.service.status import error_from_rpc
from drover.agent.v1 import handshake_pb2 as pb
from drover.agent.v1 import handshake_pb2_grpc as rpc

NAME = "drover.agent.v1.HandshakeService"
REF = pb.AttemptRef(migration_id="0b6f3c1e-8f0a-4c57-9a53-1f5d2f0c9a11", attempt=1)


class Handshake(rpc.HandshakeServiceServicer):
    """Raises the error that a test sets."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.calls = 0
        self.left = asyncio.Event()

    async def Abort(self, request: pb.AbortRequest, context: object) -> pb.AbortResponse:  # noqa: N802
        self.calls += 1
        if self.error is not None:
            raise self.error
        return pb.AbortResponse(record=pb.Record(ref=request.ref))

    async def WatchRecord(self, request: pb.WatchRecordRequest, context: object) -> AsyncIterator[pb.WatchRecordResponse]:  # noqa: N802
        try:
            yield pb.WatchRecordResponse()
            if self.error is not None:
                raise self.error
            await asyncio.Event().wait()
        finally:
            self.left.set()


def raw_call(channel: grpc.aio.Channel, method: str, raw: bytes) -> Awaitable[Any]:
    """Return a call that is neither encoded nor checked on this side."""
    call: Any = channel.unary_unary(method)
    return cast(Awaitable[Any], call(raw))


class Fixture:
    def __init__(self, server: Server, handshake: Handshake, channel: grpc.aio.Channel, bus: Bus) -> None:
        self.server, self.handshake, self.channel, self.bus = server, handshake, channel, bus
        self.stub = rpc.HandshakeServiceStub(channel)


@pytest.fixture
async def wire(tmp_path: Path, bus: Bus) -> AsyncIterator[Fixture]:
    handshake = Handshake()  # type: ignore[abstract]
    server = await start_server(
        [f"unix:{tmp_path}/run/agent.sock"], lambda s: rpc.add_HandshakeServiceServicer_to_server(handshake, s), [NAME], bus
    )
    async with open_channel(server.addresses[0]) as channel:
        yield Fixture(server, handshake, channel, bus)
    await server.stop(0)


async def failure(call: Awaitable[Any]) -> DroverError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asyncio.wait_for(call, 5)
    return error_from_rpc(caught.value, "the agent")


async def test_a_bad_request_never_reaches_the_handler(wire: Fixture) -> None:
    error = await failure(wire.stub.Abort(pb.AbortRequest()))
    assert (error.reason, error.metadata["field"]) == (Reason.INVALID_FIELD, "ref")
    assert wire.handshake.calls == 0


async def test_our_errors_arrive_whole(wire: Fixture) -> None:
    wire.handshake.error = DroverError(Reason.BUSY, "2 of 2 slots are taken", metadata={"limit": "2"}, retry_after=1.5)
    error = await failure(wire.stub.Abort(pb.AbortRequest(ref=REF)))
    assert (error.reason, error.message, error.metadata, error.retry_after) == (
        Reason.BUSY,
        "2 of 2 slots are taken",
        {"limit": "2"},
        1.5,
    )


async def test_an_unforeseen_error_is_internal_and_tells_no_secret(wire: Fixture) -> None:
    wire.handshake.error = KeyError("no <domain>secret</domain> " + repr(b"cookie"))
    with structlog.testing.capture_logs() as logs:
        error = await failure(wire.stub.Abort(pb.AbortRequest(ref=REF)))
    assert (error.reason, error.metadata) == (Reason.INTERNAL, {"exception": "KeyError"})
    said = error.message + str([{k: v for k, v in line.items() if k != "trace"} for line in logs])
    assert "secret" not in said
    assert "cookie" not in said
    assert logs[0]["error"] == "KeyError"
    wire.handshake.error = None
    await wire.stub.Abort(pb.AbortRequest(ref=REF))  # it goes on


@pytest.mark.parametrize("raw", [b"\x0a\xff", b"\xff" * 100, b"\x0a\x02\x0a\xff"])
async def test_garbage_at_the_port_is_an_invalid_argument(wire: Fixture, raw: bytes) -> None:
    error = await failure(raw_call(wire.channel, f"/{NAME}/Abort", raw))
    assert (error.reason, error.code) == (Reason.INVALID_FIELD, grpc.StatusCode.INVALID_ARGUMENT)
    assert wire.handshake.calls == 0
    await wire.stub.Abort(pb.AbortRequest(ref=REF))


async def test_a_message_over_1_mib_is_refused(wire: Fixture) -> None:
    unbounded = [("grpc.max_send_message_length", -1)]
    async with grpc.aio.insecure_channel(wire.server.addresses[0], options=unbounded) as channel:
        error = await failure(raw_call(channel, f"/{NAME}/Abort", b"x" * (1 << 21)))
    assert error.reason is Reason.FIELD_TOO_LARGE
    await wire.stub.Abort(pb.AbortRequest(ref=REF))


async def test_what_is_not_there_is_unimplemented(wire: Fixture) -> None:
    for method in (f"/{NAME}/Frobnicate", "/drover.agent.v9.Thing/Do"):
        assert (await failure(raw_call(wire.channel, method, b""))).reason is Reason.UNIMPLEMENTED
    error = await failure(wire.stub.Begin(pb.BeginRequest(ref=REF, domain="a", destination_host="b")))
    assert error.reason is Reason.UNIMPLEMENTED


async def test_a_stream_is_checked_and_its_errors_arrive(wire: Fixture) -> None:
    assert (await failure(wire.stub.WatchRecord(pb.WatchRecordRequest()).read())).reason is Reason.INVALID_FIELD
    wire.handshake.error = DroverError(Reason.WATCH_TOO_SLOW, "slow")
    call = wire.stub.WatchRecord(pb.WatchRecordRequest(ref=REF))
    await call.read()
    assert (await failure(call.read())).reason is Reason.WATCH_TOO_SLOW


async def test_a_watcher_that_leaves_ends_the_handler(wire: Fixture) -> None:
    call = wire.stub.WatchRecord(pb.WatchRecordRequest(ref=REF))
    await call.read()
    call.cancel()
    await asyncio.wait_for(wire.handshake.left.wait(), 5)


async def test_calls_that_change_something_are_told_and_their_content_is_not(wire: Fixture) -> None:
    heard = wire.bus.subscribe()
    await wire.stub.Abort(pb.AbortRequest(ref=REF, request_id="r1"))
    await failure(wire.stub.GetRecord(pb.GetRecordRequest(ref=REF)))
    wire.bus.close()
    (call,) = [published.event async for published in heard]
    assert isinstance(call, CallHandled)
    assert (call.method, call.migration_id, call.reason) == (f"/{NAME}/Abort", REF.migration_id, "")
    assert "r1" not in str(call)


async def test_health_answers(wire: Fixture) -> None:
    health = health_pb2_grpc.HealthStub(wire.channel)
    for service in ("", NAME):
        reply = await health.Check(health_pb2.HealthCheckRequest(service=service))
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await health.Check(health_pb2.HealthCheckRequest(service="none"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_unix_socket_is_private_and_goes_with_the_server(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "x.sock"
    server = await start_server([f"unix:{path}"], lambda _: None, [], Bus())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(AddressError, match=re.escape(str(path))):
        await start_server([f"unix:{path}"], lambda _: None, [], Bus())
    await server.stop(0)
    assert not path.exists()


async def test_a_stale_socket_is_replaced_and_a_file_is_not(tmp_path: Path) -> None:
    path = tmp_path / "x.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    server = await start_server([f"unix:{path}"], lambda _: None, [], Bus())
    await server.stop(0)
    path.write_text("precious")
    with pytest.raises(AddressError, match="not a socket"):
        await start_server([f"unix:{path}"], lambda _: None, [], Bus())
    assert path.read_text() == "precious"


async def test_port_zero_is_reported_and_a_taken_port_is_named() -> None:
    server = await start_server(["127.0.0.1:0"], lambda _: None, [], Bus())
    (address,) = server.addresses
    assert int(address.rpartition(":")[2]) > 0
    with pytest.raises(AddressError, match=re.escape(address)):
        await start_server([address], lambda _: None, [], Bus())
    await server.stop(0)


async def test_stop_ends_open_watches_after_the_grace(wire: Fixture) -> None:
    call = wire.stub.WatchRecord(pb.WatchRecordRequest(ref=REF))
    await call.read()
    await asyncio.wait_for(wire.server.stop(0.05), 5)
    assert (await failure(call.read())).reason is Reason.HOST_UNREACHABLE


async def test_no_proxy_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "http_proxy", "http://127.0.0.1:1")
    server = await start_server(["127.0.0.1:0"], lambda _: None, [], Bus())
    async with open_channel(server.addresses[0]) as channel:
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
    await server.stop(0)
