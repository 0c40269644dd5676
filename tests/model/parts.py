"""The parts of a state of the world. Every part is a small immutable tuple, so that equal states are one state."""

from enum import IntEnum, StrEnum
from typing import NamedTuple

from agent.handshake.machines.decide import Call
from agent.handshake.machines.destination import DestinationState as Dst
from agent.handshake.machines.source import SourceState as Src


class Guest(IntEnum):
    """The guest at the source."""

    RUNNING = 0
    PAUSED = 1
    """Paused by the migration."""
    REMOVED = 2
    LOST = 3
    """Its QEMU died: a crash of the guest that the migration did not cause."""
    HELD = 4
    """Paused by its user before the migration; it runs nowhere, and must not be lost either."""


class Stream(IntEnum):
    """The stream of memory from QEMU to QEMU, as the source's hypervisor sees it."""

    NONE = 0
    FLOWING = 1
    POSTCOPY = 2
    DONE = 3
    BROKEN = 4


class Copy(IntEnum):
    """The guest's copy at the destination."""

    NONE = 0
    INCOMING = 1
    """Waits for its state."""
    COMPLETE = 2
    """Has its whole state and is paused; it starts if and only if Finish waits."""
    RUNNING = 3
    RAN = 4
    """It ran, and its QEMU died since."""
    KILLED = 5
    """It ran, and the migration destroyed it. Never right."""
    AWAY = 6
    """It has moved on and runs at a third host, by a migration of its own."""


class Finish(IntEnum):
    """libvirt's Finish at the destination. It survives the death of the agent that called it."""

    NONE = 0
    WAITING = 1
    DONE = 2
    FAILED = 3


class Hosts(NamedTuple):
    """Both hypervisors."""

    guest: Guest = Guest.RUNNING
    stream: Stream = Stream.NONE
    copy: Copy = Copy.NONE
    finish: Finish = Finish.NONE
    owned: bool = False
    """The connection that prepared the copy is open; once it is closed, libvirt destroys a copy for which Finish was not called."""
    locked: bool = False
    """Begin's job holds the guest; libvirt ends it once it notices that the connection of Begin is closed."""


class Stage(StrEnum):
    """The progress of a piece of an agent's work. All of it is in memory: a crash loses it."""

    START = "start"
    """Journalled, but the hypervisor was not called yet."""
    CALLED = "called"
    """The hypervisor works on it."""
    NEWS = "news"
    """The hypervisor has answered, but the report is not journalled yet."""
    TURN = "turn"
    """A call that was checked and waits for its turn. It is applied in the state of that moment."""
    WRITE = "write"
    """Only in mutations: a record that is written too late."""


class Work(NamedTuple):
    stage: Stage
    what: str
    """The name of an effect, or of an event."""


class Durable(NamedTuple):
    """The record in a journal while a newer one is being written."""

    attempt: int
    state: str | None
    statement: bool


class Agent(NamedTuple):
    """One agent. `attempt`, `state` and `word` are durable unless they are `behind`; the rest is memory."""

    attempt: int = 0
    state: str | None = None
    """A `SourceState` or `DestinationState`."""
    work: frozenset[Work] = frozenset()
    up: bool = True
    quiet: bool = False
    """The timer of its driver's silence has run out; the next call restarts it."""
    dead: bool = False
    """Its whole host is down."""
    statement: bool = False
    """An operator's word keeps the guest at the source, or took it from the destination."""
    behind: Durable | None = None
    """The record that a crash leaves, while a newer one is written beside its effect. None: the record is durable."""

    @property
    def durable(self) -> str | None:
        """The state that a crash leaves."""
        return self.state if self.behind is None else self.behind.state


class Side(StrEnum):
    SOURCE = "source"
    DESTINATION = "destination"


class Mode(IntEnum):
    """What a driver is doing."""

    OFF = 0
    LOOK_SOURCE = 1
    LOOK_DESTINATION = 2
    """It reads both records first: it takes over, or was restarted."""
    ON = 3
    ENDED = 4
    """It has seen both records end."""
    DEAD = 5


class Driver(NamedTuple):
    """One driver, and what it believes of the two records."""

    mode: Mode
    attempt: int = 1
    src: Src | None = None
    dst: Dst | None = None
    cancel: bool = False
    told: bool = False
    """It has acknowledged a cancel to its user."""
    dead: Side | None = None
    """The side that an operator declared dead to it, and that has not answered since."""
    by_statement: bool = False
    """The source's record carries an operator's word."""
    plan: bool = True
    """It can call the phases before Perform; a driver that takes over cannot."""
    foreign: bool = False
    """It drives the same migration id towards a third host; `dst` is the record there."""


class Unanswered(IntEnum):
    """A request carries this in place of an answer."""

    YET = 0


class Answer(NamedTuple):
    """The callee's record after the call. `state` is None if there is none."""

    state: str | None
    stale: bool = False
    """A later attempt has begun there."""
    statement: bool = False
    """The record carries an operator's word."""
    exists: bool = False
    """The record is of another destination than the caller's (MIGRATION_EXISTS)."""


NOBODY = -1
"""In place of the driver, in a request whose driver has ended or died."""


class Message(NamedTuple):
    """A call on its way, or its answer on its way back."""

    driver: int
    attempt: int
    call: Call
    answer: Answer | Unanswered = Unanswered.YET
    statement: bool = False
    """It rests on an operator's word."""
    foreign: bool = False
    """Its driver's destination is a third host."""
    astray: bool = False
    """A Perform with another URI than that at which the destination of the record listens."""


class Talk(NamedTuple):
    """The drivers and the messages in flight, as a set: they may arrive in any order."""

    drivers: tuple[Driver, ...]
    flying: frozenset[Message] = frozenset()


class Cost(IntEnum):
    """Faults, each with a budget. A step that costs nothing is no fault."""

    FREE = -1
    CRASH_SOURCE = 0
    """The source's agent dies."""
    CRASH_DESTINATION = 1
    CRASH_DRIVER = 2
    LOSE = 3
    """A message is lost."""
    REPEAT = 4
    """A request arrives twice."""
    FAIL = 5
    """The stream breaks, a call of the hypervisor fails, or it gives no answer."""
    QEMU = 6
    """A QEMU process dies."""
    CANCEL = 7
    """The user cancels (at one driver)."""
    EXPIRE = 8
    """A timer runs out although a driver is at work, which was slow. It is no fault if no driver is at work."""
    HOST = 9
    """A host dies: agent, hypervisor and guest."""
    STATEMENT = 10
    """An operator states at one driver that a host is dead."""
    BY_HAND = 11
    """Somebody else makes a call."""
    FORGET = 12
    """The source's journal trims the record of this attempt, which has ended."""
    MOVE = 13
    """The guest moves on from the destination to a third host."""


Budget = tuple[int, ...]
"""How many faults of each `Cost` may still happen."""


def budget(**faults: int) -> Budget:
    """Return a budget by lower-case names of `Cost`; faults that are not named do not happen."""
    names = {cost.name.lower(): cost for cost in Cost if cost >= 0}
    unknown = faults.keys() - names.keys()
    assert not unknown, f"no such fault: {unknown}"
    return tuple(faults.get(name, 0) for name in names)


NO_FAULTS = budget()


class Violation(Exception):  # noqa: N818 - a finding, not an error of the program
    """An invariant does not hold after a step; `rule` is its name."""

    def __init__(self, rule: str, text: str) -> None:
        super().__init__(f"{rule}: {text}")
        self.rule = rule
