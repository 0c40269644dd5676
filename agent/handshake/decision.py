"""What the other host's record allows. Pure.

A decision is read, never told: a source removes or resumes, and a destination gives up an armed copy, only by the record of the
host on the other side of its own record. A driver's call is a nudge to read it.
"""

from typing import Final

from agent.handshake.destination import DestinationState as Dst
from agent.handshake.source import SourceEvent
from agent.handshake.source import SourceState as Src

NOTHING_FLOWS: Final = frozenset({Src.KEPT, Src.LOST, Src.PERFORMED, Src.RESUMING})
"""States of a source that sends nothing any more and has not removed its copy: an armed copy may be given up. Should the copy have
got everything and start at that moment, the hypervisor refuses to destroy it."""


def source_obeys(destination: Dst | None, *, answered: bool, stated_dead: bool) -> SourceEvent | None:
    """The event that the destination's record means for a source that has stopped its guest; None while nothing is decided.

    `answered`: the record was read from the destination itself. `stated_dead`: an operator stated that the destination is dead,
    which counts only while it does not answer.
    """
    if destination is Dst.RUNNING:
        return SourceEvent.CONFIRM_RUNNING
    if destination is Dst.GONE or (stated_dead and not answered):
        return SourceEvent.CONFIRM_GONE
    return None


def destination_yields(source: Src | None, *, answered: bool, stated_dead: bool) -> bool:
    """Whether the source's record lets an armed copy be given up. The arguments are those of `source_obeys`, from the other side."""
    return source in NOTHING_FLOWS or (stated_dead and not answered)


def yields_unrecorded(guest: SourceEvent | None) -> bool:
    """Whether an armed copy may be given up where its source answers that it has no record of the attempt (it ended long ago: only
    the last ones stay), by what the source's hypervisor says of the guest: it must be there as before, held by no job.
    """
    return guest is SourceEvent.SAW_UNTOUCHED
