"""agent.handshake.heard: what another agent has just answered this process itself need not be asked again; all else must."""

import pytest

from agent.errors import Reason
from agent.handshake import heard
from agent.handshake.records import Role, record_to_proto, state_from_proto
from agent.hypervisor.base import DomainState
from drover.agent.v1 import handshake_pb2 as pb
from tests.unit.asking import REF, begin, confirm, fails, perform, prepare, record, reserve, until
from tests.unit.fake_hypervisor import guest
from tests.unit.two_agents import Pair

ELSEWHERE = "192.0.2.9:7400"


async def stopped(pair: Pair, said: str, *, really: str = "armed", address: str = "", host: str = "h2") -> None:
    """All was sent, the destination stands at `really`, and the source's agent has heard `said` from an address."""
    pair.source.hypervisor.put(guest(state=DomainState.PAUSED, reason="migration"))
    ours, theirs = record(Role.SOURCE, "performed"), record(Role.DESTINATION, really)
    pair.source.keep(ours)
    pair.destination.keep(theirs)
    await pair.source.restart()
    await pair.destination.restart()
    pair.source.heard.note(address or ours.peer_agent, record_to_proto(record(Role.DESTINATION, said), host))


async def test_a_decision_that_was_just_heard_is_not_asked_for(pair: Pair) -> None:
    await stopped(pair, "running", really="running")
    asked = pair.to_destination.count["get_record"]
    answer = await pair.source.engine.confirm(confirm(pb.DECISION_RUNNING))
    assert state_from_proto(answer.record) == "removed"
    assert pair.to_destination.count["get_record"] == asked


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("armed", {}),  # it may have decided meanwhile
        ("running", {"address": ELSEWHERE}),  # not where the destination of this attempt answers
        ("running", {"host": "h9"}),  # not its host
    ],
)
async def test_all_else_is_asked(pair: Pair, said: str, told: dict[str, str]) -> None:
    await stopped(pair, said, **told)
    await fails(pair.source.engine.confirm(confirm(pb.DECISION_RUNNING)), Reason.UNDECIDED)
    assert pair.to_destination.count["get_record"] == 1


async def test_what_was_heard_some_time_ago_is_asked_again(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    await stopped(pair, "running")
    monkeypatch.setattr(heard, "FRESH_SECONDS", -1.0)
    await fails(pair.source.engine.confirm(confirm(pb.DECISION_RUNNING)), Reason.UNDECIDED)


async def test_what_a_caller_relays_was_not_heard(pair: Pair) -> None:
    """It is in the request of whoever calls this agent; only what this agent was answered counts."""
    await stopped(pair, "armed")
    claimed = record_to_proto(record(Role.DESTINATION, "running"), "h2")
    await fails(pair.source.engine.confirm(confirm(pb.DECISION_RUNNING, destination_record=claimed)), Reason.UNDECIDED)


def test_memory_is_bounded() -> None:
    known, ours = heard.Heard(), record(Role.SOURCE, "performed")
    for number in range(200):
        known.note(f"192.0.2.1:{number + 1}", pb.Record(ref=REF))
    assert len(known._records) <= 64
    assert known.of(ours) is None


async def test_a_source_that_another_one_drives_hears_its_destination(pair: Pair) -> None:
    """From Begin on, so that no call that rests on the destination's record has to ask for it."""
    await pair.destination.engine.reserve_slot(reserve())
    await pair.source.engine.begin(begin())
    prepared = await pair.destination.engine.prepare(prepare())
    ours = pair.source.durable
    await until(lambda: (told := pair.source.heard.of(ours)) is not None and told.uri == prepared.uri_out)
    await pair.source.engine.perform(perform(uri=prepared.uri_out))
    assert pair.to_destination.count["get_record"] == 0
    await pair.destination.engine.abandon(pb.AbandonRequest(ref=REF))
    await until(lambda: not follows(pair))


def follows(pair: Pair) -> list[object]:
    """What the source hears its destination by."""
    return [task for attempt in pair.source.engine._attempts.all() for task in attempt.running("peer")]


async def test_a_source_that_drives_itself_needs_no_watch(pair: Pair) -> None:
    ours = record(Role.SOURCE, "begun")
    pair.source.heard.note(ours.peer_agent, record_to_proto(record(Role.DESTINATION, "reserved"), "h2"))
    await pair.source.engine.begin(begin())
    await until(lambda: not follows(pair))
    told = pair.source.heard.of(ours)
    assert told is not None
    assert told.state == pb.RECORD_STATE_RESERVED  # and nothing newer
