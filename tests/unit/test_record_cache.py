"""agent.handshake.host.record_cache: recent answers to this process need not be asked for again; everything else must."""

import pytest

from agent.handshake.host import record_cache
from agent.handshake.host.records import Role, record_to_proto, state_from_proto
from agent.hypervisor.base import DomainState
from agent.runtime.errors import Reason
from drover.agent.v1 import handshake_pb2 as pb
from tests.unit.asking import REF, begin, confirm, fails, perform, prepare, record, reserve, until
from tests.unit.fake_hypervisor import guest
from tests.unit.two_agents import Pair

ELSEWHERE = "192.0.2.9:7400"


async def stopped(pair: Pair, said: str, *, really: str = "armed", address: str = "", host: str = "h2") -> None:
    """Restart both agents after everything was sent: the destination's record is `really`, and the source's agent has cached `said`
    as the answer from an address."""
    pair.source.hypervisor.put(guest(state=DomainState.PAUSED, reason="migration"))
    ours, theirs = record(Role.SOURCE, "performed"), record(Role.DESTINATION, really)
    pair.source.keep(ours)
    pair.destination.keep(theirs)
    await pair.source.restart()
    await pair.destination.restart()
    pair.source.heard.note(address or ours.peer_agent, REF, record_to_proto(record(Role.DESTINATION, said), host))


async def test_a_decision_that_was_just_heard_is_not_asked_for(pair: Pair) -> None:
    await stopped(pair, "running", really="running")
    asked = pair.to_destination.count["get_record"]
    answer = await pair.source.engine.confirm(confirm(pb.DECISION_RUNNING))
    assert state_from_proto(answer.record) == "removed"
    assert pair.to_destination.count["get_record"] == asked


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("armed", {}),  # ARMED may have become RUNNING meanwhile
        ("running", {"address": ELSEWHERE}),  # not the address of this attempt's destination
        ("running", {"host": "h9"}),  # not this attempt's destination
    ],
)
async def test_all_else_is_asked(pair: Pair, said: str, told: dict[str, str]) -> None:
    await stopped(pair, said, **told)
    await fails(pair.source.engine.confirm(confirm(pb.DECISION_RUNNING)), Reason.UNDECIDED)
    assert pair.to_destination.count["get_record"] == 1


async def test_what_was_heard_some_time_ago_is_asked_again(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    await stopped(pair, "running")
    monkeypatch.setattr(record_cache, "FRESH_SECONDS", -1.0)
    await fails(pair.source.engine.confirm(confirm(pb.DECISION_RUNNING)), Reason.UNDECIDED)


async def test_what_a_caller_relays_was_not_heard(pair: Pair) -> None:
    """A record in a caller's request is not cached; only answers to this agent's own calls count."""
    await stopped(pair, "armed")
    claimed = record_to_proto(record(Role.DESTINATION, "running"), "h2")
    await fails(pair.source.engine.confirm(confirm(pb.DECISION_RUNNING, destination_record=claimed)), Reason.UNDECIDED)


def test_memory_is_bounded() -> None:
    known, ours = record_cache.RecordCache(), record(Role.SOURCE, "performed")
    for number in range(200):
        known.note(f"192.0.2.1:{number + 1}", REF, pb.Record(ref=REF))
    assert len(known._records) <= 64
    assert known.of(ours) is None


def test_an_answer_that_was_overtaken_changes_nothing_and_no_answer_ends_what_was_heard() -> None:
    known, ours = record_cache.RecordCache(), record(Role.SOURCE, "performed")
    known.note(ours.peer_agent, REF, pb.Record(ref=REF, revision=5))
    known.note(ours.peer_agent, REF, pb.Record(ref=REF, revision=4))
    told = known.of(ours)
    assert told is not None
    assert told.revision == 5
    known.note(ours.peer_agent, REF, None)
    assert known.of(ours) is None


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make cached answers stay fresh, however busy the machine is."""
    monkeypatch.setattr(record_cache, "FRESH_SECONDS", 3600.0)


async def hearing(pair: Pair) -> str:
    """Let a source that another process drives begin, and watch its destination, which has prepared. Return the URI."""
    await pair.destination.engine.reserve_slot(reserve())
    await pair.source.engine.begin(begin())
    prepared = await pair.destination.engine.prepare(prepare())
    ours = pair.source.durable
    await until(lambda: (told := pair.source.heard.of(ours)) is not None and told.uri == prepared.uri_out)
    return str(prepared.uri_out)


async def test_a_source_that_another_one_drives_hears_its_destination(pair: Pair, patient: None) -> None:
    """It is watched from Begin on, so that no call that depends on the destination's record has to ask for it."""
    uri = await hearing(pair)
    await pair.source.engine.perform(perform(uri=uri))
    assert pair.to_destination.count["get_record"] == 0
    await pair.destination.engine.abandon(pb.AbandonRequest(ref=REF))
    await until(lambda: not follows(pair))


async def test_a_destination_that_is_not_heard_any_more_is_asked(pair: Pair, patient: None) -> None:
    """The destination gave the copy up as the watch broke: another guest may have its port by now."""
    uri = await hearing(pair)

    def broken(_: object) -> object:
        raise pair.to_destination.unreachable()

    pair.to_destination.answer["watch_record"] = broken
    await pair.destination.engine.abandon(pb.AbandonRequest(ref=REF))
    await until(lambda: not follows(pair))
    await fails(pair.source.engine.perform(perform(uri=uri)), Reason.UNDECIDED)
    assert pair.source.journalled == "begun"


def follows(pair: Pair) -> list[object]:
    """Return the tasks by which the source watches its destination."""
    return [task for attempt in pair.source.engine._attempts.all() for task in attempt.running("peer")]


async def test_a_source_that_drives_itself_needs_no_watch(pair: Pair, patient: None) -> None:
    reserved = await pair.destination.engine.reserve_slot(reserve())
    pair.source.heard.note(record(Role.SOURCE, "begun").peer_agent, REF, reserved.record)
    await pair.source.engine.begin(begin())
    await until(lambda: not follows(pair))
    assert pair.to_destination.count["watch_record"] == 0
