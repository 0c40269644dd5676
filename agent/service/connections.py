"""How many connections and calls a server takes: no peer shuts out another one, and none the local socket.

Three bounds hold. Of open files, a part is kept for everything that is no connection from the network. gRPC closes connections over
the bound of a listener. And one peer has at most `MAX_CONNECTIONS_OF_PEER`, which gRPC cannot count: here its newest ones are shut
down. Calls are counted where they are handled (`Calls`), and refused in words over the bound.
"""

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
"""From the network, to one listener, where the limit of open files allows it."""
MAX_CONNECTIONS_OF_PEER: Final = 128
MAX_CALLS: Final = 4096
"""Under way at once in one server, watches among them."""
MAX_CALLS_OF_PEER: Final = 1024
"""Of those, from one address."""
RETRY_SECONDS: Final = 1.0
"""After which a call that was too many may be made again."""

KEPT_FILES: Final = 512
"""Open files that connections from the network leave alone: the local socket's, the journal's, the hypervisor's, channels."""
SWEEP_SECONDS: Final = 1.0
FEW_FILES: Final = 64
"""So few are open that no peer can have too many connections."""

Peer = str
"""An IPv4 address, or a /64 of IPv6: what one host has."""

log = structlog.get_logger(__name__)


def most_connections() -> int:
    """That a listener takes from the network, by the limit of open files."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return min(MAX_CONNECTIONS, max(64, (limit - KEPT_FILES) * 3 // 4))


class Calls:
    """Counts the calls of a server that are under way."""

    def __init__(self, most: int = MAX_CALLS, most_of_peer: int = MAX_CALLS_OF_PEER) -> None:
        self._most = most
        self._most_of_peer = most_of_peer
        self._total = 0
        self._of_peer: Counter[Peer] = Counter()

    @contextlib.contextmanager
    def one(self, peer: str) -> Iterator[None]:
        """A call of this peer (in gRPC's words) is under way in this block. Raises OVERLOADED where it is one too many."""
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
    """The peer of a call, such as ``ipv4:10.91.0.2:55010`` or ``ipv6:[fd92::1]:55010``; all of a unix socket are one."""
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
        """Addresses of the other ends, the oldest first."""

    async def keep_bounded(self) -> None:
        """For ever."""
        while True:
            await asyncio.sleep(SWEEP_SECONDS)  # no event tells of a new connection
            try:
                self.sweep()
            except OSError as error:  # there are too few files to look at them: some moment later, perhaps
                log.warning("the connections could not be counted", error=str(error))

    def sweep(self) -> None:
        """Shut down the newest connections of each peer that has too many."""
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
                with contextlib.suppress(OSError):  # it has gone by itself
                    found[end].shutdown(socket.SHUT_RDWR)  # gRPC reads the end of it, and closes its own descriptor

    def _connection(self, descriptor: int) -> socket.socket | None:
        """A duplicate of the descriptor, if it is a connection to one of the listeners."""
        try:
            duplicate = os.dup(descriptor)  # whatever becomes of the descriptor, this one stays the same
        except OSError:
            return None
        if not stat.S_ISSOCK(os.fstat(duplicate).st_mode):
            os.close(duplicate)
            return None
        found = socket.socket(fileno=duplicate)
        with contextlib.suppress(OSError):  # one that listens, or is closed just now, has no other end
            inet = found.family in (socket.AF_INET, socket.AF_INET6)
            if inet and found.getsockname()[1] in self._ports and found.getpeername():
                return found
        found.close()
        return None


def too_many(ends: Iterable[tuple[str, int]], most_of_peer: int) -> list[tuple[str, int]]:
    """Those over the bound of their peer; the first ones stay."""
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
