"""Parts of deliberate flaws: how a mutation is made, rows of a machine that are wrong, and drivers that decide wrongly."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from agent.handshake.machines.decide import Call, decide
from agent.handshake.machines.destination import DESTINATION, DestinationEffect, DestinationEvent, DestinationState
from agent.handshake.machines.machine import Transition
from agent.handshake.machines.source import SOURCE, SourceEffect, SourceEvent, SourceState
from tests.model.world import World

_S, _SE, _SF = SourceState, SourceEvent, SourceEffect
_D, _DE, _DF = DestinationState, DestinationEvent, DestinationEffect


@dataclass(frozen=True)
class Mutation:
    world: World
    finds: str
    """The rule that is broken first if all are checked."""
    harm: str | None
    """The harm to the user, found if only the rules of `HARM` are checked. None: the other rules prevent harm."""


def mutation(name: str, about: str, finds: str, harm: str | None, **fields: object) -> Mutation:
    """Return a mutation in a world with a careless hypervisor: no rule may need a careful one while every QEMU and link works."""
    quiet = {"takeover": False, "careless_abandon": True, "stalls": False}
    return Mutation(World(name, about, **{**quiet, **fields}), finds, harm)  # type: ignore[arg-type]


def source(
    rows: Mapping[tuple[SourceState | None, SourceEvent], Transition[SourceState, SourceEffect] | None],
) -> dict[str, object]:
    """Return the source's table with other rows; None removes a row."""
    table = {key: row for key, row in {**SOURCE.table, **rows}.items() if row is not None}
    return {"source": replace(SOURCE, table=table)}


def destination(
    rows: Mapping[tuple[DestinationState | None, DestinationEvent], Transition[DestinationState, DestinationEffect] | None],
) -> dict[str, object]:
    table = {key: row for key, row in {**DESTINATION.table, **rows}.items() if row is not None}
    return {"destination": replace(DESTINATION, table=table)}


RESUME_NOW = Transition(_S.RESUMING, (_SF.RESUME,))
KEEP_NOW = Transition(_S.KEPT, (_SF.RELEASE,))
ABANDON_NOW = Transition(_D.ABANDONING, (_DF.ABANDON,))


def resumes_unasked(src: SourceState | None, dst: DestinationState | None, **told: bool) -> frozenset[Call]:
    """Take the destination's silence for GONE."""
    return frozenset({Call.CONFIRM_GONE}) if src is _S.PERFORMED else decide(src, dst, **told)


def removes_unasked(src: SourceState | None, dst: DestinationState | None, **told: bool) -> frozenset[Call]:
    """Take an armed destination for a running one."""
    return frozenset({Call.CONFIRM_RUNNING}) if (src, dst) == (_S.PERFORMED, _D.ARMED) else decide(src, dst, **told)


def cancels_the_destination_first(src: SourceState | None, dst: DestinationState | None, **told: bool) -> frozenset[Call]:
    calls = decide(src, dst, **told)
    return frozenset({Call.ABANDON_SOURCE_KEPT}) if Call.ABORT in calls else calls


def never_cancels(src: SourceState | None, dst: DestinationState | None, **told: bool) -> frozenset[Call]:
    return decide(src, dst, cancel=False, stalled=told["stalled"])


def cancels_for_ever(src: SourceState | None, dst: DestinationState | None, **told: bool) -> frozenset[Call]:
    """Call Abort although nothing is left to abort."""
    calls = decide(src, dst, **told)
    return frozenset({Call.ABORT}) if told["cancel"] and calls <= {Call.FINISH, Call.ABANDON} else calls


def waits_for_ever(src: SourceState | None, dst: DestinationState | None, **told: bool) -> frozenset[Call]:
    """Ignore that the last bytes were lost."""
    return decide(src, dst, cancel=told["cancel"])


def believes_whoever_is_back(src: SourceState | None, dst: DestinationState | None, **told: bool) -> frozenset[Call]:
    """Knows of no operator's word in the source's record."""
    return decide(src, dst, cancel=told["cancel"], stalled=told["stalled"])
