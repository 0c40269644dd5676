"""Checks of a registration: the name and the address are valid, they conflict with no known host, and the agent at that address
answers with the same identity.
"""

import re
from collections.abc import Mapping
from typing import Final

from agent.runtime.address import parse_address
from agent.runtime.backoff import PROOF, Clock
from agent.runtime.breaker import Breaker
from agent.runtime.configuration import MAX_NAME, NAME_PATTERN
from agent.runtime.errors import DroverError, Reason, invalid_field
from agent.runtime.events import Bus
from agent.service.bounds import answer_of
from agent.service.channel import open_channel
from coordinator.hosts.host_link import HostReport
from drover.agent.v1 import host_pb2 as agent_pb
from drover.agent.v1 import host_pb2_grpc as agent_rpc
from drover.coordinator.v1 import host_pb2 as pb

MAX_HOSTS: Final = 4096
PROOF_SECONDS: Final = 3.0
"""Deadline for an agent to prove its identity; shorter than an agent waits for the answer to its registration."""
MAX_PROOFS: Final = 32
"""Identity checks at once; more registrations are refused with BUSY."""
_NO_ANSWER: Final = (Reason.HOST_UNREACHABLE, Reason.DEADLINE_EXCEEDED)
_NAME: Final = re.compile(NAME_PATTERN)


def check_claim(host: agent_pb.Host, agent_address: str) -> str:
    """Check name, host_uuid and address; return the address in its normal form, for comparison. Raises INVALID_FIELD."""
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
    """Return the former names of this host: known hosts with the same host_uuid and address. A claim displaces no other host, except
    one that does not answer and has the claimed name.

    Raises BUSY, HOST_NAME_TAKEN, HOST_UUID_TAKEN.
    """
    holder = known.get(host.name)
    if holder is None and len(known) >= MAX_HOSTS:
        text = f"the cluster has {MAX_HOSTS} hosts, the most that it can have; remove one that is gone: `drover host remove NAME`"
        raise DroverError(Reason.BUSY, text)
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
        f"libvirt takes them for one host. If they are two hosts: set another host_uuid in {host.name}'s /etc/libvirt/libvirtd.conf "
        f"(`uuidgen` makes one), and restart libvirtd and the agent there. If {other.host.name} is the former name of this host: "
        f"`drover host remove {other.host.name}`",
        metadata={"host": other.host.name, "host_uuid": host.host_uuid},
    )


class Proofs:
    """Identity checks of agents that register, at most `MAX_PROOFS` at once."""

    def __init__(self, bus: Bus, clock: Clock) -> None:
        self._asking = 0
        self._breaker = Breaker(PROOF, _NO_ANSWER, bus, clock)

    async def prove(self, host: agent_pb.Host, address: str) -> HostReport:
        """Ask the agent at `address` for its host; return its answer, which has the name and host_uuid of `host`.

        Raises HOST_UNREACHABLE, DEADLINE_EXCEEDED, INVALID_FIELD (another host answers there), BUSY.
        """
        if self._asking >= MAX_PROOFS:
            raise DroverError(Reason.BUSY, "too many hosts are registering at this moment", retry_after=1.0)
        self._asking += 1
        try:
            with self._breaker.guard(address):  # else those that never answer hold every place
                answer = await _ask(host, address)
        except DroverError as error:
            if error.reason in _NO_ANSWER:
                raise
            # Any program may listen there and answer anything, so its reason must not become this coordinator's.
            text = f"{address} does not answer as a working agent does: {error.message}"
            raise DroverError(Reason.HOST_UNREACHABLE, text, metadata={"peer": address}) from None
        finally:
            self._asking -= 1
        if (answer.name, answer.host_uuid) != (host.name, host.host_uuid):
            text = f"host {answer.name} ({answer.host_uuid}) answers at {address}, not {host.name} ({host.host_uuid})"
            raise invalid_field("agent_address", text)
        return HostReport(answer)


async def _ask(host: agent_pb.Host, address: str) -> agent_pb.Host:
    channel = open_channel(address)
    try:
        call = agent_rpc.HostServiceStub(channel).GetHost(agent_pb.GetHostRequest(), timeout=PROOF_SECONDS)
        return (await answer_of(call, f"the agent of {host.name} at {address}")).host
    finally:
        await channel.close()
