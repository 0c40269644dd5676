"""Pure functions from the other host's record to what this host may do.

A host acts on the decision in the other host's record, which it reads itself, and never on a caller's claim: only so does a
source remove or resume, and a destination give up an armed copy. A driver's call only prompts it to read that record.
"""

from typing import Final

from agent.handshake.machines.destination import DestinationState as Dst
from agent.handshake.machines.source import SourceEvent
from agent.handshake.machines.source import SourceState as Src

NOTHING_FLOWS: Final = frozenset({Src.KEPT, Src.LOST, Src.PERFORMED, Src.RESUMING})
"""States of a source that sends nothing any more and has not removed its copy, so that an armed copy may be given up. If that copy
has received everything and starts at that moment, the hypervisor refuses to destroy it."""


def source_obeys(destination: Dst | None, *, answered: bool, stated_dead: bool) -> SourceEvent | None:
    """Return the event for a source that has stopped its guest, by the destination's record; None while nothing is decided.

    `answered`: the record was read from the destination itself. `stated_dead`: an operator stated that the destination is dead,
    which counts only while it does not answer.
    """
    if destination is Dst.RUNNING:
        return SourceEvent.CONFIRM_RUNNING
    if destination is Dst.GONE or (stated_dead and not answered):
        return SourceEvent.CONFIRM_GONE
    return None


def destination_yields(source: Src | None, *, answered: bool, stated_dead: bool) -> bool:
    """Return whether an armed copy may be given up, by the source's record. Arguments as of `source_obeys`, from the other side."""
    return source in NOTHING_FLOWS or (stated_dead and not answered)


def yields_unrecorded(guest: SourceEvent | None) -> bool:
    """Return whether an armed copy may be given up although its source answers that it has no record of the attempt (it ended long
    ago; only the last records stay). `guest`: the event by the source's hypervisor: the guest must be there, held by no job.
    """
    return guest is SourceEvent.SAW_UNTOUCHED
