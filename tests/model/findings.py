"""Flaws that the model found in the product, each with the smallest world that shows it and, where there is one, a correction.

`test_findings` expects the world to be broken, and to be good with the correction. Once the product is corrected, it says so:
then the world belongs among those of `worlds`, as it is.
"""

from dataclasses import dataclass, replace

from agent.handshake.decide import Call, decide
from agent.handshake.destination import DestinationState as Dst
from agent.handshake.machine import Transition
from agent.handshake.source import SourceEffect, SourceEvent, SourceState
from tests.model.invariants import GOES_BACK, LOST, STUCK, TWO_RUN
from tests.model.mutations import source_with
from tests.model.parts import budget
from tests.model.world import Decide, World

Src = SourceState

_LEFT = (Src.PERFORMED, Src.REMOVING, Src.REMOVED, Src.RESUMING)


def decide_and_look(src: Src | None, dst: Dst | None, *, cancel: bool, stalled: bool) -> frozenset[Call]:
    """Once the source has left PERFORMING there is nothing to abort there: what is missing is the destination's word."""
    if decide(src, dst, cancel=cancel, stalled=stalled) == {Call.ABORT} and src in _LEFT:
        return frozenset({Call.FINISH if dst is Dst.ARMED else Call.ABANDON})
    return decide(src, dst, cancel=cancel, stalled=stalled)


def decide_to_the_end(src: Src | None, dst: Dst | None, *, cancel: bool, stalled: bool) -> frozenset[Call]:
    """A source that is PERFORMED sends nothing more: a copy that still waits (for longer than the last bytes need) never starts.

    Stands for a call ABANDON_SOURCE_ENDED, which an armed destination takes like ABANDON_SOURCE_KEPT: it relies on a hypervisor
    that refuses to abandon a copy that has run (`Incoming.abandon`).
    """
    calls = decide_and_look(src, dst, cancel=cancel, stalled=stalled)
    return calls | {Call.ABANDON_SOURCE_KEPT} if (src, dst) == (Src.PERFORMED, Dst.ARMED) else calls


_silence_in_begin = source_with({(Src.BEGINNING, SourceEvent.DRIVER_SILENT): Transition(Src.KEPT, (SourceEffect.RELEASE,))})


@dataclass(frozen=True)
class Finding:
    world: World
    """Its `about` says what goes wrong."""
    finds: str
    corrected: World | None
    """None: what is missing is not in the tables, but in what can be known."""


def _finding(world: World, finds: str, **correction: object) -> Finding:
    corrected = replace(world, name=f"{world.name}_corrected", **correction) if correction else None  # type: ignore[arg-type]
    return Finding(world, finds, corrected)


def corrected(world: World) -> World:
    """The world with every correction at once."""
    return replace(
        world,
        name=f"{world.name}_corrected",
        source=_silence_in_begin,
        decide=Decide(decide_to_the_end),
        decide_takeover=Decide(decide_to_the_end),
        careless_abandon=False,
        abandon_awaits_finish=True,
    )


FINDINGS: tuple[Finding, ...] = (
    _finding(
        World(
            "paused_guest",
            "a guest that its user paused looks PERFORMED after a Perform that never connected: the armed copy waits for ever",
            budget=budget(fail=1, cancel=1),
            user_paused=True,
            takeover=False,
        ),
        STUCK,
        decide=Decide(decide_to_the_end),
        careless_abandon=False,
    ),
    _finding(
        World(
            "cancel_when_over",
            "a cancelled driver that sees the source REMOVED before it knows of RUNNING calls Abort for ever",
            budget=budget(cancel=1, expire=1),
            in_flight=1,
        ),
        STUCK,
        decide=Decide(decide_and_look),
        decide_takeover=Decide(decide_and_look),
    ),
    _finding(
        World(
            "silence_in_begin",
            "the driver's silence is not heard in BEGINNING, and its timer runs only once: BEGUN for ever",
            budget=budget(crash_driver=1),
            driver_returns=False,
            in_flight=2,
        ),
        STUCK,
        source=_silence_in_begin,
    ),
    _finding(
        World(
            "copy_ran_unseen",
            "the guest started, and its QEMU died before a restarted agent looked: SAW_ABSENT, GONE, and an old state of it resumes",
            budget=budget(qemu=1, crash_destination=1),
            copy_dies_early=True,
            takeover=False,
        ),
        GOES_BACK,
    ),
    _finding(
        World(
            "finish_lags",
            "Finish's call gets to the hypervisor so late that the next attempt has prepared its copy: armed, and not recorded",
            budget=budget(cancel=1, fail=1),
            takeover=False,
            attempts=2,
            finish_lags=True,
        ),
        "armed before it may start",
        abandon_awaits_finish=True,
    ),
    _finding(
        World(
            "careless_abandon",
            "not ours, but relied upon: an `Incoming.abandon` that destroys what has just started, where the source's QEMU died",
            budget=budget(qemu=1),
            takeover=False,
        ),
        LOST,
        careless_abandon=False,
    ),
    _finding(
        World(
            "torn_end",
            "not ours, but relied upon: a QEMU that lets the source run on although the destination has got everything",
            budget=budget(fail=1),
            takeover=False,
            torn_end=True,
        ),
        TWO_RUN,
    ),
)
