"""agent.handshake.machines.decide: the calls for every pair of records."""

import itertools
from typing import Any

import pytest

from agent.handshake.machines.decide import Call, assume, decide, ended
from agent.handshake.machines.destination import DESTINATION, DestinationEvent
from agent.handshake.machines.destination import DestinationState as Dst
from agent.handshake.machines.source import SOURCE, SourceEvent
from agent.handshake.machines.source import SourceState as Src

PAIRS = [pair for pair in itertools.product((None, *Src), (None, *Dst)) if pair != (Src.KEPT, Dst.RUNNING)]
ENDS = {(Src.REMOVED, Dst.RUNNING), (Src.KEPT, Dst.GONE)}
SOURCE_CALLS = {Call.BEGIN, Call.PERFORM, Call.ABORT, Call.CONFIRM_RUNNING, Call.CONFIRM_GONE}
FORWARD = {Call.RESERVE, Call.BEGIN, Call.PREPARE, Call.PERFORM}

LEFT = {Src.PERFORMED, Src.LOST, Src.REMOVING, Src.REMOVED, Src.RESUMING}
"""States in which nothing can be stopped at the source any more."""


def everything() -> list[tuple[Src | None, Dst | None, bool, bool, frozenset[Call]]]:
    return [
        (src, dst, cancel, stalled, decide(src, dst, cancel=cancel, stalled=stalled))
        for (src, dst), cancel, stalled in itertools.product(PAIRS, (False, True), (False, True))
    ]


@pytest.mark.parametrize("cancel", [False, True])
@pytest.mark.parametrize("stalled", [False, True])
def test_every_pair_has_ended_or_has_a_next_call(cancel: bool, stalled: bool) -> None:
    for src, dst in PAIRS:
        calls = decide(src, dst, cancel=cancel, stalled=stalled)
        assert bool(calls) != ended(src, dst), (src, dst)
    assert {pair for pair in PAIRS if ended(*pair)} == ENDS


def test_two_copies_stop_everything() -> None:
    for cancel in (False, True):
        with pytest.raises(AssertionError, match="kept at the source and runs at the destination"):
            decide(Src.KEPT, Dst.RUNNING, cancel=cancel)


def test_a_decision_is_brought_to_the_source_whatever_was_asked() -> None:
    for src, dst, _, _, calls in everything():
        if not ended(src, dst) and dst in (Dst.RUNNING, Dst.GONE):
            assert calls == {Call.CONFIRM_RUNNING if dst is Dst.RUNNING else Call.CONFIRM_GONE}
        else:
            assert not calls & {Call.CONFIRM_RUNNING, Call.CONFIRM_GONE}, "nobody has decided"


def test_cancel_begins_nothing() -> None:
    for _, _, cancel, _, calls in everything():
        assert not cancel or not calls & FORWARD


def test_cancel_goes_to_the_source_first() -> None:
    for src, dst, cancel, _, calls in everything():
        if cancel and src not in (*LEFT, Src.KEPT) and dst not in (Dst.RUNNING, Dst.GONE, Dst.ABANDONING):
            assert calls == {Call.ABORT}


def test_what_has_nothing_to_stop_is_not_asked_to_stop() -> None:
    """Such a call returns at once and changes nothing, so the driver would repeat it for ever."""
    for src, dst, _, _, calls in everything():
        if Call.ABORT in calls:
            transition = SOURCE.step(src, SourceEvent.ABORT)
            assert transition is not None
            assert transition.effects or transition.state is not src, (src, dst)


def test_an_armed_copy_is_given_up_only_for_a_source_from_which_nothing_flows() -> None:
    for src, dst, _, stalled, calls in everything():
        if dst is Dst.ARMED:
            assert Call.ABANDON not in calls
        if Call.ABANDON_SOURCE_KEPT in calls:
            assert src in (Src.KEPT, Src.LOST) or (stalled and (src, dst) == (Src.PERFORMED, Dst.ARMED))


def test_the_slot_comes_before_the_guest_is_touched() -> None:
    assert decide(None, None, cancel=False) == {Call.RESERVE}
    for src, dst, _, _, calls in everything():
        if Call.BEGIN in calls:
            assert dst is not None
        if Call.RESERVE in calls:
            assert src in (None, Src.BEGINNING, Src.BEGUN)
            assert dst is None


def test_memory_flows_only_to_a_copy_that_waits_for_it() -> None:
    for src, dst, _, _, calls in everything():
        if Call.PERFORM in calls:
            assert src is Src.PERFORMING or (src is Src.BEGUN and dst in (Dst.PREPARED, Dst.ARMED))


def test_finish_is_armed_while_the_memory_flows() -> None:
    assert decide(Src.PERFORMING, Dst.PREPARED, cancel=False) == {Call.FINISH, Call.PERFORM}
    assert decide(Src.PERFORMED, Dst.PREPARED, cancel=False) == {Call.FINISH}


