"""agent.handshake.machines.machine and the two tables: what must hold for every row, whoever adds one."""

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.handshake.machines.destination import DESTINATION, DestinationEffect, DestinationEvent, DestinationState
from agent.handshake.machines.machine import Machine, Refused, Transition
from agent.handshake.machines.source import SOURCE, SourceEffect, SourceEvent, SourceState

_D, _S = DestinationState, SourceState
_DE, _SE = DestinationEvent, SourceEvent

MACHINES: dict[str, tuple[Machine[Any, Any, Any], Any, Any, Any]] = {
    "source": (SOURCE, SourceState, SourceEvent, SourceEffect),
    "destination": (DESTINATION, DestinationState, DestinationEvent, DestinationEffect),
}
ONCE = {SourceEffect.BEGIN, SourceEffect.PERFORM, DestinationEffect.PREPARE, DestinationEffect.FINISH}
"""Effects that must not be repeated: the result of the first is found out instead."""

both = pytest.mark.parametrize("role", MACHINES)


def rows(role: str) -> Iterator[tuple[Any, Any, Transition[Any, Any]]]:
    for (state, event), transition in MACHINES[role][0].table.items():
        yield state, event, transition


def reachable(role: str, start: Any) -> set[Any]:
    """Return the states reachable from a state, including itself."""
    seen, new = {start}, {start}
    while new:
        new = {t.state for state, _, t in rows(role) if state in new} - seen
        seen |= new
    return seen


@both
def test_every_state_event_and_effect_has_a_use(role: str) -> None:
    machine, states, events, effects = MACHINES[role]
    assert reachable(role, None) - {None} == set(states)
    assert {event for _, event, _ in rows(role)} == set(events)
    assert {effect for *_, t in rows(role) for effect in t.effects} == set(effects)
    assert machine.calls < set(events)


@both
def test_every_state_leads_to_an_end(role: str) -> None:
    machine, states, *_ = MACHINES[role]
    for state in states:
        assert reachable(role, state) & machine.final, state


@both
def test_an_end_is_an_end(role: str) -> None:
    """Except for the one row by which a host that was declared dead gives up a guest that its source kept."""
    machine, *_ = MACHINES[role]
    out = {(state, event) for state, event, t in rows(role) if state in machine.final and (t.state != state or t.effects)}
    assert out == ({(_D.RUNNING, _DE.DISOWNED)} if role == "destination" else set())


@both
def test_a_call_after_the_end_is_refused_or_changes_nothing(role: str) -> None:
    machine, *_ = MACHINES[role]
    for state in machine.final:
        for call in machine.calls:
            if call in machine.allowed(state):
                assert machine.step(state, call) == Transition(state)
            else:
                with pytest.raises(Refused):
                    machine.step(state, call)


@both
def test_a_call_that_joins_starts_nothing_a_second_time(role: str) -> None:
    machine, *_ = MACHINES[role]
    for state, event, transition in rows(role):
        if event in machine.calls and transition.state == state:
            assert not set(transition.effects) & ONCE, (state, event)


@both
def test_a_restart_finds_its_way_wherever_something_was_under_way(role: str) -> None:
    """After a restart no task carries out the effect: each state with an effect under way must handle RESTARTED."""
    machine, _, events, _ = MACHINES[role]
    under_way = {t.state for *_, t in rows(role) if t.effects} - machine.final
    told = {state for state, event, _ in rows(role) if event == events.RESTARTED}
    assert under_way <= told
    assert not told & machine.final
    for state in told:
        transition = machine.table[state, events.RESTARTED]
        assert not set(transition.effects) & ONCE
        if transition.state == state:
            assert transition.effects, f"{state} would wait for nothing"


@both
def test_a_restart_never_changes_what_may_have_been_told(role: str) -> None:
    """A source that sent everything, and an armed destination, go on only by what the hypervisor and the other host report."""
    machine, *_ = MACHINES[role]
    kept = {"source": (_S.PERFORMING, _S.PERFORMED, _S.LOST, _S.REMOVING, _S.RESUMING), "destination": (_D.RESERVED, _D.ARMED)}
    for state in kept[role]:
        transition = machine.table.get((state, MACHINES[role][2].RESTARTED))
        assert transition is None or transition.state == state


