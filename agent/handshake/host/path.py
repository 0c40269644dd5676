"""Proves, before the guest is touched, that the destination's migration address reaches its agent, and no other, and that packets of
full size pass both ways.

The destination answers on that address, the driver gets its secret from ReserveSlot, and the source has both prove that they know it
(`agent.network.probe`). Without it, two hosts that both have 127.0.0.1 (or another address that is not unique) as their migration
address would send a guest to themselves, or swap it with one that moves the other way.
"""

import asyncio
import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from agent.handshake.host.attempt import Attempt
from agent.handshake.host.phases import LocalHost
from agent.handshake.host.records import AttemptRecord
from agent.network.connecting import Found, PathError
from agent.network.interfaces import source_towards
from agent.network.probe import MAX_PAYLOAD, SECRET_BYTES, Measured, Responder, measure
from agent.network.rules import addresses_of
from agent.network.uri import same_address
from agent.runtime.address import TcpAddress, parse_address
from agent.runtime.errors import DroverError, Reason, invalid_field
from drover.agent.v1 import handshake_pb2 as pb
from drover.agent.v1 import host_pb2

_MAX_SECRET: Final = 64

_PORTS_TRIED: Final = 16
"""How many ports are tried, from the top of the migration range downwards: firewalls admit that range, and libvirt takes its ports
from the bottom."""

_ADVICE: Final[Mapping[Found, str]] = {
    Found.UNUSABLE: "look at `ip address` and `ip route get {ip}` on {host}, and at the networks of its agent",
    Found.DROPPED: "let the firewalls on {peer} and on the way pass TCP to {ip} on the ports of migrations, and look at the routes "
    "(`ip route get {ip}` on {host})",
    Found.REFUSED: "let the firewall of {peer} pass TCP to {ip} on the ports of migrations, and look whether its agent runs",
    Found.OTHER: "look whether another host has the address {ip}, and correct the migration network of {peer}",
    Found.SWALLOWED: "set an MTU on both that every switch between them carries (`ip link set DEVICE mtu 1500`), or raise that of "
    "the switches; `ping -M do -s SIZE {ip}` on {host} shows what passes",
    Found.SLOW: "look at the load of {peer} and the log of its agent, and start the migration again",
}

RENEWED: Final = frozenset({Found.REFUSED, Found.OTHER, Found.SLOW, ""})
"""What may be found where the destination's agent was restarted, and then another probe has the proof; empty: an older source."""


class PathProbes:
    """The probes of the slots that are reserved here, all at one port of each address, which is open while one of them is."""

    def __init__(self, host: LocalHost) -> None:
        self._host = host
        self._responders: dict[str, Responder] = {}
        """By address."""
        self._open: dict[Attempt, tuple[str, pb.PathProbe]] = {}
        self._opening = asyncio.Lock()

    async def open(self, attempt: Attempt, address: str) -> pb.PathProbe:
        """Return the probe of an attempt, for its driver, at an IP address of this host. After a restart of this agent it is another
        one, at another port. Raises NETWORK_NOT_FOUND if this host cannot listen there."""
        async with self._opening:
            if attempt not in self._open:
                responder = self._responders.get(address)
                if responder is None:
                    ports = self._host.features.first_port, self._host.features.last_port
                    responder = self._responders[address] = await open_responder(address, ports)
                self._open[attempt] = address, responder.add()
            return self._open[attempt][1]

    def close(self, attempt: Attempt) -> None:
        """Close the probe of an attempt, if it has one, and the port with the last one."""
        if attempt in self._open:
            address, probe = self._open.pop(attempt)
            responder = self._responders[address]
            responder.remove(probe)
            if not responder.keys:
                self._responders.pop(address).close()

    def close_all(self) -> None:
        for attempt in list(self._open):
            self.close(attempt)


