"""The proof of a path, over TCP connections of its own: who answers at an address, how far away it is, and which packets pass.

1. The source sends a digest of its key; only who knows a key gets an answer, so a stranger costs a few bytes.
2. The destination answers with its own digest and the MTU of its interface. These packets are small.
3. The source sends the payload in packets of full size; once the destination has all of it, it says so with one small packet.
4. The destination sends the payload, likewise.

An older source sends nothing: after a while it is told the nonce, which is no secret and proves nothing to a newer source.
"""

import asyncio
import hmac
import secrets
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final

from agent.network.connecting import Found, Kernel, PathError, connect, words
from agent.runtime.address import TcpAddress
from agent.runtime.alongside import alongside
from drover.agent.v1 import handshake_pb2 as pb

SECRET_BYTES: Final = 32
PAYLOAD_BYTES: Final = 32 << 10
"""Three packets of MTU 9000, and no more than a first flight of them."""
MAX_PAYLOAD: Final = 256 << 10

EXCHANGE_SECONDS: Final = 1.2
"""Until then each step of the exchange must be done: the kernel repeats a lost packet three times meanwhile."""
_SLOW_SECONDS: Final = 1.8
"""So much longer is waited where the kernels have passed everything on, and only the agent has not answered."""
_PATIENCE: Final = EXCHANGE_SECONDS + _SLOW_SECONDS
_SERVE_SECONDS: Final = 4.0
_OLDER_SECONDS: Final = 0.2
"""Who says nothing for so long is an older source."""
MAX_STRANGERS: Final = 64
"""Most connections to one port that have not proved yet that they know a key. The oldest makes way."""
_CHUNK: Final = 64 << 10
_DIGEST: Final = 32
_MTU: Final = struct.Struct("!I")


@dataclass(frozen=True)
class Measured:
    """What a proof found out."""

    round_trip: float
    """Seconds, the best that the kernel saw."""
    mtu: int
    """Usable MTU in both directions, in bytes. 0: not measured, with an older destination."""


class Responder:
    """Answers at one port of this host until it is closed, to all who know one of its keys."""

    def __init__(self) -> None:
        self.nonce = secrets.token_bytes(SECRET_BYTES)
        self.keys: dict[bytes, bytes] = {}
        """By the digest with which a source shows that it knows one."""
        self._digests: dict[bytes, bytes] = {}
        """By key."""
        self.strangers: dict[asyncio.Transport, None] = {}
        """Connections that have not proved that they know a key, the oldest first."""
        self._server: asyncio.Server | None = None
        self._where = ""

    async def listen(self, address: str, port: int) -> None:
        """Listen on that IP address and port (0: any). Raises `OSError`."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Answer(self), address, port, backlog=MAX_STRANGERS)
        self._where = str(TcpAddress(ip_address(address), int(self._server.sockets[0].getsockname()[1])))

    def add(self) -> pb.PathProbe:
        """Return a probe with a new key."""
        key = secrets.token_bytes(SECRET_BYTES)
        digest = self._digests[key] = _digest(key, b"source")
        self.keys[digest] = key
        return pb.PathProbe(address=self._where, nonce=self.nonce, payload_bytes=PAYLOAD_BYTES, key=key)

    def remove(self, probe: pb.PathProbe) -> None:
        """Forget the key of a probe."""
        self.keys.pop(self._digests.pop(probe.key, b""), None)

    def close(self) -> None:
        if self._server is not None:
            self._server.close()


class _Answer(asyncio.Protocol):
    """The destination's end of one connection. Keeps no more than a digest of what it is sent."""

    def __init__(self, responder: Responder) -> None:
        self._responder = responder
        self._digest = b""
        self._missing = PAYLOAD_BYTES

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        strangers = self._responder.strangers
        strangers[transport] = None
        if len(strangers) > MAX_STRANGERS:
            next(iter(strangers)).abort()
        loop = asyncio.get_running_loop()
        self._timers = (loop.call_later(_SERVE_SECONDS, transport.abort), loop.call_later(_OLDER_SECONDS, self._tell_older))

    def _tell_older(self) -> None:
        if not self._digest:
            self._end(self._responder.nonce)

    def _end(self, answer: bytes = b"") -> None:
        self._transport.write(answer)
        self._transport.close()

    def data_received(self, data: bytes) -> None:
        if len(self._digest) < _DIGEST:
            rest = _DIGEST - len(self._digest)
            self._digest, data = self._digest + data[:rest], data[rest:]
            if len(self._digest) < _DIGEST:
                return
            key = self._responder.keys.get(self._digest)
            if key is None:
                self._end()
                return
            self._responder.strangers.pop(self._transport, None)
            mtu = _MTU.pack(Kernel.of(self._transport.get_extra_info("socket")).interface)
            self._transport.write(_digest(key, b"destination" + mtu) + mtu)
        self._missing -= len(data)
        if self._missing <= 0:
            self._transport.write(b"\0")  # apart, in a small packet
            self._end(bytes(PAYLOAD_BYTES - 1))

    def connection_lost(self, error: Exception | None) -> None:
        self._responder.strangers.pop(self._transport, None)
        for timer in self._timers:
            timer.cancel()


