"""agent.handshake.host.engine: copies that were disowned, and races between calls and reports."""

import asyncio
import time

import pytest

from agent.handshake.host import owner
from agent.handshake.host.records import Role, Statement, state_from_proto
from agent.hypervisor.base import RESUMED, DomainState, HypervisorUnavailable
from agent.runtime.errors import DroverError, Reason
from drover.agent.v1 import handshake_pb2 as pb
from tests.unit.asking import PATIENCE, REF, begin, confirm, fails, finish, perform, record, requirements, reserve, statement, until
from tests.unit.fake_hypervisor import guest
from tests.unit.test_engine import to_armed
from tests.unit.two_agents import Pair

AWAY = HypervisorUnavailable("libvirtd is being restarted")

RUNS = guest()


@pytest.fixture
def pair(pair: Pair) -> Pair:
    """A pair without a guest."""
    pair.source.hypervisor.domains.clear()
    return pair


# --- disowned ---------------------------------------------------------------------------------------------------------


async def declared_dead(pair: Pair) -> None:
    """The source kept the guest because h2 was declared dead, but h2 has started it."""
    said = Statement.of(statement("h2"))
    pair.source.keep(record(Role.SOURCE, "kept", statement=said, failure=said.failure()))
    pair.destination.keep(record(Role.DESTINATION, "running"))
    pair.destination.hypervisor.put(RUNS)


async def test_a_host_that_was_declared_dead_stops_its_copy_when_it_comes_back(pair: Pair) -> None:
    await declared_dead(pair)
    await pair.destination.restart(settling=True)
    await until(lambda: pair.destination.journalled == "gone")
    ended = await pair.destination.record()
    assert pair.destination.effects[0] == "disown"
    assert pair.runs_on == []
    assert (ended.failure.reason, ended.statement.said_by) == (Reason.DECLARED_DEAD, "root@admin1")


async def test_6_01_a_later_attempt_takes_no_place_of_one_that_moved_the_guest(pair: Pair) -> None:
    """Otherwise the copy on a host that was declared dead would run for ever beside the one that its source kept."""
    await declared_dead(pair)
    agent = pair.destination
    await agent.restart()
    later = pb.AttemptRef(migration_id=REF.migration_id, attempt=2)
    for call in (agent.engine.abandon(pb.AbandonRequest(ref=later)), agent.engine.reserve_slot(reserve(ref=later))):
        assert "moved the guest" in (await fails(call, Reason.WRONG_PHASE)).message
    agent.settle()
    await until(lambda: agent.journalled == "gone")
    assert pair.runs_on == []


@pytest.mark.parametrize(("state", "aftercare"), [("removed", False), ("kept", True)])
async def test_6_02_nor_of_one_after_which_something_is_left_to_do(pair: Pair, state: str, *, aftercare: bool) -> None:
    agent = pair.source
    agent.hypervisor.fails_always["set_autostart"] = AWAY
    agent.keep(record(Role.SOURCE, state, autostart=True, aftercare=aftercare))
    agent.hypervisor.put(RUNS)
    await agent.restart()
    later = pb.AbortRequest(ref=pb.AttemptRef(migration_id=REF.migration_id, attempt=2))
    await fails(agent.engine.abort(later), Reason.WRONG_PHASE)


async def test_a_host_that_dies_while_it_stops_its_copy_goes_on_with_that(pair: Pair) -> None:
    await declared_dead(pair)
    agent = pair.destination
    agent.hypervisor.fails_always["disown"] = AWAY
    await agent.restart(settling=True)
    await until(lambda: agent.journalled == "abandoning" and "disown" in agent.effects)
    agent.hypervisor.fails_always.clear()
    await agent.restart(settling=True)
    await until(lambda: pair.runs_on == [])


async def test_a_guest_that_nobody_took_is_left_alone(pair: Pair) -> None:
    pair.source.keep(record(Role.SOURCE, "removed"))
    pair.destination.keep(record(Role.DESTINATION, "running"))
    pair.destination.hypervisor.put(RUNS)
    await pair.destination.restart(settling=True)
    await until(lambda: pair.destination.durable.settled)
    assert pair.destination.effects == []
    assert pair.runs_on == ["h2"]


async def test_a_guest_that_has_gone_on_since_is_not_touched(pair: Pair) -> None:
    await declared_dead(pair)
    pair.destination.keep(record(Role.SOURCE, "removed", migration_id="later"))
    await pair.destination.restart(settling=True)
    await until(lambda: pair.destination.journalled == "gone")
    assert pair.destination.effects == []
    assert any("two copies may run" in entry["event"] for entry in pair.logs)


