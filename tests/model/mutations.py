"""Flaws put in on purpose. A model that does not find them proves nothing about the tables without them.

Nothing is patched: each mutation is a world with another table, another `decide`, or a flag.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from agent.handshake.decide import Call, decide
from agent.handshake.destination import DESTINATION, DestinationEffect, DestinationEvent, DestinationState
from agent.handshake.destination_side import destination_fact
from agent.handshake.machine import Transition
from agent.handshake.source import SOURCE, SourceEffect, SourceEvent, SourceState
from agent.handshake.source_side import source_fact
from agent.hypervisor.base import Job
from tests.model.invariants import LOST, STUCK, TWO_RUN
from tests.model.parts import budget
from tests.model.world import Decide, DestinationMachine, SourceMachine, World

_S, _SE, _SF = SourceState, SourceEvent, SourceEffect
_D, _DE, _DF = DestinationState, DestinationEvent, DestinationEffect

SourceRows = Mapping[tuple[SourceState | None, SourceEvent], Transition[SourceState, SourceEffect] | None]
DestinationRows = Mapping[tuple[DestinationState | None, DestinationEvent], Transition[DestinationState, DestinationEffect] | None]


def source_with(rows: SourceRows) -> SourceMachine:
    """The source's table with other rows; None takes a row out."""
    table = {key: row for key, row in {**SOURCE.table, **rows}.items() if row is not None}
    return replace(SOURCE, table=table)


def destination_with(rows: DestinationRows) -> DestinationMachine:
    table = {key: row for key, row in {**DESTINATION.table, **rows}.items() if row is not None}
    return replace(DESTINATION, table=table)


def _src(state: SourceState, *effects: SourceEffect) -> Transition[SourceState, SourceEffect]:
    return Transition(state, effects)


def _dst(state: DestinationState, *effects: DestinationEffect) -> Transition[DestinationState, DestinationEffect]:
    return Transition(state, effects)


def _resumes_unasked(src: SourceState | None, dst: DestinationState | None, *, cancel: bool, stalled: bool) -> frozenset[Call]:
    """Takes the destination's silence for its absence."""
    return frozenset({Call.CONFIRM_GONE}) if src is _S.PERFORMED else decide(src, dst, cancel=cancel, stalled=stalled)


def _removes_unasked(src: SourceState | None, dst: DestinationState | None, *, cancel: bool, stalled: bool) -> frozenset[Call]:
    """Takes an armed destination for one that runs."""
    return frozenset({Call.CONFIRM_RUNNING}) if (src, dst) == (_S.PERFORMED, _D.ARMED) else decide(src, dst, cancel=cancel, stalled=stalled)


def _cancels_the_destination_first(src: SourceState | None, dst: DestinationState | None, *, cancel: bool, stalled: bool) -> frozenset[Call]:
    calls = decide(src, dst, cancel=cancel, stalled=stalled)
    return frozenset({Call.ABANDON_SOURCE_KEPT}) if Call.ABORT in calls else calls


@dataclass(frozen=True)
class Mutation:
    world: World
    finds: str
    """The rule that is broken first, when all are checked."""
    harm: str | None
    """What a user would suffer, found when only disasters are looked for. None: the other rules hold the disaster off."""


_CRASHES = budget(crash_source=1, crash_destination=1, expire=1)
_QUIET = World("", takeover=False, in_flight=3, careless_abandon=True, stalls=False)
"""The rule must not need a careful hypervisor where every QEMU and every link lives."""


def _world(name: str, about: str, base: World = _QUIET, **fields: object) -> World:
    return replace(base, name=name, about=about, **fields)  # type: ignore[arg-type]


_RESUME_NOW = _src(_S.RESUMING, _SF.RESUME)
_ABANDON_NOW = _dst(_D.ABANDONING, _DF.ABANDON)

MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        _world("resume_on_silence", "the source resumes when its driver is silent", budget=budget(expire=1),
               source=source_with({(_S.PERFORMED, _SE.DRIVER_SILENT): _RESUME_NOW})),
        "the source resumes only on GONE", TWO_RUN,
    ),
    Mutation(
        _world("resume_on_restart", "the source resumes when its agent was restarted", budget=budget(crash_source=1),
               source=source_with({(_S.PERFORMED, _SE.RESTARTED): _RESUME_NOW})),
        "the source resumes only on GONE", TWO_RUN,
    ),
    Mutation(
        _world("finish_before_journal", "Finish is called before ARMED is durable", budget=_CRASHES, effect_first=frozenset({_DE.FINISH})),
        "armed before it may start", LOST,
    ),
    Mutation(
        _world("abandon_answers_early", "Abandon answers GONE before that is durable", budget=budget(cancel=1),
               answer_first=frozenset({_DE.ABANDON})),
        "only a durable decision is told", TWO_RUN,
    ),
    Mutation(
        _world("takeover_resumes", "the driver that takes over resumes without the destination's word", takeover=True,
               budget=budget(crash_driver=1), decide_takeover=Decide(_resumes_unasked)),
        "the source resumes only on GONE", TWO_RUN,
    ),
    Mutation(
        _world("takeover_removes", "the driver that takes over removes without the destination's word", takeover=True,
               budget=budget(crash_driver=1, fail=1), decide_takeover=Decide(_removes_unasked)),
        "the source is removed only on RUNNING", LOST,
    ),
    Mutation(
        _world("stale_attempt_taken", "a call of an attempt that is over is taken by the next one", attempts=2, fence=False,
               budget=budget(repeat=1, cancel=1)),
        "a stale attempt is refused", LOST,
    ),
    Mutation(
        _world("cancel_resumes", "a cancel that came too late resumes the source", budget=budget(cancel=1),
               source=source_with({(_S.PERFORMED, _SE.ABORT): _RESUME_NOW})),
        "the source resumes only on GONE", TWO_RUN,
    ),
    Mutation(
        _world("cancel_resumes_removing", "a cancel resumes a source that is being removed",
               budget=budget(cancel=1), source=source_with({(_S.REMOVING, _SE.ABORT): _RESUME_NOW})),
        "the source resumes only on GONE", TWO_RUN,
    ),
    Mutation(
        _world("cancel_at_destination", "cancel goes to the destination first, as if the source had kept the guest",
               budget=budget(cancel=1), decide=Decide(_cancels_the_destination_first)),
        LOST, LOST,
    ),
    Mutation(
        _world("abandon_armed", "an armed copy is given up on request", budget=budget(cancel=1),
               destination=destination_with({(_D.ARMED, _DE.ABANDON): _ABANDON_NOW})),
        LOST, LOST,
    ),
    Mutation(
        _world("lease_ends_armed", "the end of the lease gives up an armed copy", budget=budget(expire=1),
               destination=destination_with({(_D.ARMED, _DE.LEASE_EXPIRED): _ABANDON_NOW})),
        LOST, LOST,
    ),
    Mutation(
        _world("restart_gives_up_armed", "a destination that was restarted gives up an armed copy", budget=budget(crash_destination=1),
               destination=destination_with({(_D.ARMED, _DE.RESTARTED): _ABANDON_NOW})),
        LOST, LOST,
    ),
    Mutation(
        _world("unknown_finish_is_gone", "Finish without an answer is taken for GONE", budget=budget(fail=1),
               destination=destination_with({(_D.ARMED, _DE.FINISH_UNKNOWN): _dst(_D.GONE)})),
        "GONE: no copy, and none ever", TWO_RUN,
    ),
    Mutation(
        _world("abandon_refused_is_gone", "a copy that has run is called GONE all the same", careless_abandon=False,
               budget=budget(fail=1),
               destination=destination_with({(_D.ABANDONING, _DE.ABANDON_REFUSED): _dst(_D.GONE),
                                             (_D.ARMED, _DE.FINISH_UNKNOWN): _ABANDON_NOW})),
        "GONE: no copy, and none ever", TWO_RUN,
    ),
    Mutation(
        _world("restart_keeps_performing", "a source that was restarted in Perform believes that it kept the guest",
               budget=budget(crash_source=1), source=source_with({(_S.PERFORMING, _SE.RESTARTED): _src(_S.KEPT, _SF.RELEASE)})),
        "KEPT: it runs at the source", LOST,
    ),
    Mutation(
        _world("failed_perform_kept_unseen", "a Perform that gave no answer is taken for one that failed", budget=budget(fail=1),
               source=source_with({(_S.PERFORMING, _SE.PERFORM_FAILED): _src(_S.KEPT, _SF.RELEASE)})),
        "KEPT: it runs at the source", LOST,
    ),
    Mutation(
        _world("paused_is_untouched", "a guest that the migration paused is taken for one that never left", budget=budget(crash_source=1),
               source_fact=lambda domain: _SE.SAW_UNTOUCHED if domain and domain.job is Job.NONE else source_fact(domain)),
        "KEPT: it runs at the source", LOST,
    ),
    Mutation(
        _world("incoming_is_absent", "a copy that waits for its memory is taken for none", budget=budget(crash_destination=1),
               destination_fact=lambda domain: _DE.SAW_ABSENT if domain and domain.incoming else destination_fact(domain)),
        "GONE: no copy, and none ever", TWO_RUN,
    ),
    Mutation(
        _world("no_tombstone", "a source that was cancelled before it was asked remembers nothing", budget=budget(cancel=1),
               source=source_with({(None, _SE.ABORT): None})),
        STUCK, None,
    ),
    Mutation(
        _world("abandoning_not_resumed", "a restart forgets the copy that was being destroyed", budget=budget(crash_destination=1, fail=1),
               destination=destination_with({(_D.ABANDONING, _DE.RESTARTED): None})),
        STUCK, None,
    ),
    Mutation(
        _world("nobody_takes_over", "no take-over, and the driver never comes back", driver_returns=False, budget=budget(crash_driver=1)),
        STUCK, None,
    ),
)  # fmt: skip

