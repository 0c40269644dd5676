"""The values of admission: what is asked for, what is taken, and the limits."""

from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Final

import msgspec

from agent.runtime.bell import Bell

MEDIUM: Final = 2
"""Importance of a migration that names none; 1 is low, 3 is high, as on the wire."""


UNKNOWN_ROW: Final = -1
"""No hash is that."""


class Direction(StrEnum):
    INCOMING = "incoming"
    OUTGOING = "outgoing"


class Kind(IntEnum):
    """What a slot allows; the values are those of the wire. A greater one includes the smaller."""

    PREPARED = 1
    """Everything before the transfer."""
    TRANSFERRING = 2


@dataclass(frozen=True)
class Limits:
    """The limits of one direction."""

    limit: int
    """Most units that transfer at once. 0: closed."""
    prepared: int
    """Most migrations that are prepared beside them."""
    unit_memory: int = 0
    """Bytes of memory that cost one unit. 0: every guest costs one."""

    def cost_of(self, memory: int) -> int:
        """Return the units for a guest of so many bytes: at most the limit, so that a big guest can move alone."""
        units = -(-memory // self.unit_memory) if self.unit_memory else 1
        return max(1, min(units, self.limit))


class Ask(msgspec.Struct, frozen=True):
    """What a migration asks of one direction of this host, and what another driver needs to go on in its place."""

    migration_id: str
    kind: Kind = Kind.TRANSFERRING
    """The least kind: PREPARED takes either."""
    peer: str = ""
    """The other host: for an incoming guest its source, for one that leaves its destination."""
    importance: int = MEDIUM
    memory: int = 0
    """Of the guest, in bytes."""
    driver: str = ""
    pending: bytes = b""
    """The migration (`drover.agent.v1.Migration`) as its driver has stored it. Empty: nobody takes it over. Only in the row."""
    peer_agent: str = ""


@dataclass
class Slot:
    """A taken slot."""

    kind: Kind
    cost: int
    """Units of the limit that it takes while it transfers."""
    epoch: int
    since: float
    turn: int = 0
    """Grant that its peer had before this one: a prepared migration keeps its turn by it."""
    attached: bool = False
    """A record of the handshake holds it: it ends with the record. Else it expires."""
    flows: bool = False
    """The record says that memory may flow."""


@dataclass(eq=False)
class Claim:
    """One migration in one direction: its slot, its place in the queue, or both while it is prepared and waits to transfer."""

    ask: Ask
    place: int
    """Rises with age; kept over restarts, and while it has a slot."""
    since: float
    """Since when it waits, by the clock of the book."""
    slot: Slot | None = None
    calls: int = 0
    """Calls of its driver that are under way."""
    seen: float = 0.0
    """When its driver last called, or the end of that call."""
    turn_until: float = float("-inf")
    """Until then it keeps its turn without a call: nobody behind it is served, nor is it."""
    row: int | None = None
    """Hash of its row in the journal. None: it has none; `UNKNOWN_ROW`: a row may be there, or another one than was last written."""
    silence_told: bool = False
    making: int = 0
    """Calls that make its record now: the record will hold its slot, so nobody takes the slot away meanwhile."""
    unwanted: bool = False
    """It was given back meanwhile."""
    bell: Bell = field(default_factory=Bell)
    """Rings when it gets a slot or loses its place."""

    @property
    def migration_id(self) -> str:
        return self.ask.migration_id

    @property
    def flows(self) -> bool:
        """Whether its memory flows, so that it needs no place any more. Before, an attempt may end and its migration go on."""
        return self.slot is not None and self.slot.flows

    @property
    def attached(self) -> bool:
        return self.slot is not None and self.slot.attached

    def has(self, kind: Kind) -> bool:
        """Return whether its slot allows `kind`."""
        return self.slot is not None and self.slot.kind >= kind
