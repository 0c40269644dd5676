"""Bounds on the connections and calls of a server, so that no peer can shut out another one, or the local socket.

Some open files are reserved for all but connections from the network. gRPC closes connections over the bound of a listener, but
cannot count those of one peer: the newest over `MAX_CONNECTIONS_OF_PEER` are shut down here. `Calls` refuses calls with
OVERLOADED."""

import asyncio
import contextlib
import functools
import ipaddress
import os
import resource
import socket
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Final

import structlog

from agent.runtime.errors import DroverError, Reason

MAX_CONNECTIONS: Final = 16_384
"""From the network, to one listener, if the limit of open files allows it."""
MAX_CONNECTIONS_OF_PEER: Final = 128
MAX_CALLS: Final = 6144
"""Under way at once in one server, watches included."""
MAX_CALLS_OF_PEER: Final = 2560
"""Of those, from one peer. A coordinator has one for each migration that waits at a host, at most 1,000 in each direction, and
others that these must not hold up."""
RETRY_SECONDS: Final = 1.0
"""Pause before a refused call may be repeated."""

KEPT_FILES: Final = 512
"""Open files reserved for the local socket, the journal, the hypervisor and channels."""
SWEEP_SECONDS: Final = 1.0
FEW_FILES: Final = 64
"""With fewer open files, no peer can have too many connections."""

Peer = str
"""An IPv4 address, or a /64 of IPv6, as one host has all of it."""

log = structlog.get_logger(__name__)


def most_connections() -> int:
    """Return the bound of a listener's connections from the network, by the limit of open files."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return min(MAX_CONNECTIONS, max(64, (limit - KEPT_FILES) * 3 // 4))


class Calls:
    """The calls of a server that are under way."""

    def __init__(self, most: int = MAX_CALLS, most_of_peer: int = MAX_CALLS_OF_PEER) -> None:
        self._most = most
        self._most_of_peer = most_of_peer
        self._total = 0
        self._of_peer: Counter[Peer] = Counter()

    @contextlib.contextmanager
    def one(self, peer: str) -> Iterator[None]:
        """Count a call of a peer (gRPC's ``context.peer()``) while the block runs. Raises OVERLOADED over the bound."""
        key = peer_of_uri(peer)
        if self._total >= self._most or self._of_peer[key] >= self._most_of_peer:
            raise DroverError(
                Reason.OVERLOADED,
                f"{self._total} calls are under way here, {self._of_peer[key]} of them from {key}: this server takes no more. "
                "Nothing was done; try again",
                retry_after=RETRY_SECONDS,
            )
        self._total += 1
        self._of_peer[key] += 1
        try:
            yield
        finally:
            self._total -= 1
            self._of_peer[key] -= 1
            if not self._of_peer[key]:
                del self._of_peer[key]


@functools.lru_cache(maxsize=1024)
def peer_of_uri(uri: str) -> Peer:
    """Return the peer of a call from, say, ``ipv4:10.91.0.2:55010`` or ``ipv6:[fd92::1]:55010``; a unix socket is one peer."""
    family, _, rest = uri.partition(":")
    return _peer(rest.rpartition(":")[0].strip("[]").replace("%5B", "").replace("%5D", "")) if family.startswith("ip") else family


def _peer(address: str) -> Peer:
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is None:
        return str(ipaddress.IPv6Network((int(parsed), 64), strict=False))
    return str(getattr(parsed, "ipv4_mapped", None) or parsed)


class Connections:
    """The connections from the network to the ports on which this process listens."""

    def __init__(self, ports: Iterable[int], most_of_peer: int = MAX_CONNECTIONS_OF_PEER) -> None:
        self._ports = frozenset(ports)
        self._most_of_peer = most_of_peer
        self._known: dict[tuple[str, int], None] = {}
        """Remote addresses, the oldest connection first."""

    async def keep_bounded(self) -> None:
        """Sweep for ever."""
        while True:
            await asyncio.sleep(SWEEP_SECONDS)  # gRPC has no event for a new connection
            try:
                self.sweep()
            except OSError as error:  # out of file descriptors: the next sweep may succeed
                log.warning("the connections could not be counted", error=str(error))

    def sweep(self) -> None:
        """Shut down the newest connections of each peer over its bound."""
        descriptors = os.listdir("/proc/self/fd")
        if len(descriptors) < FEW_FILES:
            self._known.clear()
            return
        with contextlib.ExitStack() as stack:
            found = {}
            for descriptor in descriptors:
                connection = self._connection(int(descriptor))
                if connection is not None:
                    found[connection.getpeername()[:2]] = stack.enter_context(connection)
            self._known = dict.fromkeys((*(end for end in self._known if end in found), *found))
            for end in too_many(self._known, self._most_of_peer):
                with contextlib.suppress(OSError):  # already closed
                    found[end].shutdown(socket.SHUT_RDWR)  # gRPC reads EOF, and closes its own descriptor

    def _connection(self, descriptor: int) -> socket.socket | None:
        """Return a duplicate of the descriptor, if it is a connection to one of the ports."""
        try:
            duplicate = os.dup(descriptor)  # stays valid if gRPC closes the descriptor
        except OSError:
            return None
        if not stat.S_ISSOCK(os.fstat(duplicate).st_mode):
            os.close(duplicate)
            return None
        found = socket.socket(fileno=duplicate)
        with contextlib.suppress(OSError):  # a socket that listens, or was just closed, has no remote address
            inet = found.family in (socket.AF_INET, socket.AF_INET6)
            if inet and found.getsockname()[1] in self._ports and found.getpeername():
                return found
        found.close()
        return None


def too_many(ends: Iterable[tuple[str, int]], most_of_peer: int) -> list[tuple[str, int]]:
    """Return the connections over the bound of their peer: all but its first ones."""
    of_peer: Counter[Peer] = Counter()
    over = []
    for end in ends:
        peer = _peer(end[0])
        of_peer[peer] += 1
        if of_peer[peer] > most_of_peer:
            over.append(end)
    for peer, number in of_peer.items():
        if number > most_of_peer:
            log.warning("a peer has too many connections", peer=peer, connections=number, most=most_of_peer)
    return over
