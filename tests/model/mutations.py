"""Deliberate flaws. A model that does not find them proves nothing about the tables without them.

Nothing is patched: each mutation is a world with another table, another `decide`, or a flag.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from agent.handshake.machines.decide import Call, decide
from agent.handshake.machines.destination import DESTINATION, DestinationEffect, DestinationEvent, DestinationState
from agent.handshake.machines.facts import destination_fact, source_fact
from agent.handshake.machines.machine import Transition
from agent.handshake.machines.source import SOURCE, SourceEffect, SourceEvent, SourceState
from agent.hypervisor.base import Job
from tests.model.agents import FENCE, PATH
from tests.model.invariants import (
    CANCEL,
    FORGOTTEN,
    GOES_BACK,
    GONE_IS_GONE,
    KEPT_IS_KEPT,
    LOST,
    RECORDED,
    REMOVED_ON_RUNNING,
    RESUMED_ON_GONE,
    STUCK,
    TOLD,
    TWO_RUN,
)
from tests.model.network import DECIDE
from tests.model.parts import Side, budget
from tests.model.world import BESIDE, CHECKED, World
from tests.model.worlds import BUT_ONLY_COPY

_S, _SE, _SF = SourceState, SourceEvent, SourceEffect
_D, _DE, _DF = DestinationState, DestinationEvent, DestinationEffect


@dataclass(frozen=True)
class Mutation:
    world: World
    finds: str
    """The rule that is broken first if all are checked."""
    harm: str | None
    """The harm to the user, found if only the rules of `HARM` are checked. None: the other rules prevent harm."""


def _mutation(name: str, about: str, finds: str, harm: str | None, **fields: object) -> Mutation:
    """Return a mutation in a world with a careless hypervisor: no rule may need a careful one while every QEMU and link works."""
    quiet = {"takeover": False, "careless_abandon": True, "stalls": False}
    return Mutation(World(name, about, **{**quiet, **fields}), finds, harm)  # type: ignore[arg-type]


def _source(
    rows: Mapping[tuple[SourceState | None, SourceEvent], Transition[SourceState, SourceEffect] | None],
) -> dict[str, object]:
    """Return the source's table with other rows; None removes a row."""
    table = {key: row for key, row in {**SOURCE.table, **rows}.items() if row is not None}
    return {"source": replace(SOURCE, table=table)}


def _destination(
    rows: Mapping[tuple[DestinationState | None, DestinationEvent], Transition[DestinationState, DestinationEffect] | None],
) -> dict[str, object]:
    table = {key: row for key, row in {**DESTINATION.table, **rows}.items() if row is not None}
    return {"destination": replace(DESTINATION, table=table)}


_RESUME_NOW = Transition(_S.RESUMING, (_SF.RESUME,))
_KEEP_NOW = Transition(_S.KEPT, (_SF.RELEASE,))
_ABANDON_NOW = Transition(_D.ABANDONING, (_DF.ABANDON,))


def _resumes_unasked(src: SourceState | None, dst: DestinationState | None, **told: bool) -> frozenset[Call]:
    """Take the destination's silence for GONE."""
    return frozenset({Call.CONFIRM_GONE}) if src is _S.PERFORMED else decide(src, dst, **told)


def _removes_unasked(src: SourceState | None, dst: DestinationState | None, **told: bool) -> frozenset[Call]:
    """Take an armed destination for a running one."""
    return frozenset({Call.CONFIRM_RUNNING}) if (src, dst) == (_S.PERFORMED, _D.ARMED) else decide(src, dst, **told)


def _cancels_the_destination_first(src: SourceState | None, dst: DestinationState | None, **told: bool) -> frozenset[Call]:
    calls = decide(src, dst, **told)
    return frozenset({Call.ABANDON_SOURCE_KEPT}) if Call.ABORT in calls else calls


def _never_cancels(src: SourceState | None, dst: DestinationState | None, **told: bool) -> frozenset[Call]:
    return decide(src, dst, cancel=False, stalled=told["stalled"])


def _cancels_for_ever(src: SourceState | None, dst: DestinationState | None, **told: bool) -> frozenset[Call]:
    """Call Abort although nothing is left to abort."""
    calls = decide(src, dst, **told)
    return frozenset({Call.ABORT}) if told["cancel"] and calls <= {Call.FINISH, Call.ABANDON} else calls


