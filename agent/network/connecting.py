"""One TCP connection to another host, and what the kernel knows of it."""

import asyncio
import os
import socket
import struct
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from agent.runtime.address import TcpAddress

CONNECT_SECONDS: Final = 0.9
"""Until then a connection must be made: a firewall that drops is told of within a second."""
_AGAIN_SECONDS: Final = 0.3
"""After this, a further connection is tried beside the first: the kernel repeats a lost packet only after a second."""

_TCP_INFO: Final = struct.Struct("=5xB2x24I4Q4I")
"""The beginning of ``struct tcp_info`` (linux/tcp.h), up to tcpi_min_rtt."""
_TIMESTAMPS: Final = 1
_NO_ROUND_TRIP: Final = (1 << 32) - 1


class Found(StrEnum):
    """What is wrong with a path."""

    UNUSABLE = "unusable"
    """No connection can be tried from this host."""
    DROPPED = "dropped"
    REFUSED = "refused"
    OTHER = "other"
    """Something answers that is not the destination's agent."""
    SWALLOWED = "swallowed"
    """Small packets pass, and those of full size do not."""
    SLOW = "slow"
    """The agent did not answer in time, as far as can be known."""


class PathError(Exception):
    """The path is not proved."""

    def __init__(self, found: Found, text: str) -> None:
        super().__init__(text)
        self.found = found


@dataclass(frozen=True)
class Kernel:
    """What the kernel knows of a connection."""

    sent: int
    """Bytes of the packets that this end sends, at most."""
    received: int
    """Bytes of the packets that this end receives."""
    interface: int
    """MTU of the route to the peer."""
    unacknowledged: int
    """Packets that the peer has not confirmed."""
    round_trip: float
    """Seconds, the best one of the last minutes. 0: none was measured."""

    @classmethod
    def of(cls, connection: socket.socket) -> "Kernel":
        data = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
        options, *numbers = _TCP_INFO.unpack(data)
        headers = (20 if connection.family == socket.AF_INET else 40) + 20 + (12 if options & _TIMESTAMPS else 0)
        best = numbers[31] if numbers[31] != _NO_ROUND_TRIP else 0
        return cls(numbers[2] + headers, numbers[3] + headers, numbers[13], numbers[4], best / 1e6)


async def connect(where: TcpAddress, source: IPv4Address | IPv6Address | None, host: str) -> socket.socket:
    """Return a connection, of up to three that are tried one after the other. Raises `PathError`."""
    loop = asyncio.get_running_loop()
    trying: dict[asyncio.Task[None], socket.socket] = {}
    try:
        target = _sockaddr(where.host, where.port)
        for _ in range(round(CONNECT_SECONDS / _AGAIN_SECONDS)):
            connection = _open_socket(where, source, host)
            trying[asyncio.create_task(loop.sock_connect(connection, target))] = connection
            done, _ = await asyncio.wait(trying, timeout=_AGAIN_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                await task
                return trying.pop(task)
            for waiting in trying.values():  # an ICMP error that came while the kernel was in `connect` is only noted
                if noted := waiting.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                    raise OSError(noted, os.strerror(noted))
    except OSError as error:
        raise PathError(Found.REFUSED, words(error)) from None
    finally:
        for task in trying:
            task.cancel()
        if trying:
            await asyncio.wait(trying)
        for task, connection in trying.items():
            connection.close()
            if not task.cancelled():
                task.exception()
    raise PathError(Found.DROPPED, f"no answer within {CONNECT_SECONDS:g} s, so packets are dropped on the way")


def _open_socket(where: TcpAddress, source: IPv4Address | IPv6Address | None, host: str) -> socket.socket:
    """Return a socket that sends from `source`. Raises `PathError`."""
    connection = socket.socket(socket.AF_INET if where.host.version == 4 else socket.AF_INET6)
    try:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if source is not None:
            connection.bind(_sockaddr(source, 0))
    except (OSError, TypeError):  # no address of this host; of the other version of IP
        connection.close()
        raise PathError(Found.UNUSABLE, f"{host} cannot send from {source}, its address on that network") from None
    return connection


def _sockaddr(address: IPv4Address | IPv6Address, port: int) -> tuple[str, int] | tuple[str, int, int, int]:
    """Return the address for a socket. Raises `PathError` if its scope is no interface of this host."""
    if isinstance(address, IPv4Address):
        return str(address), port
    host, _, scope = str(address).partition("%")
    try:
        return host, port, 0, socket.if_nametoindex(scope) if scope else 0
    except OSError:
        raise PathError(Found.UNUSABLE, f"{address} cannot be reached from this host, which has no interface {scope}") from None


def words(error: OSError) -> str:
    return os.strerror(error.errno).lower() if error.errno else str(error)  # asyncio puts its own text into `strerror`
