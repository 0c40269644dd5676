"""The two ends of a migration, and the interface that finds them by the names that a user gave."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from agent.handshake.drive.plan import Plan
from agent.handshake.host.peer import HandshakePeer
from agent.runtime.bell import Bell
from drover.agent.v1 import host_pb2
from drover.agent.v1 import migration_pb2 as pb


@dataclass(frozen=True)
class Side:
    """One end of a migration."""

    host: host_pb2.Host
    handshake: HandshakePeer
    """How the driver calls its agent."""
    agent_address: str
    """Where other hosts reach its agent."""


@dataclass(frozen=True)
class Ends:
    """Both ends of a migration, and its guest as the source describes it."""

    source: Side
    destination: Side
    guest: host_pb2.GetDomainResponse
    networks: Sequence[host_pb2.Network] = ()
    """The networks that the finder has defined, without addresses; each host has its sides of them among its own."""


@dataclass(frozen=True)
class Chosen:
    """A destination, with the plan for it."""

    ends: Ends
    plan: Plan
    warnings: list[str]


@dataclass(frozen=True)
class Candidate(Chosen):
    """A host that may take a guest."""

    name: str
    """As `MigrationSpec.destination_host`."""
    free: bool
    """By its last report it has an incoming slot for the guest, and nobody waits for one."""


class Directory(Protocol):
    """The lookup of a migration's hosts."""

    @property
    def changed(self) -> Bell:
        """The bell that rings when `known` has changed."""

    def known(self, host: str) -> host_pb2.Host | None:
        """Return a host, by its own name, with its sides of the networks as they were last reported; None if it is not known."""

    def foreign(self) -> Sequence[pb.Migration]:
        """Return the migrations that send from hosts of this directory and have another driver, with the limits that it has set."""
        ...

    async def find(self, spec: pb.MigrationSpec) -> Ends:
        """Find the hosts and the guest that a spec names.

        Raises:
            DroverError: DOMAIN_NOT_FOUND, DOMAIN_AMBIGUOUS, HOST_NOT_FOUND, HOST_UNREACHABLE.
        """
        ...

    async def ends(self, migration: pb.Migration) -> tuple[Side, Side]:
        """Return source and destination of a migration that was started before; they need not answer now."""
        ...

    async def guest(self, spec: pb.MigrationSpec) -> host_pb2.GetDomainResponse:
        """Ask the source, which the spec names, for the guest as it is now. Raises DOMAIN_NOT_FOUND, HOST_NOT_FOUND,
        HOST_UNREACHABLE, DEADLINE_EXCEEDED."""
        ...

    async def source(self, migration: pb.Migration) -> Side:
        """Return the source of a migration that was started before, by its last report; it need not answer now."""
        ...

    async def candidates(self, spec: pb.MigrationSpec, others: Sequence[pb.Migration] = ()) -> list[Candidate]:
        """Return the hosts that may take the guest of a spec, the best first, whatever its destination: without its source, and
        without hosts that are cordoned, closed, silent, or whose breaker is open. `others`: migrations that count for their plans.

        A coordinator asks the source only; of the others, the last reports count. Raises as `find`, for the source; what keeps the
        guest from leaving it; NO_HOST, with the reason for each host, if no host may take it."""
        ...
