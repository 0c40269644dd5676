"""agent.hypervisor.sim.stream: nothing that comes from the network is trusted."""

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest

from agent.hypervisor.sim.stream import (
    MAX_FRAME,
    Ack,
    Complete,
    End,
    Hello,
    Pages,
    Refused,
    Stream,
    StreamBroken,
    StreamInvalid,
    Switch,
    Welcome,
    connect,
)

MESSAGES = [
    Hello("magic", 1, b"t" * 32, "u" * 36, 1 << 50, False),
    Welcome(),
    Refused("r" * 256),
    Pages(1 << 62, 1 << 62, 1 << 50, 1 << 50),
    Ack(7),
    Switch(1.5, True, 4096),
    End(1e9, False),
    Complete(),
]


@asynccontextmanager
async def two_ends(patience: float = 5.0) -> AsyncIterator[tuple[Stream, Stream]]:
    accepted: asyncio.Future[Stream] = asyncio.get_running_loop().create_future()
    server = await asyncio.start_server(lambda r, w: accepted.set_result(Stream(r, w, patience)), "127.0.0.1", 0)
    near = await connect("127.0.0.1", server.sockets[0].getsockname()[1], 5, patience)
    far = await accepted
    try:
        yield near, far
    finally:
        near.cut()
        far.cut()
        server.close()


def write(stream: Stream, data: bytes) -> None:
    stream._writer.write(data)


def frame(body: bytes) -> bytes:
    return struct.pack("!I", len(body)) + body


async def test_every_message_arrives_as_it_was_sent() -> None:
    async with two_ends() as (near, far):
        for message in MESSAGES:
            await near.send(message)  # type: ignore[arg-type]
        assert [await far.receive() for _ in MESSAGES] == MESSAGES


def test_every_message_fits_a_frame() -> None:
    assert all(len(msgspec.msgpack.encode(message)) <= MAX_FRAME for message in MESSAGES)


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("!I", MAX_FRAME + 1),
        b"\xff" * 8,
        frame(b""),
        frame(b"GET / HTTP/1.1\r\n"),
        frame(msgspec.msgpack.encode({"type": "Reboot"})),
        frame(msgspec.msgpack.encode({"type": "Ack", "number": -1})),
        frame(msgspec.msgpack.encode({"type": "Ack", "number": 1, "more": 2})),
        frame(msgspec.msgpack.encode({"type": "End", "clock": float("nan"), "wants_run": "yes"})),
    ],
)
async def test_invalid_data_is_refused(data: bytes) -> None:
    async with two_ends() as (near, far):
        write(near, data)
        with pytest.raises(StreamInvalid):
            await far.receive()


async def test_silence_is_a_broken_stream() -> None:
    async with two_ends(patience=0.02) as (near, far):
        write(near, b"\0\0")
        with pytest.raises(StreamBroken, match="sent nothing for"):
            await far.receive()


async def test_a_closed_end_is_a_broken_stream() -> None:
    async with two_ends() as (near, far):
        near.cut()
        with pytest.raises(StreamBroken):
            await far.receive()


async def test_connecting_to_a_closed_port_fails() -> None:
    with pytest.raises(StreamBroken, match="cannot connect"):
        await connect("127.0.0.1", 1, 5, 5)
