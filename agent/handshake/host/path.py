"""Proves, before the guest is touched, that the migration address reaches the agent of the destination, and nobody else.

The destination answers on that address with a nonce that its ReserveSlot has told the driver, and the source reads it there. Two
hosts that both have 127.0.0.1 (or any address that is not unique) for their migration address would else send the guest to
themselves, or swap it with one that crosses it.
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
"""Deadline of a proof: far more than a connection in a data centre needs, and short enough to be told at once."""

_PORTS_TRIED: Final = 16
"""From the top of the migration range downwards: libvirt takes its ports from the bottom, and a firewall admits this range."""

_USED: Final = frozenset(DestinationState) - {DestinationState.RESERVED}


class PathProbe:
    """Answers with a nonce at one address of this host until it is closed."""

    def __init__(self, server: asyncio.Server, address: str, nonce: bytes) -> None:
        self._server = server
        self._told = pb.PathProbe(address=address, nonce=nonce)

    @classmethod
    async def open(cls, address: str, ports: tuple[int, int]) -> "PathProbe":
        """Listen on an IP address, at a port of the range (both bounds are part of it), or at any where those are all taken.

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
            f"this host cannot listen on its migration address {address}: {problem}. Nothing was done to the guest; correct the "
            "address in the agent's configuration",
            metadata={"address": address},
        )

    def to_proto(self) -> pb.PathProbe:
        """For ReserveSlot's answer."""
        return self._told

    def close(self) -> None:
        self._server.close()


class PathProbes:
    """The probes of the slots that are reserved here; each ends by itself once its slot is used or given up."""

    def __init__(self, host: LocalHost) -> None:
        self._host = host
        self._open: dict[Attempt, PathProbe] = {}

    async def open(self, attempt: Attempt, address: str) -> PathProbe:
        """Raises NETWORK_NOT_FOUND; see `PathProbe.open`."""
        features = self._host.features
        probe = self._open[attempt] = await PathProbe.open(address, (features.first_port, features.last_port))
        # However that ends: a task that is cancelled before it began runs none of its own code.
        attempt.start("probe", self._used(attempt)).add_done_callback(lambda _: self._close(attempt, probe))
        return probe

    async def of(self, attempt: Attempt) -> pb.PathProbe:
        """What to tell the driver of an attempt that is RESERVED: after a restart of this agent, another port and nonce."""
        probe = self._open.get(attempt) or await self.open(attempt, attempt.record.listen)
        return probe.to_proto()

    async def _used(self, attempt: Attempt) -> None:
        await attempt.until(_USED, 2 * self._host.lease_seconds)

    def _close(self, attempt: Attempt, probe: PathProbe) -> None:
        probe.close()
        if self._open.get(attempt) is probe:
            del self._open[attempt]


async def prove(probe: pb.PathProbe | None, host: str, peer: str) -> str:
    """Connect to where the destination answers, and compare. The IP address that was proved; it is empty, and no memory will be
    sent, where no probe was told.

    Raises:
        DroverError: INVALID_FIELD; PATH_NOT_PROVED, saying what was found there.
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
        f"{probe.address} does not lead from {host} to the agent of {peer}: {why}. The guest runs on {host} as "
        f"before; check the address of the migration network on {peer}, its routes and firewalls",
        metadata={"address": probe.address, "host": host, "peer_host": peer},
    )


def check_proved(record: AttemptRecord, address: str, host: str) -> None:
    """Memory goes only to an address that was proved at Begin. Raises PATH_NOT_PROVED."""
    if not same_address(record.proved, ipaddress.ip_address(address)):
        raise DroverError(
            Reason.PATH_NOT_PROVED,
            f"nobody has proved that {address} leads from {host} to the agent of {record.peer_host}; Begin proved "
            f"{record.proved or 'nothing'}. Guest {record.domain_name} was not touched and runs on {host}; give Begin the probe of "
            "ReserveSlot",
            metadata={"address": address, "host": host, "peer_host": record.peer_host},
        )


async def _read(where: TcpAddress, size: int) -> bytes | str:
    """What is answered there, or why nothing is."""
    writer = None
    try:
        async with asyncio.timeout(PROOF_SECONDS):
            reader, writer = await asyncio.open_connection(str(where.host), where.port)
            return await reader.readexactly(size)
    except TimeoutError:
        return f"no answer within {PROOF_SECONDS:g} s, so something on the way drops it"
    except asyncio.IncompleteReadError as error:
        return error.partial
    except socket.gaierror:  # a scope that is no interface here; its numbers are not those of errno
        return f"{where.host} is no address that can be reached from this host"
    except OSError as error:
        return os.strerror(error.errno).lower() if error.errno else str(error)  # asyncio puts its own words into strerror
    finally:
        if writer is not None:
            writer.close()
