"""The destination's state machine. Its record is the decision: RUNNING is the commit, GONE the abort, and both are final.

The rule that everything rests on: from ARMED on the guest may start here at any moment, so an armed copy is never killed by
hand. Only what the hypervisor reports (`SAW_…`), the end of Finish, or the source's durable record that it kept the guest leads
out of ARMED.
"""

from enum import StrEnum

from agent.handshake.machines.machine import Machine, Transition


class DestinationState(StrEnum):
    RESERVED = "reserved"
    """A slot is leased."""
    PREPARING = "preparing"
    """The empty copy is being created."""
    PREPARED = "prepared"
    """The copy waits for the memory; nothing will start it."""
    ARMED = "armed"
    """The hypervisor starts the copy as soon as its whole state has arrived."""
    RUNNING = "running"
    """The guest runs here; the copy at the source may only be removed."""
    ABANDONING = "abandoning"
    """The copy is being destroyed; nothing will start it."""
    GONE = "gone"
    """There is no copy here, and never will be for this attempt."""


class DestinationEvent(StrEnum):
    # calls
    RESERVE = "reserve"
    PREPARE = "prepare"
    FINISH = "finish"
    ABANDON = "abandon"
    ABANDON_SOURCE_KEPT = "abandon_source_kept"
    """An Abandon that says that the source's record is KEPT."""
    # reports
    PREPARE_DONE = "prepare_done"
    PREPARE_FAILED = "prepare_failed"
    FINISH_DONE = "finish_done"
    FINISH_FAILED = "finish_failed"
    """The hypervisor ended Finish with an error: nothing waits to start the copy any more."""
    FINISH_UNKNOWN = "finish_unknown"
    """The hypervisor did not answer: it may or may not start the copy."""
    ABANDON_DONE = "abandon_done"
    ABANDON_REFUSED = "abandon_refused"
    """The hypervisor refused to destroy the copy because it has run."""
    SAW_RUNNING = "saw_running"
    SAW_ABSENT = "saw_absent"
    LEASE_EXPIRED = "lease_expired"
    DISOWNED = "disowned"
    """The source kept the guest because an operator stated that this host was dead: the copy here must not run."""
    RESTARTED = "restarted"
    """The agent has started and read this state from its journal."""


class DestinationEffect(StrEnum):
    PREPARE = "prepare"
    FINISH = "finish"
    ABANDON = "abandon"
    DISOWN = "disown"
    """Stop a copy that runs, or remove the definition of one that does not."""
    LOOK = "look"
    """Ask the hypervisor until the copy runs or is absent."""


_S, _E, _F = DestinationState, DestinationEvent, DestinationEffect
_T = Transition[DestinationState, DestinationEffect]

_give_up = _T(_S.ABANDONING, (_F.ABANDON,))

DESTINATION = Machine[DestinationState, DestinationEvent, DestinationEffect](
    table={
        (None, _E.RESERVE): _T(_S.RESERVED),
        # A tombstone: a call that was still on its way when the attempt was given up finds it GONE.
        (None, _E.ABANDON): _T(_S.GONE),
        (None, _E.ABANDON_SOURCE_KEPT): _T(_S.GONE),
        (_S.RESERVED, _E.RESERVE): _T(_S.RESERVED),
        (_S.RESERVED, _E.PREPARE): _T(_S.PREPARING, (_F.PREPARE,)),
        (_S.RESERVED, _E.ABANDON): _T(_S.GONE),
        (_S.RESERVED, _E.ABANDON_SOURCE_KEPT): _T(_S.GONE),
        (_S.RESERVED, _E.LEASE_EXPIRED): _T(_S.GONE),
        (_S.PREPARING, _E.PREPARE): _T(_S.PREPARING),
        (_S.PREPARING, _E.PREPARE_DONE): _T(_S.PREPARED),
        (_S.PREPARING, _E.PREPARE_FAILED): _give_up,
        (_S.PREPARING, _E.ABANDON): _give_up,
        (_S.PREPARING, _E.ABANDON_SOURCE_KEPT): _give_up,
        (_S.PREPARING, _E.LEASE_EXPIRED): _give_up,
        (_S.PREPARING, _E.RESTARTED): _give_up,
        (_S.PREPARED, _E.PREPARE): _T(_S.PREPARED),
        (_S.PREPARED, _E.FINISH): _T(_S.ARMED, (_F.FINISH,)),
        (_S.PREPARED, _E.ABANDON): _give_up,
        (_S.PREPARED, _E.ABANDON_SOURCE_KEPT): _give_up,
        (_S.PREPARED, _E.LEASE_EXPIRED): _give_up,
        (_S.PREPARED, _E.RESTARTED): _give_up,
        (_S.ARMED, _E.PREPARE): _T(_S.ARMED),
        (_S.ARMED, _E.FINISH): _T(_S.ARMED),
        (_S.ARMED, _E.FINISH_DONE): _T(_S.RUNNING),
        # Nothing waits to start the copy any more; if it runs after all, ABANDON_REFUSED reports it.
        (_S.ARMED, _E.FINISH_FAILED): _give_up,
        (_S.ARMED, _E.FINISH_UNKNOWN): _T(_S.ARMED, (_F.LOOK,)),
        (_S.ARMED, _E.RESTARTED): _T(_S.ARMED, (_F.LOOK,)),
        (_S.ARMED, _E.SAW_RUNNING): _T(_S.RUNNING),
        # What Finish left behind (a stored definition) is removed before GONE.
        (_S.ARMED, _E.SAW_ABSENT): _give_up,
        (_S.ARMED, _E.ABANDON_SOURCE_KEPT): _give_up,
        (_S.RUNNING, _E.PREPARE): _T(_S.RUNNING),
        (_S.RUNNING, _E.FINISH): _T(_S.RUNNING),
        (_S.RUNNING, _E.DISOWNED): _T(_S.ABANDONING, (_F.DISOWN,)),
        (_S.ABANDONING, _E.ABANDON): _T(_S.ABANDONING),
        (_S.ABANDONING, _E.ABANDON_SOURCE_KEPT): _T(_S.ABANDONING),
        (_S.ABANDONING, _E.ABANDON_DONE): _T(_S.GONE),
        # Nobody has read GONE yet, so a copy that runs may still become RUNNING.
        (_S.ABANDONING, _E.ABANDON_REFUSED): _T(_S.RUNNING),
        (_S.ABANDONING, _E.RESTARTED): _give_up,
        (_S.GONE, _E.ABANDON): _T(_S.GONE),
        (_S.GONE, _E.ABANDON_SOURCE_KEPT): _T(_S.GONE),
    },
    calls=frozenset({_E.RESERVE, _E.PREPARE, _E.FINISH, _E.ABANDON, _E.ABANDON_SOURCE_KEPT}),
    final=frozenset({_S.RUNNING, _S.GONE}),
)
