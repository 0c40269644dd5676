"""agent.service.remote_peer.RemotePeer: closed channels and wrong answers."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import grpc.aio
import pytest

from agent.handshake.drive.driver import Driver
from agent.handshake.host.engine import Engine
from agent.handshake.host.peer import HandshakePeer
from agent.runtime.errors import Reason
from agent.runtime.events import Bus
from agent.service.channel import open_channel
from agent.service.handshake_service import SERVICE, handshake_servicer
from agent.service.remote_peer import RemotePeer
from agent.service.server import start_server
from drover.agent.v1 import handshake_pb2 as pb
from drover.agent.v1 import handshake_pb2_grpc as rpc
from drover.agent.v1 import host_pb2
from tests.unit.asking import REF, fails, finished, make_plan
from tests.unit.clocks import QUICK
from tests.unit.two_agents import Pair

LOOK = pb.GetRecordRequest(ref=REF)
GUEST = host_pb2.GetDomainRequest(domain="web1")


class Altered:
    """An engine. `prepared` and `record` are put into its answers, where they are set."""

    prepared: pb.PrepareResponse | None = None
    record: pb.Record | None = None

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def prepare(self, request: pb.PrepareRequest) -> pb.PrepareResponse:
        response: pb.PrepareResponse = await self._engine.prepare(request)
        if self.prepared is not None:
            response.MergeFrom(self.prepared)
        return response

    async def watch_record(self, request: pb.WatchRecordRequest) -> AsyncIterator[pb.WatchRecordResponse]:
        if self.record is not None:
            yield pb.WatchRecordResponse(record=self.record)
        async for response in self._engine.watch_record(request):
            yield response


class Far:
    """The destination of the pair over gRPC. `channel` is the one to use now."""

    def __init__(self, pair: Pair, address: str) -> None:
        self.pair = pair
        self.address = address
        self.engine = Altered(pair.destination.engine)
        self.channel = open_channel(address)
        self.peer = RemotePeer(lambda: self.channel, "h2")

    def driver(self) -> Driver:
        return Driver(REF, self.pair.to_source, self.peer, make_plan(), lambda: None, Bus(), QUICK)

    async def moves(self) -> None:
        """Replace the channel, as when an agent registers with another address."""
        before, self.channel = self.channel, open_channel(self.address)
        await before.close()


@pytest.fixture
async def far(pair: Pair, tmp_path: Path) -> AsyncIterator[Far]:
    far = Far(pair, f"unix:{tmp_path}/run/agent.sock")
    servicer = handshake_servicer(cast(Engine, far.engine))
    server = await start_server([far.address], lambda s: rpc.add_HandshakeServiceServicer_to_server(servicer, s), [SERVICE], Bus())
    yield far
    await far.channel.close()
    await server.stop(0)


@pytest.fixture
async def mute(tmp_path: Path) -> AsyncIterator[grpc.aio.Channel]:
    """Yield a channel to a peer that never answers."""
    with socket.socket(socket.AF_UNIX) as nobody:
        nobody.bind(f"{tmp_path}/mute.sock")
        nobody.listen()
        async with open_channel(f"unix:{tmp_path}/mute.sock") as channel:
            yield channel


# --- channels ---------------------------------------------------------------------------------------------------------


async def watched(peer: HandshakePeer) -> None:
    async for _ in peer.watch_record(pb.WatchRecordRequest(ref=REF)):
        pass


@pytest.mark.parametrize("call", ["question", "guest", "watch"])
async def test_a_channel_that_is_closed_makes_the_host_unreachable_now_and_later(mute: grpc.aio.Channel, call: str) -> None:
    peer = RemotePeer(lambda: mute, "h2")

    def made() -> "asyncio.Future[object]":
        calls: dict[str, Callable[[], Awaitable[object]]] = {
            "guest": lambda: peer.get_domain(GUEST),
            "question": lambda: peer.get_record(LOOK),
        }
        return asyncio.ensure_future(calls.get(call, lambda: watched(peer))())

    under_way = made()
    await asyncio.sleep(0.1)
    await mute.close()
    for future in (under_way, made()):
        error = await fails(future, Reason.HOST_UNREACHABLE)
        assert error.metadata == {"peer": "h2"}


@pytest.mark.parametrize("call", ["question", "watch"])
async def test_a_caller_that_is_cancelled_stays_cancelled(mute: grpc.aio.Channel, call: str) -> None:
    peer = RemotePeer(lambda: mute, "h2")
    under_way = asyncio.ensure_future(peer.get_record(LOOK) if call == "question" else watched(peer))
    await asyncio.sleep(0.1)
    under_way.cancel()
    await asyncio.wait({under_way})
    assert under_way.cancelled()


async def test_a_driver_finds_an_agent_that_has_moved(far: Far) -> None:
    far.pair.wire.all_sent.clear()
    running = asyncio.create_task(finished(far.driver()))
    await far.pair.are("performing", "armed")
    await far.moves()
    far.pair.wire.all_sent.set()
    await running
    far.pair.moved()


# --- answers ----------------------------------------------------------------------------------------------------------


async def test_a_cookie_that_is_too_large_never_reaches_the_hypervisor(far: Far) -> None:
    far.engine.prepared = pb.PrepareResponse(cookie_out=b"x" * 900_000)
    driver = far.driver()
    await finished(driver)
    far.pair.stayed()
    assert "perform" not in far.pair.source.effects
    assert driver.view.failure is not None
    assert driver.view.failure.reason is Reason.FIELD_TOO_LARGE
    assert driver.view.failure.message == "the answer of h2 is refused: cookie_out: has 900000 bytes; at most 65536 are allowed"
    assert driver.view.failure.metadata == {"field": "cookie_out", "bound": "65536", "size": "900000", "peer": "h2"}


async def test_a_watched_record_that_is_too_large_is_not_taken(far: Far) -> None:
    far.engine.record = pb.Record(waiting_for="x" * 1025)
    error = await fails(watched(far.peer), Reason.FIELD_TOO_LARGE)
    assert "record.waiting_for" in error.message
