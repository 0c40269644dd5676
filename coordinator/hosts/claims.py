"""What a host that registers must show: a name and an address that are right, a place among the hosts that are known, and an agent
at that address that answers with this very identity.
"""

import re
from collections.abc import Mapping
from typing import Final

from agent.config import MAX_NAME, NAME_PATTERN
from agent.runtime.address import parse_address
from agent.runtime.errors import DroverError, Reason, invalid_field
from agent.service.bounds import checked_answer
from agent.service.channel import open_channel
from agent.service.status import errors_of
from coordinator.hosts.host_link import Word
from drover.agent.v1 import host_pb2 as agent_pb
from drover.agent.v1 import host_pb2_grpc as agent_rpc
from drover.coordinator.v1 import host_pb2 as pb

MAX_HOSTS: Final = 4096
PROOF_SECONDS: Final = 3.0
"""Deadline of the question to an agent who it is; shorter than an agent waits for the answer to its registration."""
MAX_PROOFS: Final = 32
_NO_ANSWER: Final = (Reason.HOST_UNREACHABLE, Reason.DEADLINE_EXCEEDED)
_NAME: Final = re.compile(NAME_PATTERN)


def check_claim(host: agent_pb.Host, agent_address: str) -> str:
    """The address in the one spelling that can be compared. Raises INVALID_FIELD."""
    if not _NAME.match(host.name) or len(host.name) > MAX_NAME:
        text = f'must be at most {MAX_NAME} of a-z, 0-9, "." and "-", beginning and ending with a letter or digit'
        raise invalid_field("host.name", text)
    if not host.host_uuid:
        raise invalid_field("host.host_uuid", "must not be empty")
    try:
        return str(parse_address(agent_address))
    except ValueError as error:
        raise invalid_field("agent_address", str(error)) from None


def check_free(host: agent_pb.Host, address: str, known: Mapping[str, pb.ClusterHost]) -> list[str]:
    """The names that this host had before: those of the same agent. No other host gives way to a claim but one that does not answer
    and has the claimed name.

    Raises BUSY, HOST_NAME_TAKEN, HOST_UUID_TAKEN.
    """
    holder = known.get(host.name)
    if holder is None and len(known) >= MAX_HOSTS:
        raise DroverError(Reason.BUSY, f"the cluster has {MAX_HOSTS} hosts, the most that it can have")
    if holder is not None and holder.state == pb.HOST_STATE_UP and holder.agent_address != address:
        raise DroverError(
            Reason.HOST_NAME_TAKEN,
            f'the name "{host.name}" belongs to host {holder.host.host_uuid} at {holder.agent_address}, which is alive; give host '
            f"{host.host_uuid} at {address} another name in its agent's configuration, or stop the other agent",
            metadata={"host": host.name, "host_uuid": holder.host.host_uuid},
        )
    same = [other for other in known.values() if other.host.host_uuid == host.host_uuid and other.host.name != host.name]
    for other in same:
        if other.agent_address != address:
            raise _uuid_taken(host, address, other)
    return [other.host.name for other in same]


def _uuid_taken(host: agent_pb.Host, address: str, other: pb.ClusterHost) -> DroverError:
    return DroverError(
        Reason.HOST_UUID_TAKEN,
        f"{host.name} at {address} and {other.host.name} at {other.agent_address} have the same host_uuid {host.host_uuid}, so "
        f"libvirt takes them for one host. If they are two: set another host_uuid in {host.name}'s /etc/libvirt/libvirtd.conf "
        f"(`uuidgen` makes one), and restart libvirtd and the agent there. If {other.host.name} is the former name of this host: "
        f"`drover host remove {other.host.name}`",
        metadata={"host": other.host.name, "host_uuid": host.host_uuid},
    )


class Proofs:
    """Questions to agents whether they are who registers; a bounded number at once."""

    def __init__(self) -> None:
        self._asking = 0

    async def prove(self, host: agent_pb.Host, address: str) -> Word:
        """What the agent at that address says of its host, which is the one that registers.

        Raises HOST_UNREACHABLE, DEADLINE_EXCEEDED, INVALID_FIELD (another host answers there), BUSY.
        """
        if self._asking >= MAX_PROOFS:
            raise DroverError(Reason.BUSY, "too many hosts register at this moment", retry_after=1.0)
        self._asking += 1
        try:
            said = await _ask(host, address)
        except DroverError as error:
            if error.reason in _NO_ANSWER:
                raise
            # Anything may listen there and say anything; its words are not those of this coordinator.
            text = f"what answers at {address} is no agent, or cannot be asked now: {error.message}"
            raise DroverError(Reason.HOST_UNREACHABLE, text, metadata={"peer": address}) from None
        finally:
            self._asking -= 1
        if (said.name, said.host_uuid) != (host.name, host.host_uuid):
            text = f"host {said.name} ({said.host_uuid}) answers at {address}, not {host.name} ({host.host_uuid})"
            raise invalid_field("agent_address", text)
        return Word(said)


async def _ask(host: agent_pb.Host, address: str) -> agent_pb.Host:
    channel = open_channel(address)
    try:
        with errors_of(f"the agent of {host.name} at {address}"):
            call = agent_rpc.HostServiceStub(channel).GetHost
            return checked_answer(await call(agent_pb.GetHostRequest(), timeout=PROOF_SECONDS), address).host
    finally:
        await channel.close()
