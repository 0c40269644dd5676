"""agent.transfer.model: properties of the arithmetic for every guest and every link."""

from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from agent.transfer.model import (
    LEAST_STOP,
    Limits,
    Load,
    Phase,
    Transfer,
    advance,
    converges,
    due,
    progress,
    resume,
    start,
    switch,
)

MIB = 1 << 20
ENOUGH = 200
"""Number of passes after which a transfer has converged, or never will."""

rates = st.floats(1 * MIB, 10_000 * MIB)
limits = st.builds(Limits, max_downtime=st.floats(0, 5))


@st.composite
def loads(draw: st.DrawFn) -> Load:
    memory = draw(st.integers(1 * MIB, 1 << 40))
    return Load(memory, draw(st.floats(0, 10_000 * MIB)), draw(st.integers(0, memory)))


def run(load: Load, limit: Limits, rate: float, passes: int = ENOUGH) -> list[Transfer]:
    """Return the transfer at the end of each pass, until it is done."""
    states = [start(load)]
    while states[-1].phase is not Phase.DONE and len(states) < passes:
        states.append(advance(states[-1], load, limit, rate, due(states[-1], rate)))
    return states


@given(loads(), limits, rates)
def test_bytes_sent_are_the_memory_and_what_each_pass_left(load: Load, limit: Limits, rate: float) -> None:
    states = run(load, limit, rate)
    owed = load.memory + sum(state.remaining for state in states[1:])
    assert states[-1].sent + states[-1].remaining == pytest.approx(owed)
    assert states[-1].sent == pytest.approx(rate * states[-1].elapsed, rel=1e-6)


@given(loads(), limits, rates)
def test_pre_copy_ends_if_and_only_if_it_converges(load: Load, limit: Limits, rate: float) -> None:
    assume(not 0.9 < load.dirty_rate / rate < 1)  # such a transfer ends, too, but after too many passes for a test
    assert (run(load, limit, rate)[-1].phase is Phase.DONE) == converges(load, rate, limit.max_downtime)


@given(loads(), limits, rates)
def test_the_downtime_stays_within_the_allowed_one(load: Load, limit: Limits, rate: float) -> None:
    last = run(load, limit, rate)[-1]
    assert last.downtime <= max(limit.max_downtime, LEAST_STOP / rate) * 1.000001


@given(loads(), limits, rates, st.floats(0, 1), st.floats(0.001, 1000))
def test_two_steps_equal_one_step(load: Load, limit: Limits, rate: float, part: float, seconds: float) -> None:
    seconds = min(seconds, (load.memory + 50 * max(load.bound, LEAST_STOP)) / rate)  # some 50 passes
    once = advance(start(load), load, limit, rate, seconds)
    first = advance(start(load), load, limit, rate, seconds * part)
    assume(once.phase is Phase.COPY and once.iteration < ENOUGH)  # a change of phase ends a step
    twice = advance(first, load, limit, rate, seconds * (1 - part))
    assert twice.sent == pytest.approx(once.sent)
    assert twice.elapsed == pytest.approx(once.elapsed)


@given(loads(), limits, rates, st.floats(0, 1))
def test_post_copy_sends_each_byte_once_and_always_ends(load: Load, limit: Limits, rate: float, part: float) -> None:
    begun = advance(start(load), load, limit, rate, part * load.memory / rate)
    assume(begun.phase is Phase.COPY)
    switched = switch(begun, load)
    assert switched.remaining <= load.memory
    assert switched.sent + switched.remaining >= load.memory * 0.999999
    done = advance(switched, load, limit, rate, due(switched, rate))
    assert done.phase is Phase.DONE
    assert done.sent == pytest.approx(switched.sent + switched.remaining)


@given(loads(), limits)
def test_without_a_rate_nothing_is_sent_but_the_guest_runs(load: Load, limit: Limits) -> None:
    later = advance(start(load), load, limit, 0, 10)
    assert (later.sent, later.remaining, later.elapsed) == (0, load.memory, 10)
    assert later.dirty == pytest.approx(min(load.dirty_rate * 10, load.bound))


def test_a_stopped_guest_needs_one_pass() -> None:
    load = Load(100 * MIB, 50 * MIB, 100 * MIB)
    done = advance(start(load, live=False), load, Limits(), 10 * MIB, 10)
    assert (done.phase, done.sent, done.downtime) == (Phase.DONE, load.memory, 10)


def test_the_throttle_makes_a_fast_writer_converge() -> None:
    load = Load(100 * MIB, 200 * MIB, 100 * MIB)
    assert not converges(load, 100 * MIB, 0.1)
    states = run(load, Limits(0.1, auto_converge=True), 100 * MIB)
    assert states[-1].phase is Phase.DONE
    assert all(later.throttle >= earlier.throttle for earlier, later in pairwise(states))


def test_the_throttle_is_used_only_on_request() -> None:
    load = Load(100 * MIB, 200 * MIB, 100 * MIB)
    assert {state.throttle for state in run(load, Limits(0.1), 100 * MIB, 20)} == {0}


def test_progress_is_a_monitors_reading() -> None:
    load = Load(100 * MIB, 40 * MIB, 100 * MIB)
    limit = Limits(0.1)
    first = progress(advance(start(load), load, limit, 50 * MIB, 1), load, limit, 50 * MIB)
    assert (first.iteration, first.remaining_bytes, first.dirty_rate, first.downtime) == (1, 50 * MIB, 0, 0.1)
    second = progress(advance(start(load), load, limit, 50 * MIB, 2.1), load, limit, 50 * MIB)
    assert (second.iteration, second.remaining_bytes, second.processed_bytes) == (2, 75 * MIB, 105 * MIB)
    assert (second.dirty_rate, second.rate) == (40 * MIB, 50 * MIB)
    assert second.downtime == pytest.approx(1.6)


def test_a_resumed_post_copy_owes_only_the_rest() -> None:
    load = Load(100 * MIB)
    assert due(resume(load, 30 * MIB), 10 * MIB) == 3