async def test_6_6_a_guest_that_came_again_is_not_taken_for_the_one_that_was_disowned(pair: Pair) -> None:
    await declared_dead(pair)
    pair.destination.keep(record(Role.SOURCE, "removed", migration_id="away"))
    pair.destination.keep(record(Role.DESTINATION, "running", migration_id="back", settled=False))
    pair.source.keep(record(Role.SOURCE, "removed", migration_id="back"))
    await pair.destination.restart(settling=True)
    await until(lambda: pair.destination.journalled == "gone")
    assert pair.destination.effects == []
    assert pair.runs_on == ["h2"]


@pytest.mark.parametrize("read", [True, False])
async def test_6_6_an_older_record_that_is_read_does_not_keep_a_copy(pair: Pair, *, read: bool) -> None:
    """Any number of later attempts that failed change nothing either."""
    await declared_dead(pair)
    agent = pair.destination
    for number in range(1001):
        agent.keep(record(Role.DESTINATION, "gone", migration_id=f"m{number}"))
    agent.keep(record(Role.SOURCE, "kept", migration_id="later"))
    await agent.restart()
    if read:
        await agent.record(pb.AttemptRef(migration_id="later"))
    agent.settle()
    await until(lambda: agent.journalled == "gone")
    assert agent.effects[0] == "disown"
    assert pair.runs_on == []


async def test_6_6_a_copy_that_is_about_to_leave_is_disowned_once_it_has_stayed(pair: Pair) -> None:
    await declared_dead(pair)
    agent = pair.destination
    await agent.restart()
    leaving = pb.AttemptRef(migration_id="leaving", attempt=1)
    pair.to_source.cut = True
    await agent.engine.begin(begin(ref=leaving))
    pair.to_source.cut = False
    agent.settle()
    await until(lambda: pair.to_source.count["get_record"] >= 2)
    assert agent.journalled == "running"
    await agent.engine.abort(pb.AbortRequest(ref=leaving))
    await until(lambda: agent.journalled == "gone")
    assert pair.runs_on == []


async def test_6_01_a_guest_does_not_move_on_before_its_source_was_asked_whether_it_kept_it(pair: Pair) -> None:
    """This host was declared dead and has not asked its source yet: on a third host nobody would stop the copy."""
    await declared_dead(pair)
    agent = pair.destination
    await agent.restart()
    leaving = pb.AttemptRef(migration_id="leaving", attempt=1)
    error = await fails(agent.engine.begin(begin(ref=leaving)), Reason.DECLARED_DEAD)
    assert "root@admin1" in error.message
    await until(lambda: agent.journalled == "gone")
    assert pair.runs_on == []
    assert "begin" not in agent.effects


