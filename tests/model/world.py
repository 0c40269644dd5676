"""What may happen in a world: the code that runs in it, the bounds of its faults, and how its hypervisors behave."""

from collections.abc import Callable
from dataclasses import dataclass

from agent.handshake.machines.decide import Call, decide
from agent.handshake.machines.destination import DESTINATION, DestinationEffect, DestinationEvent, DestinationState
from agent.handshake.machines.facts import destination_fact, source_fact
from agent.handshake.machines.machine import Machine
from agent.handshake.machines.source import SOURCE, SourceEffect, SourceEvent, SourceState
from agent.hypervisor.base import Domain
from tests.model.parts import NO_FAULTS, Budget, Cost, Side

SourceMachine = Machine[SourceState, SourceEvent, SourceEffect]
DestinationMachine = Machine[DestinationState, DestinationEvent, DestinationEffect]
Mind = Callable[..., frozenset[Call]]
"""`decide`, or a mutation of it."""

BESIDE: frozenset[SourceEvent | DestinationEvent] = frozenset({SourceEvent.BEGIN, DestinationEvent.PREPARE})
"""Events whose effects libvirt undoes by itself, so that their records could be written beside them. The product does not: ADR 12.
"""

CHECKED: frozenset[SourceEvent | DestinationEvent] = frozenset(
    {SourceEvent.PERFORM, SourceEvent.CONFIRM_RUNNING, SourceEvent.CONFIRM_GONE, DestinationEvent.ABANDON_SOURCE_KEPT}
)
"""Calls for which the other host's record is read in some states."""


@dataclass(frozen=True)
class World:
    """One configuration. The defaults are the product as it is; mutations and findings replace fields."""

    name: str
    about: str = ""

    source: SourceMachine = SOURCE
    destination: DestinationMachine = DESTINATION
    decide: Mind = decide
    decide_takeover: Mind = decide
    source_fact: Callable[[Domain | None], SourceEvent | None] = source_fact
    destination_fact: Callable[[Domain | None], DestinationEvent | None] = destination_fact

    budget: Budget = NO_FAULTS
    coordinators: int = 1
    """How many drivers start at the beginning, each with the whole plan and without knowledge of the others."""
    takeover: bool = True
    """The source drives by itself when its driver is silent."""
    driver_returns: bool = True
    """A coordinator that died comes back. Without it, the agents must end the migration alone (A6)."""
    attempts: int = 1
    """How many attempts the first driver makes."""
    in_flight: int = 3
    """Maximum number of messages in flight at once."""

    user_paused: bool = False
    """The guest was paused by its user before the migration."""
    postcopy: bool = False
    """The transfer may be switched to post-copy (only once Finish waits)."""
    break_noticed: bool = True
    """The destination's QEMU notices that its stream broke. Not so with a dead host or a cut link."""
    copy_dies_early: bool = False
    """The destination's QEMU may also die after the guest has started and before that is recorded."""
    careless_abandon: bool = False
    """`Incoming.abandon` checks and then destroys in two steps, against its contract."""
    stalls: bool = True
    """A driver that sees PERFORMED and ARMED for long gives the copy up, perhaps too early: it relies on that contract."""
    reads: frozenset[Side] = frozenset(Side)
    """Sides that read the other one's record before they act on a decision, instead of believing the caller."""
    foreign_driver: bool = False
    """Another driver starts the same migration id towards a third host."""
    checks_peer: bool = True
    """A source tells a driver that its record is of another destination, and the driver stops."""
    wrong_statement: bool = False
    """An operator may state that a host is dead that is alive."""
    durable_driver: bool = True
    """What a driver has acknowledged to its user survives its death."""
    torn_end: bool = False
    """The destination may receive everything while the source believes that the transfer failed, and runs on."""

    fence: bool = True
    """A call for an earlier attempt is refused (`agent.handshake.host.attempts`)."""
    beside: frozenset[SourceEvent | DestinationEvent] = frozenset()
    """Events whose record is written while their effects are already under way, so that a crash may lose it."""
    turns: bool = False
    """A call waits between its checks and its application, and anything may happen meanwhile."""
    looks_again: frozenset[SourceEvent | DestinationEvent] = CHECKED
    """Calls that are refused when their turn comes in a state for which they were not checked."""
    undone: bool = True
    """libvirt undoes Begin and Prepare once it notices that the connection is closed."""
    effect_first: frozenset[DestinationEvent] = frozenset()
    """Mutation: calls whose effect is started before the record is written."""
    answer_first: frozenset[DestinationEvent] = frozenset()
    """Mutation: calls that are answered before the record is written."""
    asks_before_leaving: bool = True
    """A destination lets the guest move on only after the source has answered that it has ended and has not kept the guest."""
    asks_for_guest: bool = True
    """If the source has no record, the destination asks the source's hypervisor for the guest."""
    destination_asks: bool = True
    """An armed destination whose driver is silent asks the source whether it kept the guest."""
    abandon_awaits_finish: bool = True
    """A copy is recorded as GONE only after Finish has returned too."""

    checks: frozenset[str] | None = None
    """Names of the invariants that are checked; None for all."""

    def may(self, cost: Cost) -> bool:
        """Return whether such a fault can happen in this world."""
        return cost < 0 or self.budget[cost] > 0

    def checked(self, rule: str) -> bool:
        return self.checks is None or rule in self.checks
