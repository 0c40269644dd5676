"""The source's state machine: it obeys the destination's decision.

A guest whose Perform failed never stopped. A guest that was paused by a completed Perform resumes only on GONE and is removed
only on RUNNING; while the source can learn neither, the guest stays paused here.
"""

from enum import StrEnum

from agent.handshake.machines.machine import Machine, Transition


class SourceState(StrEnum):
    BEGINNING = "beginning"
    """The guest is being protected against changes."""
    BEGUN = "begun"
    """The guest runs here, protected against changes; no memory was sent."""
    PERFORMING = "performing"
    """The memory is sent; the guest runs here until the switch-over."""
    PERFORMED = "performed"
    """The guest is paused here; the destination's record decides where it runs."""
    LOST = "lost"
    """The guest's process died here during the transfer; the destination's record decides whether it runs there."""
    REMOVING = "removing"
    """The guest runs at the destination; the copy here is being removed."""
    REMOVED = "removed"
    """There is no copy here any more."""
    RESUMING = "resuming"
    """There is no other copy; the guest is being resumed here."""
    KEPT = "kept"
    """The guest stayed here; this attempt will never send anything."""


class SourceEvent(StrEnum):
    # calls
    BEGIN = "begin"
    PERFORM = "perform"
    ABORT = "abort"
    CONFIRM_RUNNING = "confirm_running"
    CONFIRM_GONE = "confirm_gone"
    # reports
    BEGIN_DONE = "begin_done"
    BEGIN_FAILED = "begin_failed"
    PERFORM_DONE = "perform_done"
    PERFORM_FAILED = "perform_failed"
    """Perform failed, or the hypervisor did not answer: LOOK finds out which."""
    SAW_UNTOUCHED = "saw_untouched"
    """The guest runs here as before, and no migration job holds it."""
    SAW_STOPPED = "saw_stopped"
    """The migration has paused the guest."""
    SAW_DEAD = "saw_dead"
    """The guest has no process here any more: nothing will be sent."""
    REMOVE_DONE = "remove_done"
    RESUME_DONE = "resume_done"
    DRIVER_SILENT = "driver_silent"
    """No driver called the next phase in time."""
    RESTARTED = "restarted"


class SourceEffect(StrEnum):
    BEGIN = "begin"
    PERFORM = "perform"
    ABORT = "abort"
    LOOK = "look"
    """Ask the hypervisor until no job holds the guest, and report its state."""
    REMOVE = "remove"
    RESUME = "resume"
    RELEASE = "release"
    """End the protection against changes."""


_S, _E, _F = SourceState, SourceEvent, SourceEffect
_T = Transition[SourceState, SourceEffect]

_keep = _T(_S.KEPT, (_F.RELEASE,))

