"""Proves, before the guest is touched, that the destination's migration address reaches its agent, and no other.

The destination answers on that address with a nonce, the driver gets the nonce from ReserveSlot, and the source compares both.
Without it, two hosts that both have 127.0.0.1 (or another address that is not unique) as their migration address would send a
guest to themselves, or swap it with one that moves the other way.
"""

import asyncio
import contextlib
import ipaddress
import os
import secrets
import socket
from typing import Final

from agent.handshake.host.attempt import Attempt
from agent.handshake.host.phases import LocalHost
from agent.handshake.host.records import AttemptRecord
from agent.handshake.machines.destination import DestinationState
from agent.network.uri import same_address
from agent.runtime.address import TcpAddress, parse_address
from agent.runtime.errors import DroverError, Reason, invalid_field
from drover.agent.v1 import handshake_pb2 as pb

NONCE_BYTES: Final = 32
_MAX_NONCE: Final = 64
PROOF_SECONDS: Final = 3.0
"""Deadline of a proof: far more than a connection in a data centre needs, and short enough for the user to wait for the error."""

_PORTS_TRIED: Final = 16
"""How many ports are tried, from the top of the migration range downwards: firewalls admit that range, and libvirt takes its ports
from the bottom."""

_USED: Final = frozenset(DestinationState) - {DestinationState.RESERVED}


class PathProbe:
    """A server that answers with a nonce at one address of this host until it is closed."""

    def __init__(self, server: asyncio.Server, address: str, nonce: bytes) -> None:
        self._server = server
        self._message = pb.PathProbe(address=address, nonce=nonce)

    @classmethod
    async def open(cls, address: str, ports: tuple[int, int]) -> "PathProbe":
        """Listen on an IP address, at a port of the range (bounds included), or at any port if those that are tried are taken.

        Raises:
            DroverError: NETWORK_NOT_FOUND when this host cannot listen on the address.
        """
        nonce = secrets.token_bytes(NONCE_BYTES)

        async def answer(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError, TimeoutError):
                writer.write(nonce)
                async with asyncio.timeout(PROOF_SECONDS):
                    await writer.drain()
            writer.close()

        first, last = ports
        problem: OSError | None = None
        for port in (*range(last, max(first, last - _PORTS_TRIED + 1) - 1, -1), 0):
            try:
                server = await asyncio.start_server(answer, address, port, backlog=8)
            except OSError as error:
                problem = error
                continue
            where = TcpAddress(ipaddress.ip_address(address), server.sockets[0].getsockname()[1])
            return cls(server, str(where), nonce)
        raise DroverError(
            Reason.NETWORK_NOT_FOUND,
            f"the destination cannot listen on its migration address {address}: {problem}. Nothing was done to the guest; correct "
            "the address in the configuration of its agent",
            metadata={"address": address},
        )

    def to_proto(self) -> pb.PathProbe:
        """Return the probe for ReserveSlot's answer."""
        return self._message

    def close(self) -> None:
        self._server.close()


class PathProbes:
    """The probes of the slots that are reserved here. Each is closed once its slot is used or given up."""

    def __init__(self, host: LocalHost) -> None:
        self._host = host
        self._open: dict[Attempt, PathProbe] = {}

    async def open(self, attempt: Attempt, address: str) -> PathProbe:
        """Open the probe of an attempt. Raises NETWORK_NOT_FOUND; see `PathProbe.open`."""
        features = self._host.features
        probe = self._open[attempt] = await PathProbe.open(address, (features.first_port, features.last_port))
        # A callback, not a `finally`: a task that is cancelled before it starts runs none of its own code.
        attempt.start("probe", self._used(attempt)).add_done_callback(lambda _: self._close(attempt, probe))
        return probe

    async def of(self, attempt: Attempt) -> pb.PathProbe:
        """Return the probe of a RESERVED attempt for its driver. After a restart of this agent it has a new port and nonce."""
        probe = self._open.get(attempt) or await self.open(attempt, attempt.record.listen)
        return probe.to_proto()

    async def _used(self, attempt: Attempt) -> None:
        await attempt.until(_USED, 2 * self._host.lease_seconds)

    def _close(self, attempt: Attempt, probe: PathProbe) -> None:
        probe.close()
        if self._open.get(attempt) is probe:
            del self._open[attempt]


async def prove(probe: pb.PathProbe | None, host: str, peer: str) -> str:
    """Connect to the probe's address and compare the nonce. Return the IP address that was proved; empty without a probe, and then
    no memory will be sent.

    Raises:
        DroverError: INVALID_FIELD; PATH_NOT_PROVED, with what was found at the address.
    """
    if probe is None:
        return ""
    if not NONCE_BYTES // 2 <= len(probe.nonce) <= _MAX_NONCE:
        raise invalid_field("probe.nonce", f"must have {NONCE_BYTES // 2} to {_MAX_NONCE} bytes")
    try:
        where = parse_address(probe.address)
    except ValueError as error:
        raise invalid_field("probe.address", str(error)) from None
    if not isinstance(where, TcpAddress):
        raise invalid_field("probe.address", "must be an IP address with a port")
    found = await _read(where, len(probe.nonce))
    if isinstance(found, bytes) and secrets.compare_digest(found, probe.nonce):
        return str(where.host)
    why = "something else answers there" if isinstance(found, bytes) else found
    raise DroverError(
        Reason.PATH_NOT_PROVED,
        f"{probe.address} does not lead from {host} to the agent of {peer}: {why}. Nothing was done to the guest, which stays on "
        f"{host}; check the address of the migration network on {peer}, its routes and its firewalls",
        metadata={"address": probe.address, "host": host, "peer_host": peer},
    )


def check_proved(record: AttemptRecord, address: str, host: str) -> None:
    """Raise PATH_NOT_PROVED unless `address` was proved at Begin: memory is sent to no other."""
    if not same_address(record.proved, ipaddress.ip_address(address)):
        raise DroverError(
            Reason.PATH_NOT_PROVED,
            f"it is not proved that {address} leads from {host} to the agent of {record.peer_host}: Begin proved "
            f"{record.proved or 'no address'}. Nothing was sent, and guest {record.domain_name} stays on {host}; call Begin with "
            "the probe from ReserveSlot's answer",
            metadata={"address": address, "host": host, "peer_host": record.peer_host},
        )


async def _read(where: TcpAddress, size: int) -> bytes | str:
    """Return the bytes that are answered there, or as text why none are."""
    writer = None
    try:
        async with asyncio.timeout(PROOF_SECONDS):
            reader, writer = await asyncio.open_connection(str(where.host), where.port)
            return await reader.readexactly(size)
    except TimeoutError:
        return f"no answer within {PROOF_SECONDS:g} s, so packets are dropped on the way"
    except asyncio.IncompleteReadError as error:
        return error.partial
    except socket.gaierror:  # the scope is no interface here; its numbers are not those of errno
        return f"{where.host} cannot be reached from this host"
    except OSError as error:
        return os.strerror(error.errno).lower() if error.errno else str(error)  # asyncio puts its own text into `strerror`
    finally:
        if writer is not None:
            writer.close()