@pytest.mark.parametrize("cancel", [False, True])
def test_a_destination_that_owes_its_word_is_asked(cancel: bool) -> None:
    """Once the source has sent everything, every call but the last goes to the destination."""
    for src in LEFT:
        for dst in (None, *Dst):
            if dst not in (Dst.RUNNING, Dst.GONE):
                assert not decide(src, dst, cancel=cancel) & SOURCE_CALLS, (src, dst)


def test_a_call_that_is_made_has_a_place_in_the_state_that_it_was_made_for() -> None:
    """For the pairs that a migration goes through; elsewhere a refusal makes the driver read the record again."""
    way = [
        (None, None),
        (None, Dst.RESERVED),
        (Src.BEGINNING, Dst.RESERVED),
        (Src.BEGUN, Dst.RESERVED),
        (Src.BEGUN, Dst.PREPARING),
        (Src.BEGUN, Dst.PREPARED),
        (Src.PERFORMING, Dst.PREPARED),
        (Src.PERFORMING, Dst.ARMED),
        (Src.PERFORMED, Dst.ARMED),
        (Src.LOST, Dst.ARMED),
        (Src.PERFORMING, Dst.RUNNING),
        (Src.PERFORMED, Dst.RUNNING),
        (Src.REMOVING, Dst.RUNNING),
        (Src.PERFORMING, Dst.GONE),
        (Src.PERFORMED, Dst.GONE),
        (Src.RESUMING, Dst.GONE),
        (Src.KEPT, Dst.ARMED),
        (Src.KEPT, Dst.PREPARED),
        (Src.KEPT, Dst.RESERVED),
        (Src.KEPT, None),
        (Src.KEPT, Dst.ABANDONING),
    ]
    for src, dst in way:
        for call in decide(src, dst, cancel=False) | decide(src, dst, cancel=True):
            if call in SOURCE_CALLS:
                assert SourceEvent(call) in SOURCE.allowed(src), (src, dst, call)
            else:
                assert DestinationEvent(call) in DESTINATION.allowed(dst), (src, dst, call)


@pytest.mark.parametrize(
    ("src", "dst", "dead", "acted_on"),
    [
        (Src.PERFORMED, Dst.ARMED, "destination", (Src.PERFORMED, Dst.GONE)),
        (Src.PERFORMED, Dst.RUNNING, "destination", (Src.PERFORMED, Dst.RUNNING)),
        (Src.REMOVING, Dst.ARMED, "destination", (Src.REMOVING, Dst.RUNNING)),
        (Src.REMOVED, None, "destination", (Src.REMOVED, Dst.RUNNING)),
        (Src.PERFORMING, Dst.ARMED, "source", (Src.KEPT, Dst.ARMED)),
        (None, Dst.RUNNING, "source", (Src.REMOVED, Dst.RUNNING)),
    ],
)
def test_a_word_stands_for_a_host_but_never_against_a_known_commit(
    src: Src | None, dst: Dst | None, dead: str, acted_on: tuple[Src, Dst]
) -> None:
    assert assume(src, dst, source_dead=dead == "source", destination_dead=dead == "destination") == acted_on


def test_a_destination_that_is_back_is_given_time_to_learn_that_an_operators_word_took_the_guest() -> None:
    for cancel in (True, False):
        assert decide(Src.KEPT, Dst.RUNNING, cancel=cancel, by_statement=True) == frozenset()
        assert decide(Src.RESUMING, Dst.RUNNING, cancel=cancel, by_statement=True) == {Call.CONFIRM_GONE}
        assert decide(Src.PERFORMED, Dst.RUNNING, cancel=cancel, by_statement=True) == {Call.CONFIRM_RUNNING}
    assert not ended(Src.KEPT, Dst.RUNNING)


@pytest.mark.parametrize(
    ("src", "dst", "overtaken", "acted_on"),
    [
        (None, Dst.GONE, {"source"}, (Src.KEPT, Dst.GONE)),
        (None, Dst.RESERVED, {"source"}, (Src.KEPT, Dst.RESERVED)),
        (None, Dst.RUNNING, {"source"}, (Src.REMOVED, Dst.RUNNING)),  # it removed its copy, and its record is gone since
        (Src.PERFORMED, Dst.ARMED, {"source"}, (Src.PERFORMED, Dst.ARMED)),
        (Src.BEGUN, None, {"destination"}, (Src.BEGUN, Dst.GONE)),
        (Src.REMOVED, None, {"destination"}, (Src.REMOVED, Dst.RUNNING)),
        (None, None, {"source", "destination"}, (Src.KEPT, Dst.GONE)),
    ],
)
def test_7_a_side_that_a_later_attempt_has_overtaken(src: Any, dst: Any, overtaken: set[str], acted_on: Any) -> None:
    assert assume(src, dst, source_dead=False, destination_dead=False, overtaken=overtaken) == acted_on