def _waits_for_ever(src: SourceState | None, dst: DestinationState | None, **told: bool) -> frozenset[Call]:
    """Ignore that the last bytes were lost."""
    return decide(src, dst, cancel=told["cancel"])


def _believes_whoever_is_back(src: SourceState | None, dst: DestinationState | None, **told: bool) -> frozenset[Call]:
    """Knows of no operator's word in the source's record."""
    return decide(src, dst, cancel=told["cancel"], stalled=told["stalled"])


MUTATIONS: tuple[Mutation, ...] = (
    _mutation(
        "resume_on_silence",
        "the source resumes, without asking, when its driver is silent",
        RESUMED_ON_GONE,
        TWO_RUN,
        budget=budget(expire=1),
        **_source({(_S.PERFORMED, _SE.DRIVER_SILENT): _RESUME_NOW}),
    ),
    _mutation(
        "resume_on_restart",
        "the source resumes, without asking, when its agent was restarted",
        RESUMED_ON_GONE,
        TWO_RUN,
        budget=budget(crash_source=1),
        **_source({(_S.PERFORMED, _SE.RESTARTED): _RESUME_NOW}),
    ),
    _mutation(
        "finish_before_journal",
        "Finish is called before ARMED is durable",
        RECORDED,
        LOST,
        budget=budget(crash_source=1, crash_destination=1, expire=1),
        effect_first=frozenset({_DE.FINISH}),
    ),
    _mutation(
        "finish_beside_its_record",
        "the record of Finish is written while Finish is under way, and lost",
        RECORDED,
        LOST,
        budget=budget(crash_destination=1),
        beside=frozenset({_DE.FINISH}),
    ),
    _mutation(
        "perform_beside_its_record",
        "the record of Perform is written while the memory flows, and lost",
        KEPT_IS_KEPT,
        LOST,
        budget=budget(crash_source=1),
        beside=frozenset({_SE.PERFORM}),
    ),
    _mutation(
        "confirm_beside_its_record",
        "the record that an operator's word resumes the guest is written while it resumes, and lost",
        GOES_BACK,
        GOES_BACK,
        in_flight=1,
        careless_abandon=False,
        budget=budget(host=1, statement=1, crash_source=1),
        beside=frozenset({_SE.CONFIRM_GONE}),
        checks=BUT_ONLY_COPY,
    ),
    _mutation(
        "not_undone",
        "libvirt keeps what the call of an agent that has died did, and no record tells of it",
        STUCK,
        None,
        budget=budget(crash_destination=1, expire=1),
        beside=BESIDE,
        undone=False,
    ),
    _mutation(
        "abandon_answers_early",
        "Abandon answers GONE before that is durable",
        TOLD,
        TWO_RUN,
        reads=frozenset(),
        budget=budget(cancel=1),
        answer_first=frozenset({_DE.ABANDON}),
    ),
    _mutation(
        "takeover_resumes",
        "the driver that takes over resumes without the destination's record",
        RESUMED_ON_GONE,
        TWO_RUN,
        takeover=True,
        reads=frozenset(),
        budget=budget(crash_driver=1),
        decide_takeover=_resumes_unasked,
    ),
    _mutation(
        "takeover_removes",
        "the driver that takes over removes without the destination's record",
        REMOVED_ON_RUNNING,
        LOST,
        takeover=True,
        reads=frozenset(),
        budget=budget(crash_driver=1, fail=1),
        decide_takeover=_removes_unasked,
    ),
    _mutation(
        "statement_forgotten",
        "a driver believes a destination that is back, though an operator's word keeps the guest at the source",
        DECIDE,
        None,
        in_flight=1,
        durable_driver=False,
        budget=budget(host=1, statement=1, crash_driver=1),
        decide=_believes_whoever_is_back,
    ),
    _mutation(
        "believes_the_callers_gone",
        "a source believes GONE from a driver whose destination is another host",
        RESUMED_ON_GONE,
        TWO_RUN,
        in_flight=2,
        foreign_driver=True,
        checks_peer=False,
        reads=frozenset(),
        budget=budget(cancel=1),
    ),
    _mutation(
        "believes_a_claim",
        "a source believes any caller's decision",
        RESUMED_ON_GONE,
        LOST,
        in_flight=2,
        reads=frozenset({Side.DESTINATION}),
        budget=budget(by_hand=1),
    ),
    _mutation(
        "claim_applied_unseen",
        "a claim of GONE that needed no reading when it came is applied after Perform without reading",
        RESUMED_ON_GONE,
        TWO_RUN,
        in_flight=2,
        turns=True,
        looks_again=CHECKED - {_SE.CONFIRM_GONE},
        budget=budget(by_hand=1),
    ),
    _mutation(
        "removal_applied_unseen",
        "a claim of RUNNING that came before it was allowed is applied after Perform without reading",
        REMOVED_ON_RUNNING,
        LOST,
        in_flight=2,
        turns=True,
        looks_again=CHECKED - {_SE.CONFIRM_RUNNING},
        budget=budget(by_hand=1),
    ),
    _mutation(
        "abandon_applied_unseen",
        "a claim that the source kept the guest, which came before the copy was armed, is applied to the armed copy without reading",
        LOST,
        LOST,
        in_flight=2,
        turns=True,
        looks_again=CHECKED - {_DE.ABANDON_SOURCE_KEPT},
        budget=budget(by_hand=1),
    ),
    _mutation(
        "uri_applied_unseen",
        "a Perform that came during Begin is applied after it, without a check of its URI",
        PATH,
        None,
        in_flight=2,
        turns=True,
        looks_again=CHECKED - {_SE.PERFORM},
        budget=budget(by_hand=1),
    ),
    _mutation(
        "believes_kept",
        "a destination believes any caller that the source kept the guest",
        LOST,
        LOST,
        in_flight=2,
        reads=frozenset({Side.SOURCE}),
        budget=budget(by_hand=1),
    ),
    _mutation(
        "believes_a_word_about_the_living",
        "an operator's statement counts although the destination answers",
        TWO_RUN,
        TWO_RUN,
        in_flight=2,
        reads=frozenset({Side.DESTINATION}),
        wrong_statement=True,
        budget=budget(statement=1),
    ),
    _mutation(
        "goes_on_towards_a_third_host",
        "a driver is not told that the record is of another destination, and never ends",
        STUCK,
        None,
        in_flight=2,
        foreign_driver=True,
        checks_peer=False,
    ),
    _mutation(
        "cancel_forgotten",
        "a driver that has acknowledged a cancel forgets it when it dies",
        FORGOTTEN,
        None,
        in_flight=1,
        durable_driver=False,
        budget=budget(cancel=1, crash_driver=1),
    ),
    _mutation(
        "stale_attempt_taken",
        "a call of an earlier attempt is taken by the next one",
        FENCE,
        LOST,
        attempts=2,
        fence=False,
        budget=budget(repeat=1, cancel=1),
    ),
    _mutation(
        "cancel_resumes",
        "a cancel that came too late resumes the source",
        RESUMED_ON_GONE,
        TWO_RUN,
        budget=budget(cancel=1),
        **_source({(_S.PERFORMED, _SE.ABORT): _RESUME_NOW}),
    ),
    _mutation(
        "cancel_resumes_after_running",
        "a cancel after RUNNING resumes a source that is being removed",
        RESUMED_ON_GONE,
        TWO_RUN,
        budget=budget(cancel=1),
        **_source({(_S.REMOVING, _SE.ABORT): _RESUME_NOW}),
    ),
    _mutation(
        "cancel_at_destination",
        "cancel goes to the destination first, as if the source had kept the guest",
        LOST,
        LOST,
        budget=budget(cancel=1),
        decide=_cancels_the_destination_first,
    ),
    _mutation(
        "cancel_ignored",
        "a driver goes on although it was cancelled",
        CANCEL,
        None,
        budget=budget(cancel=1),
        decide=_never_cancels,
    ),
    _mutation(
        "cancel_for_ever",
        "a cancelled driver goes on to call Abort where nothing is left to abort",
        STUCK,
        None,
        budget=budget(cancel=1),
        decide=_cancels_for_ever,
    ),
    _mutation(
        "abandon_armed",
        "an armed copy is given up on request",
        LOST,
        LOST,
        budget=budget(cancel=1),
        **_destination({(_D.ARMED, _DE.ABANDON): _ABANDON_NOW}),
    ),
    _mutation(
        "lease_ends_armed",
        "the end of the lease gives up an armed copy",
        LOST,
        LOST,
        budget=budget(expire=1),
        **_destination({(_D.ARMED, _DE.LEASE_EXPIRED): _ABANDON_NOW}),
    ),
    _mutation(
        "restart_gives_up_armed",
        "a destination that was restarted gives up an armed copy",
        LOST,
        LOST,
        budget=budget(crash_destination=1),
        **_destination({(_D.ARMED, _DE.RESTARTED): _ABANDON_NOW}),
    ),
    _mutation(
        "unknown_finish_is_gone",
        "Finish without an answer is taken for GONE",
        GONE_IS_GONE,
        TWO_RUN,
        budget=budget(fail=1),
        **_destination({(_D.ARMED, _DE.FINISH_UNKNOWN): Transition(_D.GONE)}),
    ),
    _mutation(
        "abandon_refused_is_gone",
        "a copy that has run is recorded as GONE",
        GONE_IS_GONE,
        TWO_RUN,
        careless_abandon=False,
        budget=budget(fail=1),
        **_destination(
            {
                (_D.ABANDONING, _DE.ABANDON_REFUSED): Transition(_D.GONE),
                (_D.ARMED, _DE.FINISH_UNKNOWN): _ABANDON_NOW,
            }
        ),
    ),
    _mutation(
        "abandon_does_not_wait",
        "GONE while a call of Finish is still on its way to the hypervisor, and the next attempt begins",
        RECORDED,
        None,
        attempts=2,
        in_flight=1,
        budget=budget(cancel=1, fail=1),
        abandon_awaits_finish=False,
    ),
    _mutation(
        "restart_keeps_performing",
        "a source that was restarted in Perform believes that it kept the guest",
        KEPT_IS_KEPT,
        LOST,
        budget=budget(crash_source=1),
        **_source({(_S.PERFORMING, _SE.RESTARTED): _KEEP_NOW}),
    ),
    _mutation(
        "failed_perform_kept_unseen",
        "a Perform that gave no answer is taken for one that failed",
        KEPT_IS_KEPT,
        LOST,
        budget=budget(fail=1),
        **_source({(_S.PERFORMING, _SE.PERFORM_FAILED): _KEEP_NOW}),
    ),
    _mutation(
        "paused_is_untouched",
        "a guest that the migration paused is taken for one that never left",
        KEPT_IS_KEPT,
        LOST,
        budget=budget(crash_source=1),
        source_fact=lambda domain: _SE.SAW_UNTOUCHED if domain and domain.job is Job.NONE else source_fact(domain),
    ),
    _mutation(
        "incoming_is_absent",
        "a copy that waits for its memory is taken for none",
        LOST,
        LOST,
        budget=budget(crash_destination=1),
        destination_fact=lambda domain: _DE.SAW_ABSENT if domain and domain.incoming else destination_fact(domain),
    ),
    _mutation(
        "no_tombstone",
        "a source that was cancelled before Begin keeps no record of it",
        STUCK,
        None,
        budget=budget(cancel=1),
        **_source({(None, _SE.ABORT): None}),
    ),
    _mutation(
        "abandoning_not_resumed",
        "a restart forgets the copy that was being destroyed",
        STUCK,
        None,
        budget=budget(crash_destination=1, fail=1),
        **_destination({(_D.ABANDONING, _DE.RESTARTED): None}),
    ),
    _mutation(
        "stall_ignored",
        "a driver waits for ever for a copy whose last bytes were lost",
        STUCK,
        None,
        stalls=True,
        break_noticed=False,
        budget=budget(fail=1),
        decide=_waits_for_ever,
    ),
    _mutation(
        "armed_asks_nobody",
        "an armed destination whose driver is silent does not ask the source, which kept the guest",
        STUCK,
        None,
        takeover=True,
        in_flight=2,
        break_noticed=False,
        driver_returns=False,
        budget=budget(crash_driver=1, fail=1),
        destination_asks=False,
    ),
    _mutation(
        "unrecorded_asks_nobody",
        "an armed destination waits for ever for a source that keeps no record of the attempt any more",
        STUCK,
        None,
        takeover=True,
        stalls=True,
        careless_abandon=False,
        in_flight=1,
        break_noticed=False,
        driver_returns=False,
        budget=budget(crash_driver=1, fail=1, forget=1),
        asks_for_guest=False,
    ),
    _mutation(
        "silence_in_begin",
        "the driver's silence has no effect in BEGINNING, and its timer runs only once",
        STUCK,
        None,
        takeover=True,
        in_flight=2,
        driver_returns=False,
        budget=budget(crash_driver=1),
        **_source({(_S.BEGINNING, _SE.DRIVER_SILENT): None}),
    ),
    _mutation(
        "nobody_takes_over",
        "no take-over, and the driver never comes back",
        STUCK,
        None,
        driver_returns=False,
        budget=budget(crash_driver=1),
    ),
)