def test_the_source_removes_on_running_and_resumes_on_gone_only() -> None:
    for state, event, transition in rows("source"):
        if SourceEffect.REMOVE in transition.effects:
            assert event is _SE.CONFIRM_RUNNING or (state, event) == (_S.REMOVING, _SE.RESTARTED)
        if SourceEffect.RESUME in transition.effects:
            assert event is _SE.CONFIRM_GONE or (state, event) == (_S.RESUMING, _SE.RESTARTED)


def test_a_source_that_sent_everything_decides_nothing_by_itself() -> None:
    for at in (_S.PERFORMED, _S.LOST):
        moves = {(event, t.state) for state, event, t in rows("source") if state == at and t.state != at}
        assert moves == {(_SE.CONFIRM_RUNNING, _S.REMOVING), (_SE.CONFIRM_GONE, _S.RESUMING)}
    assert _S.KEPT not in reachable("source", _S.REMOVING)
    assert _S.REMOVED not in reachable("source", _S.RESUMING)


def test_an_armed_copy_is_ended_by_facts_and_by_the_source_only() -> None:
    moves = {event for state, event, t in rows("destination") if state == _D.ARMED and t.state != _D.ARMED}
    assert moves == {_DE.FINISH_DONE, _DE.FINISH_FAILED, _DE.SAW_RUNNING, _DE.SAW_ABSENT, _DE.ABANDON_SOURCE_KEPT}
    with pytest.raises(Refused):
        DESTINATION.step(_D.ARMED, _DE.ABANDON)
    assert DESTINATION.step(_D.ARMED, _DE.LEASE_EXPIRED) is None


def test_a_copy_is_started_from_prepared_only_and_runs_by_a_fact_only() -> None:
    finishes = [(state, event) for state, event, t in rows("destination") if DestinationEffect.FINISH in t.effects]
    assert finishes == [(_D.PREPARED, _DE.FINISH)]
    to_running = {event for state, event, t in rows("destination") if t.state == _D.RUNNING != state}
    assert to_running == {_DE.FINISH_DONE, _DE.SAW_RUNNING, _DE.ABANDON_REFUSED}


def test_what_was_given_up_before_it_was_known_takes_no_first_call() -> None:
    for machine, give_up, first in (
        (SOURCE, _SE.ABORT, _SE.BEGIN),
        (SOURCE, _SE.CONFIRM_GONE, _SE.BEGIN),
        (DESTINATION, _DE.ABANDON, _DE.RESERVE),
        (DESTINATION, _DE.ABANDON_SOURCE_KEPT, _DE.RESERVE),
    ):
        table: Machine[Any, Any, Any] = machine
        tombstone = table.step(None, give_up)
        assert tombstone is not None
        assert tombstone.state in table.final
        with pytest.raises(Refused) as refused:
            table.step(tombstone.state, first)
        assert (refused.value.state, refused.value.event) == (tombstone.state, first)


@both
def test_stale_news_is_ignored_and_a_call_out_of_turn_is_refused(role: str) -> None:
    machine, states, events, _ = MACHINES[role]
    for state in (None, *states):
        for event in events:
            if (state, event) in machine.table:
                assert machine.step(state, event) is machine.table[state, event]
            elif event in machine.calls:
                with pytest.raises(Refused):
                    machine.step(state, event)
                assert event not in machine.allowed(state)
            else:
                assert machine.step(state, event) is None


@given(st.lists(st.sampled_from(list(DestinationEvent)), max_size=40))
def test_gone_is_for_ever(events: list[DestinationEvent]) -> None:
    """Whatever event comes: a destination that is GONE never prepares, starts or keeps a copy of this attempt."""
    state: DestinationState | None = None
    was_gone = False
    for event in events:
        try:
            transition = DESTINATION.step(state, event)
        except Refused:
            continue
        if transition is not None:
            state = transition.state
            assert not (was_gone and (state is not _D.GONE or transition.effects))
            was_gone = was_gone or state is _D.GONE


@given(st.lists(st.sampled_from(list(SourceEvent)), max_size=40))
def test_nothing_leaves_a_source_that_kept_its_guest(events: list[SourceEvent]) -> None:
    state: SourceState | None = None
    for event in events:
        try:
            transition = SOURCE.step(state, event)
        except Refused:
            continue
        if transition is not None:
            assert state is not _S.KEPT or transition == Transition(_S.KEPT)
            assert state is not _S.REMOVED or transition == Transition(_S.REMOVED)
            state = transition.state
