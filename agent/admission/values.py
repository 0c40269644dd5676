"""The values of admission: what is asked for, what is taken, and the limits."""

from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import Final

MEDIUM: Final = 2
"""Importance of a migration that names none; 1 is low, 3 is high, as on the wire."""


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


@dataclass(frozen=True)
class Ask:
    """What a migration asks of one direction of this host."""

    migration_id: str
    kind: Kind = Kind.TRANSFERRING
    """The least kind: PREPARED takes either."""
    peer: str = ""
    """The other host: for an incoming guest its source, for one that leaves its destination."""
    importance: int = MEDIUM
    memory: int = 0
    """Of the guest, in bytes."""


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
    """The record says that memory may flow: no place in the queue is needed again."""


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
    driver: str = ""
    """Name of the driver that called last."""
    stored: int = 0
    """Checksum of its row in the journal. 0: it has none; less: unknown."""
    silence_told: bool = False
    making: int = 0
    """Calls that make its record now: the record will hold its slot, so nobody takes the slot away meanwhile."""
    unwanted: bool = False
    """It was given back meanwhile."""

    @property
    def migration_id(self) -> str:
        return self.ask.migration_id

    @property
    def attached(self) -> bool:
        return self.slot is not None and self.slot.attached

    def has(self, kind: Kind) -> bool:
        """Return whether its slot allows `kind`."""
        return self.slot is not None and self.slot.kind >= kind


@dataclass(frozen=True)
class Standing:
    """Where a migration stands in a queue."""

    direction: Direction
    limit: int
    in_use: int
    """Units of the limit that are taken."""
    holders: tuple[str, ...]
    """Some of the migrations that hold them."""
    position: int
    """From 1."""
    queue_length: int
    """Itself included."""
    low: float
    """Likely seconds until its turn, at least."""
    high: float