async def open_responder(address: str, ports: tuple[int, int]) -> Responder:
    """Listen on an IP address, at a port of the range (bounds included), or at any port if those that are tried are taken.

    Raises:
        DroverError: NETWORK_NOT_FOUND when this host cannot listen on the address.
    """
    responder = Responder()
    first, last = ports
    problem: OSError | None = None
    for port in (*range(last, max(first, last - _PORTS_TRIED + 1) - 1, -1), 0):
        try:
            await responder.listen(address, port)
        except OSError as error:
            problem = error
        else:
            return responder
    raise DroverError(
        Reason.NETWORK_NOT_FOUND,
        f"the destination cannot listen on its migration address {address}: {problem}. Nothing was done to the guest; correct "
        "the address in the configuration of its agent",
        metadata={"address": address},
    )


@dataclass(frozen=True)
class Proof:
    """What was proved at Begin."""

    address: str = ""
    """The destination's IP address; empty without a probe, and then no memory will be sent."""
    measured: Measured | None = None


async def prove(
    probe: pb.PathProbe | None,
    host: str,
    peer: str,
    source_address: str = "",
    interfaces: Sequence[host_pb2.Interface] = (),
) -> Proof:
    """Prove that the probe's address leads to the agent of `peer`, and measure the path. `source_address`: this host's own on that
    network; empty: as the kernel chooses. `interfaces`: this host's.

    Raises:
        DroverError: INVALID_FIELD; PATH_NOT_PROVED, with what was found at the address.
    """
    if probe is None:
        return Proof()
    where, source = _read_probe(probe), _read_source(source_address)
    try:
        if source is not None:
            _check_route(where, source, interfaces, host)
        return Proof(str(where.host), await measure(probe, where, source, host, peer))
    except PathError as error:
        names = {"host": host, "peer": peer, "ip": str(where.host)}
        way = f"from {source} on {host}" if source else f"from {host}"
        raise DroverError(
            Reason.PATH_NOT_PROVED,
            f"the path {way} to {probe.address} on {peer} cannot carry a guest: {error}. Nothing was done to the guest, which stays "
            f"on {host}; {_ADVICE[error.found].format(**names)}",
            metadata={"address": probe.address, "host": host, "peer_host": peer, "found": error.found},
        ) from None


def _check_route(
    where: TcpAddress,
    source: ipaddress.IPv4Address | ipaddress.IPv6Address,
    interfaces: Sequence[host_pb2.Interface],
    host: str,
) -> None:
    """Raise `PathError` if the memory, for which the hypervisor chooses no source, would leave by another interface."""
    names = {address.packed: interface.name for interface, address in addresses_of(interfaces)}
    chosen = source_towards(where.host)
    planned, taken = names.get(source.packed), names.get(chosen.packed) if chosen is not None else None
    if planned and taken and planned != taken:
        text = f"by the routes of {host}, what is sent to {where.host} leaves by {taken} ({chosen}), and not by {planned} ({source})"
        raise PathError(Found.UNUSABLE, text)


def _read_probe(probe: pb.PathProbe) -> TcpAddress:
    """Return where a probe answers. Raises INVALID_FIELD."""
    secrets = {"nonce": probe.nonce, **({"key": probe.key} if probe.payload_bytes else {})}
    for name, secret in secrets.items():
        if not SECRET_BYTES // 2 <= len(secret) <= _MAX_SECRET:
            raise invalid_field(f"probe.{name}", f"must have {SECRET_BYTES // 2} to {_MAX_SECRET} bytes")
    if not 0 <= probe.payload_bytes <= MAX_PAYLOAD:
        raise invalid_field("probe.payload_bytes", f"must be 0 to {MAX_PAYLOAD}")
    try:
        where = parse_address(probe.address)
    except ValueError as error:
        raise invalid_field("probe.address", str(error)) from None
    if not isinstance(where, TcpAddress):
        raise invalid_field("probe.address", "must be an IP address with a port")
    return where


def _read_source(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text) if text else None
    except ValueError:
        raise invalid_field("source_address", f"{text} is not an IP address") from None


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
