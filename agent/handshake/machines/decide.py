"""The driver's decisions, as pure functions: from both records, and whether it was cancelled, to the calls to make next.

They keep no state. So two drivers at once are harmless, a restarted driver goes on from the records, and a source that takes
over from a dead driver uses the same functions.
"""

from collections.abc import Collection
from enum import StrEnum

from agent.handshake.machines.destination import DestinationState as Dst
from agent.handshake.machines.source import SourceState as Src


class Call(StrEnum):
    """A call to one of the two hosts. Repeating a call that is under way joins it."""

    RESERVE = "reserve"
    BEGIN = "begin"
    PREPARE = "prepare"
    PERFORM = "perform"
    FINISH = "finish"
    CONFIRM_RUNNING = "confirm_running"
    CONFIRM_GONE = "confirm_gone"
    ABORT = "abort"
    ABANDON = "abandon"
    ABANDON_SOURCE_KEPT = "abandon_source_kept"


_END_STATES = {(Src.REMOVED, Dst.RUNNING), (Src.KEPT, Dst.GONE)}


def ended(src: Src | None, dst: Dst | None) -> bool:
    """Return whether both records are final and agree."""
    return (src, dst) in _END_STATES


def assume(
    src: Src | None, dst: Dst | None, *, source_dead: bool, destination_dead: bool, overtaken: Collection[str] = ()
) -> tuple[Src | None, Dst | None]:
    """Return the states to act on if a host was declared dead, or the destination's state follows from the source's: a source
    that removes its copy has read the commit from the destination. A known commit stays a commit, whoever is dead.

    `overtaken`: sides that know a later attempt and have no record of this one: it has ended there, or can never begin.
    """
    if src in (Src.REMOVING, Src.REMOVED) and dst is not Dst.GONE:
        dst = Dst.RUNNING
    if destination_dead and dst is not Dst.RUNNING:
        dst = Dst.GONE
    if dst is None and "destination" in overtaken:
        dst = Dst.GONE
    if source_dead or (src is None and "source" in overtaken):
        src = Src.REMOVED if dst is Dst.RUNNING else Src.KEPT
    return src, dst


def disputed(src: Src | None, dst: Dst | None, *, by_statement: bool) -> bool:
    """Return whether the source resumed by an operator's statement while the destination, now back, still believes that it has
    the guest.
    """
    return by_statement and dst is Dst.RUNNING and src in (Src.RESUMING, Src.KEPT)


def decide(src: Src | None, dst: Dst | None, *, cancel: bool, stalled: bool = False, by_statement: bool = False) -> frozenset[Call]:
    """Return the calls that must be under way now; none once it has `ended`.

    Args:
        src, dst: the states of both records; None for a host without a record of this attempt.
        cancel: the migration is to be cancelled if it is not too late.
        stalled: the source sent everything long ago and the armed copy still waits, so the last bytes were lost on the way.
        by_statement: the source's record says that it resumes by an operator's statement.

    Raises:
        AssertionError: the guest was kept at the source and runs at the destination, which the rule excludes: all must stop.
    """
    if disputed(src, dst, by_statement=by_statement):
        # The destination's agent asks the source by itself when it starts, and ends its copy: watch it, but call nothing there.
        return frozenset({Call.CONFIRM_GONE} if src is Src.RESUMING else ())
    assert (src, dst) != (Src.KEPT, Dst.RUNNING), "the guest was kept at the source and runs at the destination"
    if ended(src, dst):
        return frozenset()
    if dst is Dst.RUNNING:
        return frozenset({Call.CONFIRM_RUNNING})
    if dst is Dst.GONE:
        return frozenset({Call.CONFIRM_GONE})
    if src in (Src.KEPT, Src.LOST):
        # Nothing flows any more. A copy that received everything before that refuses to be given up and becomes RUNNING.
        return frozenset({Call.ABANDON_SOURCE_KEPT})
    if dst is Dst.ABANDONING:
        return frozenset({Call.ABANDON})
    if stalled and (src, dst) == (Src.PERFORMED, Dst.ARMED):
        # A copy that starts at this very moment refuses to be given up and becomes RUNNING.
        return frozenset({Call.FINISH, Call.ABANDON_SOURCE_KEPT})
    return _stop(src, dst) if cancel else _go(src, dst)


def _stop(src: Src | None, dst: Dst | None) -> frozenset[Call]:
    """Return the calls of a cancel: first Abort at the source; once nothing is left to stop there, ask the destination to decide."""
    if src not in (Src.PERFORMED, Src.REMOVING, Src.REMOVED, Src.RESUMING):
        return frozenset({Call.ABORT})
    return frozenset({Call.FINISH if dst is Dst.ARMED else Call.ABANDON})


def _go(src: Src | None, dst: Dst | None) -> frozenset[Call]:
    if dst is None:
        # The slot is reserved before the guest is touched. A source that is further on has lost its destination for good.
        return frozenset({Call.RESERVE if src in (None, Src.BEGINNING, Src.BEGUN) else Call.ABANDON})
    if src in (None, Src.BEGINNING):
        return frozenset({Call.BEGIN})
    if src is Src.BEGUN:  # ARMED already: somebody called Finish by hand
        return frozenset({Call.PERFORM if dst in (Dst.PREPARED, Dst.ARMED) else Call.PREPARE})
    # Finish is called early, while the memory still flows.
    return frozenset({Call.FINISH} | ({Call.PERFORM} if src is Src.PERFORMING else set()))
