"""The memory stream's frames on a TCP connection.

A frame is four bytes of length (big endian) and that many bytes of msgpack, one of the messages below::

    source                                    destination
    Hello(token, …)           ───────────>
                              <───────────    Welcome | Refused
                              <───────────    Rate(rate)      where the destination's link is limited: at first, and when it changes
    Pages(number, …)          ───────────>    at least one every QUANTUM seconds while the stream flows
                              <───────────    Ack(number)
    Switch(clock, …)          ───────────>    post-copy only: the guest runs at the destination; Pages follow
    End(clock, …)             ───────────>    all memory has been sent (pre-copy: and the guest's state)
                              <───────────    Complete

The port is open to every host on the migration network, so nothing that arrives is trusted: a frame's size is checked before
it is read, a message must have exactly the fields of its type, and the first one must carry the token that `prepare` made;
without it the connection is dropped and the copy keeps waiting.
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
"""Bytes; the largest message (`Hello`) has some 300."""
TOKEN_BYTES = 32
QUANTUM = 0.05
"""Seconds between frames while memory flows."""
WINDOW = 8
"""Number of unacknowledged frames at which the source stops sending: a cut link stops the transfer, as it does with TCP."""

Count = Annotated[int, Meta(ge=0, le=1 << 62)]
Size = Annotated[int, Meta(ge=0, le=1 << 50)]
Clock = Annotated[float, Meta(ge=0, le=1e9)]


class StreamError(Exception):
    """The stream cannot be used any more."""


class StreamBroken(StreamError):  # noqa: N818 - reads as the fact that it states
    """The other end is gone, or has been silent for too long."""


class StreamInvalid(StreamError):  # noqa: N818
    """The other end violates the protocol."""


class Message(Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    pass


class Hello(Message, frozen=True, tag=True):
    magic: Annotated[str, Meta(max_length=32)]
    version: Annotated[int, Meta(ge=0, le=1 << 16)]
    token: Annotated[bytes, Meta(max_length=TOKEN_BYTES)]
    uuid: Annotated[str, Meta(max_length=36)]
    memory: Size
    resume: bool
    """This stream recovers a post-copy whose stream broke."""


class Welcome(Message, frozen=True, tag=True):
    pass


class Refused(Message, frozen=True, tag=True):
    reason: Annotated[str, Meta(max_length=256)]


class Rate(Message, frozen=True, tag=True):
    rate: Size
    """Bytes per second that the destination's link has for this stream; at least 1."""


class Pages(Message, frozen=True, tag=True):
    number: Count
    """Increases by one with each frame."""
    iteration: Count
    size: Size
    """Bytes of memory that the frame stands for; 0 in a frame that only keeps the stream alive."""
    remaining: Size
    """Bytes that this pass has still to send."""


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
ToSource = Welcome | Refused | Rate | Ack | Complete

_ENCODER = msgspec.msgpack.Encoder()
_DECODER: msgspec.msgpack.Decoder[ToDestination | ToSource] = msgspec.msgpack.Decoder(ToDestination | ToSource)
_LENGTH = struct.Struct("!I")


class Stream:
    """One end of a memory stream. Every wait has a deadline, after which the stream counts as broken."""

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
            raise StreamBroken(str(error) or f"the other end read nothing for {self._patience:g} s") from error

    async def receive(self, patience: float | None = None) -> ToDestination | ToSource:
        patience = self._patience if patience is None else patience
        try:
            async with asyncio.timeout(patience):
                (size,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
                if size > MAX_FRAME:
                    raise StreamInvalid(f"the other end sent a frame of {size} bytes; at most {MAX_FRAME} are allowed")
                body = await self._reader.readexactly(size)
        except asyncio.IncompleteReadError as error:
            raise StreamBroken("the other end closed the stream") from error
        except TimeoutError as error:
            raise StreamBroken(f"the other end sent nothing for {patience:g} s") from error
        except OSError as error:
            raise StreamBroken(str(error)) from error
        try:
            return _DECODER.decode(body)
        except (msgspec.DecodeError, UnicodeError) as error:
            raise StreamInvalid(str(error)) from error

    async def close(self) -> None:
        """Flush what was sent, then close."""
        self._writer.close()
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(1.0):
                await self._writer.wait_closed()

    def cut(self) -> None:
        """Abort the connection in both directions at once."""
        self._writer.transport.abort()


async def connect(address: str, port: int, timeout: float, patience: float) -> Stream:
    """Connect to the destination; `patience` is the stream's deadline. Raises `StreamBroken`."""
    try:
        async with asyncio.timeout(timeout):
            reader, writer = await asyncio.open_connection(address, port)
    except (OSError, TimeoutError) as error:
        raise StreamBroken(f"cannot connect to {address} port {port}: {str(error) or 'no answer'}") from error
    return Stream(reader, writer, patience)
