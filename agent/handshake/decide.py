"""The driver's whole mind: from what both records say and whether it was cancelled, the calls to make next.

It keeps no state of its own. So two drivers at once are harmless, a driver that was restarted goes on from the records, and
a source that takes over from a dead driver runs this same function.
"""

from enum import StrEnum

from agent.handshake.destination import DestinationState as Dst
from agent.handshake.source import SourceState as Src


class Call(StrEnum):
    """A call to one of the two hosts; repeating one that is under way joins it."""

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
    """Both records are final and agree."""
    return (src, dst) in _END_STATES


def assume(src: Src | None, dst: Dst | None, *, source_dead: bool, destination_dead: bool) -> tuple[Src | None, Dst | None]:
    """What to act on where a host does not answer, or was declared dead. That changes nothing about a commit that is known: a
    source that removes its copy has read it from the destination.
    """
    if src in (Src.REMOVING, Src.REMOVED) and dst is not Dst.GONE:
        dst = Dst.RUNNING
    if destination_dead and dst is not Dst.RUNNING:
        dst = Dst.GONE
    if source_dead:
        src = Src.REMOVED if dst is Dst.RUNNING else Src.KEPT
    return src, dst


def disputed(src: Src | None, dst: Dst | None, *, by_word: bool) -> bool:
    """The source goes on by an operator's word, and the destination, which is back, has not learned yet that it lost the guest."""
    return by_word and dst is Dst.RUNNING and src in (Src.RESUMING, Src.KEPT)


def decide(src: Src | None, dst: Dst | None, *, cancel: bool, stalled: bool = False, by_word: bool = False) -> frozenset[Call]:
    """The calls to have under way now. Empty when it has `ended`.

    `stalled`: the source has sent everything long ago, and the armed copy still waits, so its last bytes were lost on their way.
    `by_word`: the source's record says that it goes on by an operator's word.
    `None` means that the host has no record of this attempt. Raises `AssertionError` for a pair that the rule excludes
    (the source kept the guest, and it runs at the destination): that must stop everything.
    """
    if disputed(src, dst, by_word=by_word):
        # The destination's agent asks when it starts, and ends what runs there: to be looked at again, not to be told.
        return frozenset({Call.CONFIRM_GONE} if src is Src.RESUMING else ())
    assert (src, dst) != (Src.KEPT, Dst.RUNNING), "the guest was kept at the source and runs at the destination"
    if ended(src, dst):
        return frozenset()
    if dst is Dst.RUNNING:
        return frozenset({Call.CONFIRM_RUNNING})
    if dst is Dst.GONE:
        return frozenset({Call.CONFIRM_GONE})
    if src in (Src.KEPT, Src.LOST):
        # Nothing flows any more. A copy that got everything before that refuses to be given up, and is RUNNING then.
        return frozenset({Call.ABANDON_SOURCE_KEPT})
    if dst is Dst.ABANDONING:
        return frozenset({Call.ABANDON})
    if stalled and (src, dst) == (Src.PERFORMED, Dst.ARMED):
        # A copy that starts at this very moment refuses to be given up, and is RUNNING then.
        return frozenset({Call.FINISH, Call.ABANDON_SOURCE_KEPT})
    return _stop(src, dst) if cancel else _go(src, dst)


def _stop(src: Src | None, dst: Dst | None) -> frozenset[Call]:
    """Cancel goes to the source first; once nothing is left to stop there, the destination's word is what is missing."""
    if src not in (Src.PERFORMED, Src.REMOVING, Src.REMOVED, Src.RESUMING):
        return frozenset({Call.ABORT})
    return frozenset({Call.FINISH if dst is Dst.ARMED else Call.ABANDON})


def _go(src: Src | None, dst: Dst | None) -> frozenset[Call]:
    if dst is None:
        # The slot comes before the guest is touched. A source that is further on has lost its destination for good.
        return frozenset({Call.RESERVE if src in (None, Src.BEGINNING, Src.BEGUN) else Call.ABANDON})
    if src in (None, Src.BEGINNING):
        return frozenset({Call.BEGIN})
    if src is Src.BEGUN:  # a destination that is armed already was so by hand
        return frozenset({Call.PERFORM if dst in (Dst.PREPARED, Dst.ARMED) else Call.PREPARE})
    # Armed early: while the memory still flows.
    return frozenset({Call.FINISH} | ({Call.PERFORM} if src is Src.PERFORMING else set()))