SOURCE = Machine[SourceState, SourceEvent, SourceEffect](
    table={
        (None, _E.BEGIN): _T(_S.BEGINNING, (_F.BEGIN,)),
        # Tombstones: a Begin or Perform that was still on its way when the attempt was given up finds it KEPT.
        (None, _E.ABORT): _T(_S.KEPT),
        (None, _E.CONFIRM_GONE): _T(_S.KEPT),
        (_S.BEGINNING, _E.BEGIN): _T(_S.BEGINNING),
        (_S.BEGINNING, _E.BEGIN_DONE): _T(_S.BEGUN),
        (_S.BEGINNING, _E.BEGIN_FAILED): _keep,
        (_S.BEGINNING, _E.ABORT): _keep,
        (_S.BEGINNING, _E.CONFIRM_GONE): _keep,
        (_S.BEGINNING, _E.DRIVER_SILENT): _keep,
        (_S.BEGINNING, _E.RESTARTED): _keep,
        (_S.BEGUN, _E.BEGIN): _T(_S.BEGUN),
        (_S.BEGUN, _E.PERFORM): _T(_S.PERFORMING, (_F.PERFORM,)),
        (_S.BEGUN, _E.ABORT): _keep,
        (_S.BEGUN, _E.CONFIRM_GONE): _keep,
        (_S.BEGUN, _E.DRIVER_SILENT): _keep,
        (_S.BEGUN, _E.RESTARTED): _keep,
        (_S.PERFORMING, _E.BEGIN): _T(_S.PERFORMING),
        (_S.PERFORMING, _E.PERFORM): _T(_S.PERFORMING),
        (_S.PERFORMING, _E.PERFORM_DONE): _T(_S.PERFORMED),
        (_S.PERFORMING, _E.PERFORM_FAILED): _T(_S.PERFORMING, (_F.LOOK,)),
        (_S.PERFORMING, _E.SAW_UNTOUCHED): _keep,
        (_S.PERFORMING, _E.SAW_STOPPED): _T(_S.PERFORMED),
        (_S.PERFORMING, _E.SAW_DEAD): _T(_S.LOST),
        (_S.PERFORMING, _E.ABORT): _T(_S.PERFORMING, (_F.ABORT,)),
        (_S.PERFORMING, _E.CONFIRM_GONE): _T(_S.PERFORMING, (_F.ABORT,)),
        # The decision may be known before Perform's end is reported; the caller waits for that, then asks again.
        (_S.PERFORMING, _E.CONFIRM_RUNNING): _T(_S.PERFORMING),
        (_S.PERFORMING, _E.RESTARTED): _T(_S.PERFORMING, (_F.LOOK,)),
        (_S.PERFORMED, _E.PERFORM): _T(_S.PERFORMED),
        (_S.PERFORMED, _E.ABORT): _T(_S.PERFORMED),
        (_S.PERFORMED, _E.CONFIRM_RUNNING): _T(_S.REMOVING, (_F.REMOVE,)),
        (_S.PERFORMED, _E.CONFIRM_GONE): _T(_S.RESUMING, (_F.RESUME,)),
        (_S.LOST, _E.PERFORM): _T(_S.LOST),
        (_S.LOST, _E.ABORT): _T(_S.LOST),
        (_S.LOST, _E.CONFIRM_RUNNING): _T(_S.REMOVING, (_F.REMOVE,)),
        (_S.LOST, _E.CONFIRM_GONE): _T(_S.RESUMING, (_F.RESUME,)),
        (_S.REMOVING, _E.PERFORM): _T(_S.REMOVING),
        (_S.REMOVING, _E.ABORT): _T(_S.REMOVING),
        (_S.REMOVING, _E.CONFIRM_RUNNING): _T(_S.REMOVING),
        (_S.REMOVING, _E.REMOVE_DONE): _T(_S.REMOVED),
        (_S.REMOVING, _E.RESTARTED): _T(_S.REMOVING, (_F.REMOVE,)),
        (_S.REMOVED, _E.PERFORM): _T(_S.REMOVED),
        (_S.REMOVED, _E.ABORT): _T(_S.REMOVED),
        (_S.REMOVED, _E.CONFIRM_RUNNING): _T(_S.REMOVED),
        (_S.RESUMING, _E.PERFORM): _T(_S.RESUMING),
        (_S.RESUMING, _E.ABORT): _T(_S.RESUMING),
        (_S.RESUMING, _E.CONFIRM_GONE): _T(_S.RESUMING),
        (_S.RESUMING, _E.RESUME_DONE): _T(_S.KEPT, (_F.RELEASE,)),
        (_S.RESUMING, _E.RESTARTED): _T(_S.RESUMING, (_F.RESUME,)),
        (_S.KEPT, _E.ABORT): _T(_S.KEPT),
        (_S.KEPT, _E.CONFIRM_GONE): _T(_S.KEPT),
    },
    calls=frozenset({_E.BEGIN, _E.PERFORM, _E.ABORT, _E.CONFIRM_RUNNING, _E.CONFIRM_GONE}),
    final=frozenset({_S.REMOVED, _S.KEPT}),
)