async def test_6_01_a_guest_is_busy_while_it_is_written_that_its_source_kept_it(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the write takes: it is carried out although its caller has gone away."""
    monkeypatch.setattr(owner, "LEAVING_SECONDS", 0.5)
    await declared_dead(pair)
    agent = pair.destination
    await agent.restart()
    held = agent.journal.held = asyncio.Event()
    leaving = pb.AttemptRef(migration_id="leaving", attempt=1)
    await fails(agent.engine.begin(begin(ref=leaving)), Reason.DOMAIN_BUSY)
    held.set()
    await until(lambda: agent.journalled == "gone")
    assert pair.runs_on == []
    assert "begin" not in agent.effects


async def test_6_01_a_guest_moves_on_once_its_source_has_ended(pair: Pair) -> None:
    pair.source.keep(record(Role.SOURCE, "removed"))
    agent = pair.destination
    agent.keep(record(Role.DESTINATION, "running"))
    agent.hypervisor.put(RUNS)
    await agent.restart()
    await agent.engine.begin(begin(ref=pb.AttemptRef(migration_id="leaving", attempt=1)))
    assert await agent.journal.unsettled() == []


async def test_6_6_what_runs_on_is_asked_about_until_its_source_has_ended(pair: Pair) -> None:
    agent = pair.destination
    agent.settle()
    pair.source.keep(record(Role.SOURCE, "performed"))
    pair.source.hypervisor.put(guest(state=DomainState.PAUSED, reason="migration"))
    await pair.source.restart()
    agent.keep(record(Role.DESTINATION, "armed"))
    agent.hypervisor.put(RUNS)
    await agent.restart(settling=True)
    await until(lambda: pair.to_source.count["get_record"] >= 2)
    assert not agent.durable.settled
    await pair.source.engine.confirm(confirm(pb.DECISION_RUNNING))
    await until(lambda: agent.durable.settled)
    assert await agent.journal.unsettled() == []  # so it is not asked any more


async def test_6_08_a_commit_whose_source_cannot_be_asked_does_not_stay_for_ever(pair: Pair) -> None:
    """The address of the source's agent is not known. The record stays as long as a source may be away, then it may be trimmed."""
    agent, old = pair.destination, time.time() - 31 * 86400
    agent.other_side = None
    agent.keep(record(Role.DESTINATION, "running", migration_id="young", peer_agent="", created=time.time() - 29 * 86400))
    agent.keep(record(Role.DESTINATION, "running", migration_id="old", peer_agent="", created=old))
    agent.keep(record(Role.DESTINATION, "running", migration_id="told", created=old))
    await agent.restart(settling=True)
    await until(lambda: "journal running" in agent.calls)
    assert [each.migration_id for each in await agent.journal.unsettled()] == ["young", "told"]


async def test_6_6_an_answer_that_makes_no_sense_keeps_no_other_copy(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    pair.destination.keep(record(Role.DESTINATION, "running", migration_id="odd", domain_uuid="another"))
    await declared_dead(pair)
    asked = pair.to_source.get_record

    async def answers_oddly(request: pb.GetRecordRequest) -> object:
        if request.ref.migration_id == "odd":
            raise RuntimeError("odd")
        return await asked(request)

    monkeypatch.setattr(pair.to_source, "get_record", answers_oddly, raising=False)
    await pair.destination.restart(settling=True)
    await until(lambda: pair.destination.journalled == "gone")
    assert pair.runs_on == []


# --- one guest, one name ----------------------------------------------------------------------------------------------


async def test_6_15_a_guest_that_is_not_let_go_yet_is_busy_with_that_migration(pair: Pair) -> None:
    """It was aborted during the hypervisor's Begin; the next migration would find that job and take it for another program's."""
    agent = pair.source
    agent.hypervisor.put(RUNS)
    agent.hypervisor.held["begin"] = begun = asyncio.Event()
    beginning = asyncio.create_task(agent.engine.begin(begin()))
    await until(lambda: agent.journalled == "beginning")
    await agent.engine.abort(pb.AbortRequest(ref=REF))
    await fails(beginning, Reason.CANCELLED)
    later = pb.AttemptRef(migration_id="later", attempt=1)
    assert REF.migration_id in (await fails(agent.engine.begin(begin(ref=later)), Reason.DOMAIN_BUSY)).message
    begun.set()
    await until(lambda: agent.hypervisor.closed_sessions == 1)
    await asyncio.sleep(0)
    await agent.engine.begin(begin(ref=later))
    assert agent.effects.count("begin") == 2


async def test_one_guest_is_taken_by_one_migration(pair: Pair) -> None:
    agent = pair.source
    agent.hypervisor.put(RUNS)
    agent.journal.pause = 0.01
    others = [begin(ref=pb.AttemptRef(migration_id=f"m{number}", attempt=1)) for number in range(3)]
    answers = await asyncio.gather(*(agent.engine.begin(request) for request in others), return_exceptions=True)
    refused = [answer for answer in answers if isinstance(answer, DroverError)]
    assert [error.reason for error in refused] == [Reason.DOMAIN_BUSY] * 2
    assert agent.effects == ["begin"]
    assert len(agent.engine.active()) == 1


OTHER_UUID = "8b2f4f7e-0d5c-4a57-9c55-3c1f5a9e0002"


@pytest.mark.parametrize("at_once", [True, False])
async def test_6_15_two_guests_that_are_to_arrive_under_one_name(pair: Pair, *, at_once: bool) -> None:
    """The hypervisor knows neither before Prepare: the second is refused before it has a slot, and its own name stays free."""
    agent = pair.destination
    agent.journal.pause = 0.01
    first = reserve(destination_name="same")
    ref = pb.AttemptRef(migration_id="6f1c0f4e-2f0a-4b5e-9d55-0d8f5a1e9b02", attempt=1)
    other = {"ref": ref, "requirements": requirements(OTHER_UUID)}
    second = reserve(**other, destination_name="same")
    if at_once:
        answers = await asyncio.gather(*map(agent.engine.reserve_slot, (first, second)), return_exceptions=True)
        errors = [answer for answer in answers if isinstance(answer, DroverError)]
    else:
        await agent.engine.reserve_slot(first)
        errors = [await fails(agent.engine.reserve_slot(second), Reason.DOMAIN_EXISTS)]
        assert first.ref.migration_id in errors[0].message
    assert [error.reason for error in errors] == [Reason.DOMAIN_EXISTS]
    assert "already arriving on h2 under the name same" in errors[0].message
    assert len(agent.engine.active()) == 1
    if not at_once:
        await agent.engine.reserve_slot(reserve(**other, destination_name="another"))


async def test_6_15_a_name_is_free_again_when_the_guest_that_was_to_have_it_does_not_come(pair: Pair) -> None:
    agent = pair.destination
    await agent.engine.reserve_slot(reserve(destination_name="same"))
    await agent.engine.abandon(pb.AbandonRequest(ref=REF))
    ref = pb.AttemptRef(migration_id="6f1c0f4e-2f0a-4b5e-9d55-0d8f5a1e9b02", attempt=1)
    await agent.engine.reserve_slot(reserve(ref=ref, requirements=requirements(OTHER_UUID), destination_name="same"))


@pytest.mark.parametrize("decision", ["running", "gone"])
async def test_a_decision_that_comes_while_the_end_of_perform_is_being_written_loses_nothing(pair: Pair, decision: str) -> None:
    """The usual race: the copy runs before the end of the source's own Perform has been recorded."""
    agent = pair.alone()
    agent.hypervisor.put(RUNS)
    pair.wire.all_sent.clear()
    await agent.engine.begin(begin())
    await agent.engine.perform(perform())
    await until(lambda: "perform" in agent.effects)
    agent.journal.held = asyncio.Event()
    pair.wire.all_sent.set()
    await agent.journal.waiting.wait()
    request = confirm(pb.DECISION_RUNNING, cookie_in=b"finished")
    if decision == "gone":
        request = confirm(pb.DECISION_GONE, statement=statement("h2"), destination_record=None)
    confirming = asyncio.create_task(agent.engine.confirm(request))
    await asyncio.sleep(0.02)
    agent.journal.held.set()
    answer = await confirming
    if decision == "running":
        assert agent.hypervisor.arguments["remove"][0] == b"finished"
    else:
        assert answer.record.statement.dead_host == "h2"
        assert answer.record.failure.reason == Reason.DECLARED_DEAD


async def test_6_19_an_event_of_the_start_that_beats_finish_drops_no_cookie(pair: Pair) -> None:
    agent = pair.destination
    pair.wire.starts.clear()
    await to_armed(pair)
    await until(lambda: bool(agent.hypervisor._news))
    pair.wire.arrived.set()
    agent.hypervisor.put(RUNS)
    agent.hypervisor.tell(RESUMED, "migrated")
    async with asyncio.timeout(PATIENCE):
        answer = await agent.engine.finish(finish(wait={"seconds": 10}))
    assert (state_from_proto(answer.record), answer.cookie_out) == ("running", b""), "the event was first"
    pair.wire.starts.set()  # and now Finish returns
    await until(lambda: not any(attempt.running("finish") for attempt in agent.engine._attempts.all()))
    assert (await agent.engine.finish(finish())).cookie_out == b"finished"
    assert agent.durable.state == "running"


@pytest.mark.parametrize(("state", "reason"), [(DomainState.SHUTOFF, Reason.DOMAIN_NOT_RUNNING), (None, Reason.DOMAIN_NOT_FOUND)])
async def test_8_1_a_guest_that_ends_while_its_migration_waits_to_transfer_ends_the_attempt(
    pair: Pair, state: DomainState | None, reason: Reason
) -> None:
    """A migration may stand prepared for hours: it must not be said to run meanwhile, nor hold its slots."""
    source = pair.source
    source.hypervisor.put(RUNS)
    await source.engine.begin(begin())
    await until(lambda: source.hypervisor.heard)
    if state is None:
        source.hypervisor.domains.clear()
    else:
        source.hypervisor.change(RUNS.uuid, state=state, reason="destroyed")
    source.hypervisor.tell("stopped", "destroyed")
    ended = await source.reaches("kept")
    assert ended.failure.reason == reason
    assert not source.engine.active()
    await fails(source.engine.perform(perform()), Reason.WRONG_PHASE)


async def test_8_1_a_guest_that_is_started_again_at_once_goes_on_with_its_migration(pair: Pair) -> None:
    source = pair.source
    source.hypervisor.put(RUNS)
    await source.engine.begin(begin())
    await until(lambda: source.hypervisor.heard)
    source.hypervisor.arguments.clear()
    source.hypervisor.tell("stopped", "shutdown")
    await until(lambda: "get_domain" in source.hypervisor.arguments)
    await asyncio.sleep(0)  # it has its answer
    assert source.journalled == "begun"
