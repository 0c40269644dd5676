"""The memory stream's frames on a TCP connection.

A frame is four bytes of length (big endian) and that many bytes of msgpack, one of the messages below::

    source                                    destination
    Hello(token, …)           ───────────>
                              <───────────    Welcome | Refused
    Pages(number, …)          ───────────>    one at least every QUANTUM seconds while the stream flows
                              <───────────    Ack(number)
    Switch(clock, …)          ───────────>    post-copy only: the guest goes on there; Pages follow
    End(clock, …)             ───────────>    all is there (pre-copy: and the guest with it)
                              <───────────    Complete

The port is open to whoever reaches the migration network, so nothing is believed: a frame has a bound before it is
read, a message has the exact fields of its type, and the first one carries the token that `prepare` made, without
which the connection is dropped and the copy goes on waiting.
"""

import asyncio
import contextlib
import struct
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

VERSION = 1
MAGIC = "drover-sim-stream"
MAX_FRAME = 4096
"""Bytes; the greatest message (`Hello`) has some 300."""
TOKEN_BYTES = 32
QUANTUM = 0.05
"""Seconds between frames while memory flows."""
WINDOW = 8
"""Frames without an answer, after which the source sends nothing more: a cut link stops the flow, as it does TCP's."""

Count = Annotated[int, Meta(ge=0, le=1 << 62)]
Size = Annotated[int, Meta(ge=0, le=1 << 50)]
Clock = Annotated[float, Meta(ge=0, le=1e9)]


class StreamError(Exception):
    """The stream is of no more use."""


class StreamBroken(StreamError):  # noqa: N818 - reads as the fact that it states
    """The other end is gone, or silent for too long."""


class StreamInvalid(StreamError):  # noqa: N818
    """The other end does not speak this protocol."""


class Message(Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    pass


class Hello(Message, frozen=True, tag=True):
    magic: Annotated[str, Meta(max_length=32)]
    version: Annotated[int, Meta(ge=0, le=1 << 16)]
    token: Annotated[bytes, Meta(max_length=TOKEN_BYTES)]
    uuid: Annotated[str, Meta(max_length=36)]
    memory: Size
    resume: bool
    """The stream of a post-copy that broke is set up again."""


class Welcome(Message, frozen=True, tag=True):
    pass


class Refused(Message, frozen=True, tag=True):
    reason: Annotated[str, Meta(max_length=256)]


class Pages(Message, frozen=True, tag=True):
    number: Count
    """Rises by one with each frame."""
    iteration: Count
    size: Size
    """Bytes of memory that these pages would be; 0 in a frame that only says that the stream lives."""
    remaining: Size
    """Of this pass."""


class Ack(Message, frozen=True, tag=True):
    number: Count


class Switch(Message, frozen=True, tag=True):
    clock: Clock
    wants_run: bool
    owed: Size


class End(Message, frozen=True, tag=True):
    clock: Clock
    wants_run: bool


class Complete(Message, frozen=True, tag=True):
    pass


ToDestination = Hello | Pages | Switch | End
ToSource = Welcome | Refused | Ack | Complete

_ENCODER = msgspec.msgpack.Encoder()
_DECODER: msgspec.msgpack.Decoder[ToDestination | ToSource] = msgspec.msgpack.Decoder(ToDestination | ToSource)
_LENGTH = struct.Struct("!I")


class Stream:
    """One end of a memory stream. Every wait has a deadline, past which the stream counts as broken."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, patience: float) -> None:
        self._reader = reader
        self._writer = writer
        self._patience = patience

    async def send(self, message: ToDestination | ToSource) -> None:
        body = _ENCODER.encode(message)
        try:
            self._writer.write(_LENGTH.pack(len(body)) + body)
            async with asyncio.timeout(self._patience):
                await self._writer.drain()
        except (OSError, TimeoutError) as error:
            raise StreamBroken(str(error) or "nothing was taken for too long") from error

    async def receive(self, patience: float | None = None) -> ToDestination | ToSource:
        try:
            async with asyncio.timeout(self._patience if patience is None else patience):
                (size,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
                if size > MAX_FRAME:
                    raise StreamInvalid(f"frame of {size} bytes, at most {MAX_FRAME} are taken")
                body = await self._reader.readexactly(size)
        except asyncio.IncompleteReadError as error:
            raise StreamBroken("the other end closed the stream") from error
        except TimeoutError as error:
            raise StreamBroken("no word from the other end") from error
        except OSError as error:
            raise StreamBroken(str(error)) from error
        try:
            return _DECODER.decode(body)
        except (msgspec.DecodeError, UnicodeError) as error:
            raise StreamInvalid(str(error)) from error

    async def close(self) -> None:
        """Let what was sent arrive, then end."""
        self._writer.close()
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(1.0):
                await self._writer.wait_closed()

    def cut(self) -> None:
        """Break off at once, both ways."""
        self._writer.transport.abort()


async def connect(address: str, port: int, timeout: float, patience: float) -> Stream:
    """Raises `StreamBroken`."""
    try:
        async with asyncio.timeout(timeout):
            reader, writer = await asyncio.open_connection(address, port)
    except (OSError, TimeoutError) as error:
        raise StreamBroken(f"cannot connect to {address} port {port}: {str(error) or 'no answer'}") from error
    return Stream(reader, writer, patience)
