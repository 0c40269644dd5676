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
"""libvirt undoes these effects by itself, so their records could be written beside them. The product does not: ADR 12."""

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
    """Drivers that start at the beginning, each with the whole plan and each ignorant of the other."""
    takeover: bool = True
    """The source drives by itself when its driver is silent."""
    driver_returns: bool = True
    """A coordinator that died comes back. Without it, the agents must end the migration alone (A6)."""
    attempts: int = 1
    """How often the first driver tries."""
    in_flight: int = 3
    """Messages that are under way at once."""

    user_paused: bool = False
    """The guest was paused by its user before."""
    postcopy: bool = False
    """The transfer may be switched to post-copy (only once Finish waits)."""
    break_noticed: bool = True
    """The destination's QEMU learns that its stream broke. Without: a dead host, or a cut link, says nothing."""
    copy_dies_early: bool = False
    """The destination's QEMU may also die after the guest has started and before that is recorded."""
    careless_abandon: bool = False
    """`Incoming.abandon` looks and then destroys, as two steps, against its promise."""
    stalls: bool = True
    """A driver that sees PERFORMED and ARMED for long gives the copy up; it may be too quick. That relies on the promise."""
    reads: frozenset[Side] = frozenset(Side)
    """Sides that read the other one's record before they act on a decision, instead of believing the caller."""
    foreign_driver: bool = False
    """Another driver starts the same migration id towards a third host."""
    checks_peer: bool = True
    """A source tells a driver that its record is of another destination, and the driver stops."""
    wrong_statement: bool = False
    """An operator may state of a host that lives that it is dead."""
    durable_driver: bool = True
    """What a driver has acknowledged to its user survives its death."""
    torn_end: bool = False
    """At the last instant the destination gets everything, while the source believes that it failed and runs on."""

    fence: bool = True
    """A call for an earlier attempt is refused (`agent.handshake.host.attempts`)."""
    beside: frozenset[SourceEvent | DestinationEvent] = frozenset()
    """Events whose record is written while their effects are under way already: a crash may lose it."""
    turns: bool = False
    """A call waits for its turn between its checks and its application; anything may happen meanwhile."""
    looks_again: frozenset[SourceEvent | DestinationEvent] = CHECKED
    """Calls that are refused when their turn comes in a state for which they were not checked."""
    undone: bool = True
    """libvirt undoes what Begin and Prepare did, once it notices that the connection is closed."""
    effect_first: frozenset[DestinationEvent] = frozenset()
    """Mutation: calls whose effect is started before the record is written."""
    answer_first: frozenset[DestinationEvent] = frozenset()
    """Mutation: calls that are answered before the record is written."""
    asks_before_leaving: bool = True
    """A destination that lets the guest move on has learnt from the source that it has ended, and was not told to keep the guest."""
    asks_for_guest: bool = True
    """Where the source has no record, it asks its hypervisor for the guest."""
    destination_asks: bool = True
    """An armed destination whose driver is silent asks the source whether it kept the guest."""
    abandon_awaits_finish: bool = True
    """A copy is only called gone once Finish, too, has come back."""

    checks: frozenset[str] | None = None
    """Names of the invariants that are checked; None for all."""

    def may(self, cost: Cost) -> bool:
        """Whether such a fault happens at all."""
        return cost < 0 or self.budget[cost] > 0

    def checked(self, rule: str) -> bool:
        return self.checks is None or rule in self.checks
