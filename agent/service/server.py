"""A gRPC server with what every Drover server has: error interceptor, reflection, health, bounds, private sockets."""

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]
from grpc_health.v1.health import aio as health_aio  # type: ignore[import-untyped]

from agent.runtime.address import TcpAddress, UnixAddress, parse_address
from agent.runtime.events import Bus
from agent.runtime.supervision import supervise
from agent.service.channel import KEEPALIVE_OPTIONS
from agent.service.connections import MAX_CALLS, MAX_CALLS_OF_PEER, Calls, Connections, most_connections
from agent.service.interceptor import ErrorInterceptor
from agent.service.reflection import add_reflection

PROBE_SECONDS = 1.0
"""How long an existing unix socket may take to accept a connection."""

_SERVER_OPTIONS = (
    *KEEPALIVE_OPTIONS,
    # Without this, two daemons share a port in silence, and each gets half of the calls.
    ("grpc.so_reuseport", 0),
    # Clients ping every 10 s; the default would answer that with "too many pings" and close.
    ("grpc.http2.min_ping_interval_without_data_ms", 1000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.server_handshake_timeout_ms", 5000),
    # Calls of one connection. One more would wait in silence behind calls that last; over `MAX_CALLS_OF_PEER` it is told so instead.
    ("grpc.max_concurrent_streams", MAX_CALLS_OF_PEER),
    # Beyond these, gRPC's core answers a bare CANCELLED; our own bound is far below, and answers OVERLOADED.
    ("grpc.server.max_pending_requests", 16_384),
    ("grpc.server.max_pending_requests_hard_limit", 32_768),
)


class AddressError(Exception):
    """An address that cannot be listened on: in use, not of this host, or an unusable path. The message names it."""


class Server:
    """A listening server, made by `start_server`. The local socket has its own: calls from the network delay no local one."""

    def __init__(self, servers: Sequence[grpc.aio.Server], health: health_aio.HealthServicer, addresses: tuple[str, ...]) -> None:
        self._servers = servers
        self._health = health
        ports = [address.port for address in map(parse_address, addresses) if isinstance(address, TcpAddress)]
        self._bounding = supervise("bound connections", Connections(ports).keep_bounded) if ports else None
        self.addresses = addresses
        """The actual addresses in the given order, with the system's choice in place of port 0."""

    async def stop(self, grace: float) -> None:
        """Accept no new calls; end those that still run after `grace` seconds. Idempotent. Health answers NOT_SERVING at once.
        Watches never end by themselves, so with open ones this takes all of `grace`."""
        if self._bounding is not None:
            self._bounding.cancel()
        await self._health.enter_graceful_shutdown()
        await asyncio.gather(*(server.stop(grace) for server in self._servers))

    async def wait(self) -> None:
        """Wait until the server has stopped."""
        await asyncio.gather(*(server.wait_for_termination() for server in self._servers))


async def start_server(
    listen: Sequence[str], add: Callable[[grpc.aio.Server], None], service_names: Sequence[str], bus: Bus
) -> Server:
    """Listen on every address of `listen` (``unix:/path`` or ``ip:port``, port 0 for any) and serve.

    `add` adds the servicers, once for each kind of address; `service_names` are their full names, for reflection and health; `bus`
    gets the events of calls. A unix socket is for its owner only (mode 0600); its directory is created, and a dead process's socket
    replaced.

    Raises `AddressError`; `ValueError` for an invalid address."""
    addresses = [parse_address(address) for address in listen]
    if not addresses:
        raise ValueError("a server needs an address to listen on")
    health = health_aio.HealthServicer()
    for name in service_names:
        await health.set(name, health_pb2.HealthCheckResponse.SERVING)
    servers = {kind: _make_server(kind, bus) for kind in {type(address) for address in addresses}}
    for server in servers.values():
        health_pb2_grpc.add_HealthServicer_to_server(health, server)
        add(server)
        add_reflection(server, (*service_names, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name))
    try:
        bound = tuple(_bind(servers[type(address)], address) for address in addresses)
        for server in servers.values():
            await server.start()
    except BaseException:
        for server in servers.values():
            await server.stop(None)
        raise
    return Server(tuple(servers.values()), health, bound)


def _make_server(kind: type[UnixAddress | TcpAddress], bus: Bus) -> grpc.aio.Server:
    if kind is UnixAddress:  # all local callers count as one peer
        return grpc.aio.server(interceptors=[ErrorInterceptor(Calls(MAX_CALLS, MAX_CALLS), bus)], options=_SERVER_OPTIONS)
    options = (*_SERVER_OPTIONS, ("grpc.max_allowed_incoming_connections", most_connections()))
    return grpc.aio.server(interceptors=[ErrorInterceptor(Calls(), bus)], options=options)


def _bind(server: grpc.aio.Server, address: UnixAddress | TcpAddress) -> str:
    """Bind, and return the actual address."""
    if isinstance(address, UnixAddress):
        try:
            _make_way(address)
        except OSError as error:
            what = f"{error.strerror}: {error.filename or address.path}"
            raise AddressError(f"cannot listen on {address}: {what}; see that its directory can be made and written") from error
        with _private_files():
            _add_port(server, str(address))
        return str(address)
    port = _add_port(server, str(address))
    return str(TcpAddress(address.host, port))


def _add_port(server: grpc.aio.Server, address: str) -> int:
    try:
        port = server.add_insecure_port(address)
    except RuntimeError:
        port = 0
    if port == 0:
        raise AddressError(
            f"cannot listen on {address}: another process has it, or it is not an address of this host (see: ss -lxtnp)"
        )
    return port


def _make_way(address: UnixAddress) -> None:
    """Create the directory of the socket, and remove a socket on which nobody listens."""
    path = Path(address.path)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not path.exists() and not path.is_symlink():
        return
    if not path.is_socket():
        raise AddressError(f"cannot listen on {address}: a file that is not a socket is in its place")
    if _answers(address.path):
        raise AddressError(f"cannot listen on {address}: another process listens there")
    path.unlink()


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(PROBE_SECONDS)
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            return True  # a full backlog or a missing permission: somebody listens
    return True


@contextlib.contextmanager
def _private_files() -> Iterator[None]:
    """Create files for their owner only while the block runs, so that another user can never connect."""
    before = os.umask(0o177)
    try:
        yield
    finally:
        os.umask(before)
