"""A state machine as data: a table from (state, event) to the next state and the effects.

No clock, no I/O, no libvirt and no gRPC here. The same tables are run by the agents (`agent.handshake.host.attempt`), explored by
the model checker (`tests/model`) and printed in the documentation (`docs/protocol.md`), so that they cannot drift apart.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, TypeVar

S = TypeVar("S", bound=StrEnum)
E = TypeVar("E", bound=StrEnum)
F = TypeVar("F", bound=StrEnum)


@dataclass(frozen=True)
class Refused(Exception):  # noqa: N818 - an answer, not a fault
    """The event is a call that this state does not allow; nothing changes."""

    state: str | None
    event: str


@dataclass(frozen=True)
class Transition(Generic[S, F]):
    """Where an event leads. The new state is made durable first, then the effects are started."""

    state: S
    effects: tuple[F, ...] = ()


@dataclass(frozen=True)
class Machine(Generic[S, E, F]):
    """A table, and which events are calls: a call without a row is refused; any other event without a row is stale and ignored."""

    table: Mapping[tuple[S | None, E], Transition[S, F]]
    calls: frozenset[E]
    final: frozenset[S]

    def step(self, state: S | None, event: E) -> Transition[S, F] | None:
        """Return the transition, or None for a stale event, which changes nothing.

        Raises:
            Refused: a call that this state does not allow.
        """
        transition = self.table.get((state, event))
        if transition is None and event in self.calls:
            raise Refused(state, event)
        return transition

    def allowed(self, state: S | None) -> list[E]:
        """Return the calls that this state allows."""
        return [event for (at, event) in self.table if at == state and event in self.calls]