async def measure(
    probe: pb.PathProbe, where: TcpAddress, source: IPv4Address | IPv6Address | None, host: str, peer: str
) -> Measured:
    """Prove the path from `host`, which is this one, to the address of `peer`. `source`: address of this host from which to send
    (None: as the kernel chooses).

    Raises:
        PathError: what was found there.
    """
    exchange = _Exchange(await connect(where, source, host), host, peer)
    try:
        if not probe.key:
            await exchange.ask_older(probe.nonce)
            return Measured(exchange.kernel.round_trip, 0)
        await exchange.ask(probe.key, probe.payload_bytes)
        kernel = exchange.kernel
        return Measured(kernel.round_trip, min(kernel.sent, kernel.received, kernel.interface))
    except OSError as error:
        raise PathError(Found.REFUSED, f"the connection was broken off: {words(error)}") from None
    finally:
        exchange.connection.close()


class _Exchange:
    """The source's end of the exchange, step by step. Raises `PathError`, `OSError`."""

    def __init__(self, connection: socket.socket, host: str, peer: str) -> None:
        self.connection = connection
        self._host = host
        self._peer = peer
        self._loop = asyncio.get_running_loop()
        self._peer_mtu = 0
        self._received = bytearray()

    @property
    def kernel(self) -> Kernel:
        return Kernel.of(self.connection)

    async def ask_older(self, nonce: bytes) -> None:
        _check(hmac.compare_digest(await self._read(len(nonce), self._unanswered), nonce))

    async def ask(self, key: bytes, size: int) -> None:
        await self._loop.sock_sendall(self.connection, _digest(key, b"source"))  # apart, in a small packet
        async with alongside(self._loop.sock_sendall(self.connection, bytes(size))):
            answer = await self._read(_DIGEST + _MTU.size, self._unanswered)
            digest, mtu = answer[:_DIGEST], answer[_DIGEST:]
            _check(hmac.compare_digest(digest, _digest(key, b"destination" + mtu)))
            (self._peer_mtu,) = _MTU.unpack(mtu)
            await self._read(1, self._not_sent)
            await self._read(size - 1, self._not_received)

    async def _read(self, size: int, late: Callable[[], PathError]) -> bytes:
        for seconds in (EXCHANGE_SECONDS, _SLOW_SECONDS):
            try:
                async with asyncio.timeout(seconds):
                    while len(self._received) < size:
                        part = await self._loop.sock_recv(self.connection, _CHUNK)
                        _check(bool(part))
                        self._received += part
                break
            except TimeoutError:
                error = late()
                if error.found is not Found.SLOW:
                    raise error from None
        else:
            raise error
        data = bytes(self._received[:size])
        del self._received[:size]
        return data

    def _unanswered(self) -> PathError:
        if self.kernel.unacknowledged:
            return PathError(Found.DROPPED, "a connection can be made, but what is sent over it is lost")
        return PathError(Found.SLOW, f"a connection can be made, but nothing is answered within {_PATIENCE:g} s")

    def _not_sent(self) -> PathError:
        kernel = self.kernel
        if kernel.unacknowledged:
            return self._swallowed(self._host, self._peer, min(kernel.sent, kernel.interface))
        return PathError(Found.SLOW, f"{self._peer} did not read what it was sent within {_PATIENCE:g} s")

    def _not_received(self) -> PathError:
        return self._swallowed(self._peer, self._host, min(self.kernel.interface, self._peer_mtu))

    def _swallowed(self, sender: str, receiver: str, size: int) -> PathError:
        mtus = f"the MTU is {self.kernel.interface} on {self._host} and {self._peer_mtu} on {self._peer}"
        text = f"small packets pass, but those of {size} bytes are lost on the way from {sender} to {receiver}; {mtus}"
        return PathError(Found.SWALLOWED, text)


def _digest(key: bytes, text: bytes) -> bytes:
    return hmac.digest(key, text, "sha256")


def _check(is_destination: bool) -> None:
    if not is_destination:
        raise PathError(Found.OTHER, "something else answers there")
