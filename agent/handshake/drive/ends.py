"""The two ends of a migration, and who finds them: a `Directory` turns the names that a user gave into hosts."""

from dataclasses import dataclass
from typing import Protocol

from agent.handshake.host.peer import HandshakePeer
from drover.agent.v1 import host_pb2
from drover.agent.v1 import migration_pb2 as pb


@dataclass(frozen=True)
class Side:
    """One end of a migration: its host, how to speak to it, and how others do."""

    host: host_pb2.Host
    handshake: HandshakePeer
    agent_address: str


@dataclass(frozen=True)
class Ends:
    """Both ends, and the guest as the source describes it."""

    source: Side
    destination: Side
    guest: host_pb2.GetDomainResponse


class Directory(Protocol):
    """Turns the names of a spec into hosts."""

    async def find(self, spec: pb.MigrationSpec) -> Ends:
        """Raises DOMAIN_NOT_FOUND, DOMAIN_AMBIGUOUS, HOST_NOT_FOUND, HOST_UNREACHABLE."""
        ...

    async def ends(self, migration: pb.Migration) -> tuple[Side, Side]:
        """Source and destination of a migration that was started before; they need not answer now."""
        ...
