"""agent.handshake.host.engine: the calls of one host. The journal is written before the hypervisor acts; callers may go away."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from agent.handshake.host.records import state_from_proto
from agent.hypervisor.base import HypervisorError
from agent.runtime.errors import Reason
from drover.agent.v1 import handshake_pb2 as pb
from tests.unit.asking import ID, PATIENCE, REF, begin, confirm, fails, finish, perform, prepare, requirements, reserve, until
from tests.unit.fake_hypervisor import guest
from tests.unit.two_agents import JOURNAL_DOWN, Agent, Pair

ABORT, ABANDON = pb.AbortRequest(ref=REF), pb.AbandonRequest(ref=REF)
RUNNING, GONE = confirm(pb.DECISION_RUNNING), confirm(pb.DECISION_GONE)
OTHER = pb.AttemptRef(migration_id=ID, attempt=2)


@pytest.fixture
def source(pair: Pair) -> Agent:
    return pair.source


@pytest.fixture
def destination(pair: Pair) -> Agent:
    return pair.destination


async def to_prepared(agent: Agent) -> None:
    await agent.engine.reserve_slot(reserve())
    await agent.engine.prepare(prepare())


async def to_armed(pair: Pair) -> None:
    await to_prepared(pair.destination)
    await pair.destination.engine.finish(finish())
    await until(lambda: "finish" in pair.destination.effects)


# --- journal, then effect, then journal -------------------------------------------------------------------------------


async def test_the_source_writes_before_it_does_and_before_it_answers(pair: Pair) -> None:
    source = pair.alone()
    assert state_from_proto((await source.engine.begin(begin())).record) == "begun"
    await source.engine.perform(perform())
    await source.reaches("performed")
    answer = await source.engine.confirm(RUNNING)
    assert state_from_proto(answer.record) == "removed"
    assert source.calls == [
        *("journal beginning", "begin", "journal begun"),
        *("journal performing", "perform", "journal performed"),
        *("journal removing", "remove", "journal removed"),
    ]


async def test_the_destination_writes_before_it_does_and_before_it_answers(pair: Pair) -> None:
    agent = pair.destination
    await to_prepared(agent)
    pair.wire.arrived.set()
    answer = await agent.engine.finish(finish(wait={"seconds": 2}))
    assert (state_from_proto(answer.record), answer.cookie_out) == ("running", b"finished")
    assert agent.calls == [
        *("journal reserved", "journal preparing", "prepare", "journal prepared"),
        *("journal armed", "finish", "journal running"),
    ]


async def test_giving_up_is_written_before_the_copy_is_destroyed(destination: Agent) -> None:
    await to_prepared(destination)
    destination.calls.clear()
    assert state_from_proto((await destination.engine.abandon(ABANDON)).record) == "gone"
    assert destination.calls == ["journal abandoning", "abandon", "journal gone"]


# --- a journal that cannot be written ---------------------------------------------------------------------------------

Setup = Callable[[Pair], Awaitable[Any]]


@pytest.mark.parametrize(
    ("call", "request_", "before"),
    [
        ("begin", begin(), lambda pair: asyncio.sleep(0)),
        ("perform", perform(), lambda pair: pair.alone().engine.begin(begin())),
        ("abort", ABORT, lambda pair: pair.source.engine.begin(begin())),
        ("reserve_slot", reserve(), lambda pair: asyncio.sleep(0)),
        ("prepare", prepare(), lambda pair: pair.destination.engine.reserve_slot(reserve())),
        ("finish", finish(), lambda pair: to_prepared(pair.destination)),
        ("abandon", ABANDON, lambda pair: to_prepared(pair.destination)),
    ],
)
async def test_what_cannot_be_recorded_is_not_done(pair: Pair, call: str, request_: Any, before: Setup) -> None:
    agent = pair.source if call in ("begin", "perform", "abort") else pair.destination
    await before(pair)
    state, done = agent.journalled, list(agent.calls)
    agent.journal.fails = [JOURNAL_DOWN]
    error = await fails(getattr(agent.engine, call)(request_), Reason.JOURNAL_UNAVAILABLE)
    assert "disk" in error.message
    await asyncio.sleep(0.02)
    assert agent.calls == done
    assert agent.journalled == state
    assert len(agent.engine.active()) == (1 if state else 0)
    await getattr(agent.engine, call)(request_)  # the same request succeeds once the journal works
    assert agent.journalled not in ("", state)


@pytest.mark.parametrize("event", ["begun", "performed", "removed"])
async def test_news_for_the_source_is_kept_until_it_can_be_recorded(pair: Pair, event: str) -> None:
    """The effect has happened, so recording it is retried, and the effect is not repeated."""
    agent = pair.source
    agent.journal.down = lambda record: record.state == event and agent.journal.refused < 3
    running = asyncio.create_task(pair.driver().run())
    await asyncio.wait_for(running, PATIENCE)
    pair.moved()
    assert agent.journal.refused == 3
    assert len(agent.effects) == len(set(agent.effects)) == 3


@pytest.mark.parametrize("event", ["prepared", "running"])
async def test_news_for_the_destination_is_kept_until_it_can_be_recorded(pair: Pair, event: str) -> None:
    agent = pair.destination
    agent.journal.down = lambda record: record.state == event and agent.journal.refused < 3
    running = asyncio.create_task(pair.driver().run())
    await asyncio.wait_for(running, PATIENCE)
    pair.moved()
    assert agent.journal.refused == 3
    assert agent.effects == ["prepare", "finish"]


async def test_a_decision_that_is_not_recorded_is_told_to_nobody(pair: Pair) -> None:
    agent = pair.destination
    await to_armed(pair)
    agent.journal.down = lambda record: record.state == "running"
    pair.wire.arrived.set()
    await until(lambda: agent.journal.refused)
    answer = await agent.engine.finish(finish(wait={"nanos": 50_000_000}))
    assert state_from_proto(answer.record) == "armed"
    agent.journal.down = lambda record: False
    await agent.reaches("running")


@pytest.mark.parametrize("effect", ["remove", "resume"])
async def test_a_journal_that_fails_between_a_retry_and_its_end(pair: Pair, effect: str) -> None:
    """The hypervisor fails once, which is recorded in `waiting_for`; then it works, but the journal fails for a moment."""
    agent = pair.alone()
    await agent.engine.begin(begin())
    await agent.engine.perform(perform())
    await agent.reaches("performed")
    agent.hypervisor.fails[effect] = [HypervisorError("not now")]
    refuse = iter([True])
    agent.journal.down = lambda record: record.state in ("removing", "resuming") and not record.waiting_for and (
        "not now" in (agent_waits(agent)) and next(refuse, False)
    )  # fmt: skip
    request = RUNNING if effect == "remove" else GONE
    ended = asyncio.create_task(agent.engine.confirm(request))
    await agent.reaches("removed" if effect == "remove" else "kept")
    await ended


def agent_waits(agent: Agent) -> str:
    return agent.engine.active()[0].record.waiting_for


# --- callers may go away ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("effect", ["begin", "perform", "remove"])
async def test_a_caller_of_the_source_that_goes_away_cancels_nothing(pair: Pair, effect: str) -> None:
    agent = pair.source
    held = agent.hypervisor.held[effect] = asyncio.Event()
    driving = asyncio.create_task(pair.driver().run())
    await until(lambda: effect in agent.effects)
    driving.cancel()
    await asyncio.gather(driving, return_exceptions=True)
    held.set()
    await agent.reaches({"begin": "begun", "perform": "performed", "remove": "removed"}[effect])
    await asyncio.wait_for(pair.driver().run(), PATIENCE)
    pair.moved()


@pytest.mark.parametrize("effect", ["prepare", "finish"])
async def test_a_caller_of_the_destination_that_goes_away_cancels_nothing(pair: Pair, effect: str) -> None:
    agent = pair.destination
    held = agent.hypervisor.held[effect] = asyncio.Event()
    driving = asyncio.create_task(pair.driver().run())
    await until(lambda: effect in agent.effects)
    driving.cancel()
    await asyncio.gather(driving, return_exceptions=True)
    held.set()
    await agent.reaches({"prepare": "prepared", "finish": "running"}[effect])
    await asyncio.wait_for(pair.driver().run(), PATIENCE)
    pair.moved()


@pytest.mark.parametrize(
    ("call", "request_", "end"),
    [("begin", begin(), "begun"), ("reserve_slot", reserve(), "reserved")],
)
async def test_a_first_caller_that_goes_away_during_the_write(pair: Pair, call: str, request_: Any, end: str) -> None:
    """The write is carried out all the same, so the attempt exists: the next caller joins it."""
    agent = pair.source if call == "begin" else pair.destination
    agent.journal.held = asyncio.Event()
    leaving = asyncio.create_task(getattr(agent.engine, call)(request_))
    await agent.journal.waiting.wait()
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    agent.journal.held.set()
    await until(lambda: agent.journalled == end)
    assert len(agent.engine.active()) == 1
    async with asyncio.timeout(PATIENCE):
        await getattr(agent.engine, call)(request_)
    assert state_from_proto(await agent.record()) == end
    assert agent.effects.count("begin") == (1 if call == "begin" else 0)


# --- joining, and request ids -----------------------------------------------------------------------------------------


async def test_two_callers_join_one_begin(source: Agent) -> None:
    held = source.hypervisor.held["begin"] = asyncio.Event()
    callers = [asyncio.create_task(source.engine.begin(begin(request_id=str(n)))) for n in range(3)]
    await until(lambda: source.effects)
    held.set()
    answers = await asyncio.gather(*callers)
    assert source.effects == ["begin"]
    assert {(a.cookie_out, a.domain_xml) for a in answers} == {(b"begun", f"<domain><uuid>{guest().uuid}</uuid></domain>")}


async def test_two_callers_join_one_prepare_and_one_finish(pair: Pair) -> None:
    agent = pair.destination
    await agent.engine.reserve_slot(reserve())
    answers = await asyncio.gather(*(agent.engine.prepare(prepare()) for _ in range(3)))
    assert {(a.cookie_out, a.uri_out) for a in answers} == {(b"prepared", "tcp://127.92.0.2:49152")}
    pair.wire.arrived.set()
    finishes = await asyncio.gather(*(agent.engine.finish(finish(wait={"seconds": 2})) for _ in range(3)))
    assert {a.cookie_out for a in finishes} == {b"finished"}
    assert agent.effects == ["prepare", "finish"]


async def test_two_callers_reserve_one_slot(destination: Agent) -> None:
    destination.journal.pause = 0.01
    answers = await asyncio.gather(*(destination.engine.reserve_slot(reserve()) for _ in range(2)))
    assert len({a.record.slot.epoch for a in answers}) == 1
    await destination.engine.prepare(prepare(epoch=answers[0].record.slot.epoch))


async def test_repeating_an_ended_phase_answers_what_came_of_it(pair: Pair) -> None:
    await asyncio.wait_for(pair.driver().run(), PATIENCE)
    assert (await pair.destination.engine.finish(finish())).cookie_out == b"finished"
    assert not (await pair.source.engine.perform(perform(uri="joined"))).cookie_out, "it has the guest's passwords in it"
    assert state_from_proto((await pair.source.engine.confirm(RUNNING)).record) == "removed"
    pair.moved()


@pytest.mark.parametrize(
    ("call", "first", "second"),
    [
        ("begin", begin(request_id="r"), begin(request_id="r", domain="web2")),
        ("reserve_slot", reserve(request_id="r"), reserve(request_id="r", requirements=requirements("other"))),
    ],
)
async def test_a_request_id_names_one_content(pair: Pair, call: str, first: Any, second: Any) -> None:
    agent = pair.source if call == "begin" else pair.destination
    await getattr(agent.engine, call)(first)
    done = list(agent.calls)
    error = await fails(getattr(agent.engine, call)(second), Reason.REQUEST_ID_REUSED)
    assert error.metadata["request_id"] == "r"
    assert agent.calls == done
    await getattr(agent.engine, call)(first)


async def test_a_wait_is_no_content(pair: Pair) -> None:
    source = pair.alone()
    await source.engine.begin(begin())
    await source.engine.perform(perform(request_id="r"))
    await source.engine.perform(perform(request_id="r", wait={"seconds": 1}))


# --- attempts ---------------------------------------------------------------------------------------------------------


async def test_6_19_who_watches_a_host_learns_at_once_that_a_slot_is_taken_and_free_again(destination: Agent) -> None:
    engine = destination.engine
    taken = engine.changed.next
    await engine.reserve_slot(reserve())
    assert taken.is_set()
    assert destination.in_use == 1
    free = engine.changed.next
    assert not free.is_set()
    await engine.abandon(pb.AbandonRequest(ref=REF, source_kept=True))
    await asyncio.wait_for(free.wait(), 3)
    assert destination.in_use == 0


async def test_an_older_attempt_is_refused_and_a_newer_one_waits_for_its_end(source: Agent) -> None:
    await source.engine.begin(begin())
    await fails(source.engine.begin(begin(ref=OTHER)), Reason.WRONG_PHASE)
    await source.engine.abort(ABORT)
    await source.engine.begin(begin(ref=OTHER))
    error = await fails(source.engine.begin(begin()), Reason.STALE_ATTEMPT)
    assert error.metadata["attempt"] == "2"
    assert state_from_proto(await source.record(REF)) == "kept"  # the record can be read for as long as it is kept
    assert (await source.record(pb.AttemptRef(migration_id=ID))).ref.attempt == 2


async def test_attempts_count_from_one_and_a_host_has_one_role(source: Agent) -> None:
    await fails(source.engine.begin(begin(ref=pb.AttemptRef(migration_id=ID))), Reason.INVALID_FIELD)
    await source.engine.begin(begin())
    await fails(source.engine.reserve_slot(reserve()), Reason.MIGRATION_EXISTS)


@pytest.mark.parametrize("call", ["perform", "confirm"])
async def test_a_call_for_an_unknown_attempt_leaves_nothing_at_the_source(source: Agent, call: str) -> None:
    await fails(getattr(source.engine, call)({"perform": perform(), "confirm": RUNNING}[call]), Reason.WRONG_PHASE)
    assert source.engine.active() == []
    await fails(source.record(), Reason.RECORD_NOT_FOUND)
    assert source.calls == []


@pytest.mark.parametrize("call", ["prepare", "finish"])
async def test_a_call_for_an_unknown_attempt_leaves_nothing_at_the_destination(destination: Agent, call: str) -> None:
    await fails(getattr(destination.engine, call)({"prepare": prepare(), "finish": finish()}[call]), Reason.WRONG_PHASE)
    assert destination.engine.active() == []
    await fails(destination.record(), Reason.RECORD_NOT_FOUND)


async def test_an_attempt_that_is_being_checked_has_no_record_yet(destination: Agent) -> None:
    held = destination.hypervisor.held["incompatibilities"] = asyncio.Event()
    reserving = asyncio.create_task(destination.engine.reserve_slot(reserve()))
    await until(lambda: destination.engine.active())
    try:
        await fails(destination.record(), Reason.RECORD_NOT_FOUND)
    finally:
        held.set()
        await reserving


async def test_what_was_given_up_before_it_began_stays_given_up(pair: Pair) -> None:
    await pair.source.engine.abort(ABORT)
    await pair.destination.engine.abandon(ABANDON)
    await fails(pair.source.engine.begin(begin()), Reason.WRONG_PHASE)
    await fails(pair.destination.engine.reserve_slot(reserve()), Reason.WRONG_PHASE)
    assert pair.states == ("kept", "gone")
    assert pair.source.effects == pair.destination.effects == []
