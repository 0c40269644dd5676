"""agent.handshake.host.engine: what one migration must not do to the next, unexpected errors, and statements that are refused."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from agent.handshake.host.phases import look_up
from agent.handshake.host.records import Role, Statement, state_from_proto
from agent.hypervisor.base import Domain, DomainBusy, DomainState, HypervisorError, HypervisorUnavailable, Job, TransferFailed
from agent.hypervisor.guest_fact import GuestFact, GuestState
from agent.runtime.errors import Reason
from agent.runtime.failure import ECHO, Failure
from drover.agent.v1 import handshake_pb2 as pb
from tests.unit.asking import (
    CANCELLED,
    ID,
    REF,
    begin,
    confirm,
    fails,
    finish,
    finished,
    perform,
    prepare,
    record,
    reserve,
    statement,
    until,
)
from tests.unit.fake_hypervisor import UUID, guest
from tests.unit.test_engine import to_armed
from tests.unit.two_agents import Pair, pair_of_agents

NEXT = pb.AttemptRef(migration_id=ID.replace("6f", "7f"), attempt=1)
PAUSED = guest(state=DomainState.PAUSED, reason="migration")
WAITS = guest(state=DomainState.PAUSED, reason="migration", incoming=True, job=Job.INCOMING)
ARRIVED = guest(reason="migrated")


@pytest.fixture
async def brief() -> AsyncIterator[Pair]:
    """Short timeouts for silent drivers and leases, and short pauses between questions to a source."""
    async with pair_of_agents(lease=0.6, takeover=0.6) as pair:
        yield pair


# --- one guest, two migrations ----------------------------------------------------------------------------------------


async def test_a_guest_does_not_come_back_before_its_old_copy_is_removed(pair: Pair) -> None:
    """The domain is destroyed, but its definition cannot be removed: the next try would destroy the guest that came back."""
    h1 = pair.source
    h1.hypervisor.put(guest(state=DomainState.SHUTOFF, reason="migrated"))
    h1.hypervisor.fails_always["remove"] = HypervisorError("cannot undefine")
    h1.keep(record(Role.SOURCE, "removing"))
    await h1.restart()
    await until(lambda: "remove" in h1.effects)
    busy = await fails(h1.engine.reserve_slot(reserve(ref=NEXT, source_host="h2")), Reason.DOMAIN_BUSY)
    assert busy.metadata["migration_id"] == ID
    assert f"`drover migration cancel {ID}`" in busy.message


async def test_a_copy_that_is_being_given_up_is_not_prepared_again(pair: Pair) -> None:
    h2 = pair.destination
    h2.hypervisor.fails_always["abandon"] = HypervisorUnavailable("libvirtd is away")
    h2.keep(record(Role.DESTINATION, "abandoning"))
    await h2.restart()
    await fails(h2.engine.reserve_slot(reserve(ref=NEXT)), Reason.DOMAIN_BUSY)
    h2.hypervisor.fails_always.clear()
    await h2.reaches("gone")
    await h2.engine.reserve_slot(reserve(ref=NEXT))


async def test_an_abort_on_its_way_holds_up_the_next_migration(pair: Pair) -> None:
    pair.wire.all_sent.clear()
    source, h2 = pair.source, pair.destination.engine
    await h2.reserve_slot(reserve())
    await source.engine.begin(begin())
    await h2.prepare(prepare())
    await source.engine.perform(perform())
    held = source.hypervisor.held["abort"] = asyncio.Event()
    aborting = asyncio.create_task(source.engine.abort(pb.AbortRequest(ref=REF)))
    await until(lambda: "abort" in source.effects)
    pair.wire.broken.set()
    await source.reaches("kept")
    busy = await fails(source.engine.begin(begin(ref=NEXT)), Reason.DOMAIN_BUSY)
    assert f"migration {ID} of guest web1 has ended, but its last call to the hypervisor has not returned" in busy.message
    assert "cancel" not in busy.message, "there is nothing to cancel"
    held.set()
    await aborting
    await until(lambda: not source.engine._attempts.all()[0].running("abort"))
    await source.engine.begin(begin(ref=NEXT))


# --- unexpected errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [DomainBusy("cannot acquire state change lock"), HypervisorError("end of file"), ValueError("odd")]
)
async def test_a_look_survives_every_answer(pair: Pair, error: Exception) -> None:
    pair.source.keep(record(Role.SOURCE, "performing"))
    pair.source.hypervisor.put(PAUSED)
    pair.destination.keep(record(Role.DESTINATION, "armed"))
    pair.destination.hypervisor.put(ARRIVED)
    for agent in (pair.source, pair.destination):
        agent.hypervisor.fails["get_domain"] = [error]
        await agent.restart()
    await pair.are("performed", "running")


@pytest.mark.parametrize("call", ["begin", "prepare", "perform"])
async def test_a_phase_that_fails_in_an_unforeseen_way_is_rolled_back(pair: Pair, call: str) -> None:
    for agent in (pair.source, pair.destination):
        agent.hypervisor.fails[call] = [RuntimeError("can't start new thread")]
    await finished(pair.driver())
    pair.stayed()


@pytest.mark.parametrize(
    ("left", "reason"),
    [
        (None, Reason.DOMAIN_NOT_FOUND),
        (guest(state=DomainState.SHUTOFF, reason="crashed"), Reason.GUEST_CRASHED),
        (guest(state=DomainState.SHUTOFF, reason="destroyed"), Reason.DOMAIN_NOT_RUNNING),
    ],
)
async def test_6_13_a_guest_that_ends_as_it_is_begun_is_reported_by_how_it_ended(
    pair: Pair, left: Domain | None, reason: Reason
) -> None:
    hypervisor = pair.source.hypervisor
    hypervisor.held["begin"] = asyncio.Event()
    hypervisor.fails["begin"] = [HypervisorError("domain is not running")]
    driver = pair.driver()
    running = asyncio.create_task(finished(driver))
    await until(lambda: pair.source.journalled == "beginning")
    hypervisor.domains.clear()
    if left is not None:
        hypervisor.put(left)
    hypervisor.held["begin"].set()
    await running
    assert driver.view.failure is not None
    assert driver.view.failure.reason is reason
    assert driver.view.failure.metadata["host"] == "h1"
    assert pair.states == ("kept", "gone")


async def test_6_14_the_death_of_the_copy_is_told_as_the_cause(pair: Pair) -> None:
    """Finish's own error tells little, and the source's only that its stream broke."""
    echo = TransferFailed("Unable to write to socket: Broken pipe", {ECHO: "true"})
    pair.source.hypervisor.fails["perform"] = [echo]
    pair.destination.hypervisor.fails["finish"] = [TransferFailed("domain is not running")]
    pair.destination.hypervisor.deaths["web1"] = TransferFailed("the QEMU of web1 died: out of memory")
    await finished(pair.driver())
    source, destination = await pair.source.record(), await pair.destination.record()
    assert destination.failure.message == "h2: the QEMU of web1 died: out of memory"
    assert destination.failure.metadata["host"] == "h2"
    assert source.failure.message.startswith("h1: Unable to write")
    assert source.failure.metadata["echo"] == "true"


@pytest.mark.parametrize("prepared", [True, False])
async def test_6_14_a_copy_that_died_just_before_it_was_given_up_says_so(pair: Pair, *, prepared: bool) -> None:
    """The source saw its stream break first. A death in the log of an earlier copy does not count."""
    agent = pair.destination
    await agent.engine.reserve_slot(reserve())
    agent.hypervisor.deaths["web1"] = TransferFailed("the QEMU of web1 died")
    if prepared:
        await agent.engine.prepare(prepare())
    else:
        agent.hypervisor.held["prepare"] = asyncio.Event()
        preparing = asyncio.create_task(agent.engine.prepare(prepare()))
        await agent.reaches("preparing")
    giving_up = asyncio.create_task(agent.engine.abandon(pb.AbandonRequest(ref=REF)))
    if not prepared:
        await agent.reaches("abandoning")
        agent.hypervisor.held["prepare"].set()
        await fails(preparing, Reason.GIVEN_UP)
    ended = (await giving_up).record
    given_up = "the copy at the destination was given up before it ran"
    assert ended.failure.message == ("h2: the QEMU of web1 died" if prepared else given_up)


@pytest.mark.parametrize("first", ["event", "finish", "abandon"])
async def test_6_14_a_copy_that_somebody_destroyed_is_told_as_the_cause(pair: Pair, first: str) -> None:
    """Finish may go on waiting, and its own error is only an echo."""
    agent = pair.destination
    agent.hypervisor.held["finish"] = asyncio.Event()
    agent.hypervisor.fails["finish"] = [TransferFailed("is not processing incoming migration", {ECHO: "true"})]
    await to_armed(pair)
    await until(lambda: bool(agent.hypervisor._news))
    agent.hypervisor.destructions[UUID] = TransferFailed("the copy of web1 was destroyed")
    if first == "event":
        agent.hypervisor.tell("stopped", "destroyed")
        await until(lambda: agent.durable.failure is not None)
    if first == "abandon":  # libvirt ends the process slowly: the source has seen its stream break by then
        pair.source.keep(record(Role.SOURCE, "kept"))
        await pair.source.restart()
        giving_up = asyncio.create_task(agent.engine.abandon(pb.AbandonRequest(ref=REF, source_kept=True)))
        await agent.reaches("abandoning")
        agent.hypervisor.held["finish"].set()
        await giving_up
    agent.hypervisor.held["finish"].set()
    await agent.reaches("gone")
    assert (await agent.record()).failure.message == "h2: the copy of web1 was destroyed"


async def test_6_14_a_cause_replaces_the_giving_up_that_was_recorded_before(pair: Pair) -> None:
    pair.destination.keep(record(Role.DESTINATION, "armed", failure=Failure(Reason.GIVEN_UP, "given up")))
    pair.destination.hypervisor.deaths["web1"] = TransferFailed("the QEMU of web1 died")
    pair.destination.hypervisor.put(WAITS)
    await pair.destination.restart()
    await until(lambda: bool(pair.destination.hypervisor._news))
    pair.destination.hypervisor.tell("stopped", "failed")
    async for response in pair.destination.engine.watch_record(pb.WatchRecordRequest(ref=REF)):
        if response.record.failure.message == "h2: the QEMU of web1 died":
            return


async def test_a_finish_that_fails_in_an_unforeseen_way_is_looked_into(pair: Pair) -> None:
    pair.destination.hypervisor.fails["finish"] = [RuntimeError("can't start new thread")]
    driver = pair.driver()
    running = asyncio.create_task(finished(driver))
    await pair.are("performed", "armed")
    await until(lambda: "RuntimeError" in pair.destination.durable.waiting_for)
    pair.destination.hypervisor.put(ARRIVED)
    await running
    assert pair.states == ("removed", "running")


# --- requests that race -----------------------------------------------------------------------------------------------


async def raced(*calls: object) -> list[object]:
    return await asyncio.gather(*calls, return_exceptions=True)  # type: ignore[call-overload,no-any-return]


def reused(answers: list[object]) -> bool:
    return [getattr(answer, "reason", None) for answer in answers].count(Reason.REQUEST_ID_REUSED) == 1


async def test_two_requests_of_one_id_are_told_apart_while_the_first_is_written(pair: Pair) -> None:
    pair.wire.all_sent.clear()
    source, destination = pair.alone(), pair.destination
    source.journal.pause = destination.journal.pause = 0.02
    source.hypervisor.put(guest("8b2f4f7e-0d5c-4a57-9c55-3c1f5a9e0002", "web2"))
    h1, h2 = source.engine, destination.engine
    assert reused(await raced(*(h2.reserve_slot(reserve(request_id="r", source_host=name)) for name in ("h1", "h3"))))
    assert reused(await raced(*(h1.begin(begin(request_id="r", domain=name)) for name in ("web1", "web2"))))
    assert reused(await raced(*(h2.prepare(prepare(request_id="r", domain_xml=xml)) for xml in ("<one/>", "<two/>"))))
    assert destination.hypervisor.arguments["prepare"][0] == "<one/>"
    assert reused(await raced(*(h1.perform(perform(request_id="r", bandwidth_bytes_per_second=b)) for b in (1 << 20, 1 << 30))))
    assert source.durable.bandwidth == 1 << 20


# --- post-copy --------------------------------------------------------------------------------------------------------


async def test_the_switch_to_post_copy_needs_an_armed_destination(pair: Pair) -> None:
    """Otherwise its lease could end, and half of the guest's memory would be lost."""
    pair.wire.all_sent.clear()
    h1, h2 = pair.source.engine, pair.destination.engine
    await h2.reserve_slot(reserve())
    await h1.begin(begin())
    await h2.prepare(prepare())
    await h1.perform(perform())
    switch = pb.StartPostCopyRequest(ref=REF)
    refused = await fails(h1.start_post_copy(switch), Reason.POST_COPY_NOT_ARMED)
    assert "h2 is prepared" in refused.message
    pair.to_destination.cut = True
    await fails(h1.start_post_copy(switch), Reason.HOST_UNREACHABLE)
    pair.source.other_side = None
    await fails(h1.start_post_copy(switch), Reason.POST_COPY_NOT_ARMED)
    assert "start_postcopy" not in pair.source.effects


async def test_a_broken_post_copy_says_what_is_where(pair: Pair) -> None:
    broken = guest(state=DomainState.PAUSED, reason="post-copy failed", postcopy=True, job=Job.OUTGOING)
    pair.source.hypervisor.put(broken)
    pair.source.keep(record(Role.SOURCE, "performing"))
    await pair.source.restart()
    async for response in pair.source.engine.watch_record(pb.WatchRecordRequest(ref=REF)):
        if response.record.waiting_for:
            break
    assert "the rest on h2. Destroy neither copy" in response.record.waiting_for


async def test_a_guest_whose_other_half_has_died_is_reported_as_crashed(pair: Pair) -> None:
    pair.source.hypervisor.put(guest(state=DomainState.PAUSED, reason="post-copy failed", postcopy=True))
    pair.source.keep(record(Role.SOURCE, "performed"))
    pair.destination.keep(record(Role.DESTINATION, "gone"))
    await pair.source.restart()
    driver = pair.driver()
    await driver.resume()
    await finished(driver)
    assert (await pair.source.record()).failure.reason == Reason.GUEST_CRASHED
    assert "resume" not in pair.source.effects


# --- statements and addresses -----------------------------------------------------------------------------------------


async def test_a_word_must_be_about_the_other_host(pair: Pair) -> None:
    pair.destination.keep(record(Role.DESTINATION, "armed"))
    pair.destination.hypervisor.put(WAITS)
    pair.source.keep(record(Role.SOURCE, "performed"))
    pair.source.hypervisor.put(PAUSED)
    for agent in (pair.source, pair.destination):
        await agent.restart()
    abandon = pb.AbandonRequest(ref=REF, source_kept=True, statement=statement("h2"))
    await fails(pair.destination.engine.abandon(abandon), Reason.INVALID_FIELD)
    await fails(pair.source.engine.confirm(confirm(pb.DECISION_GONE, statement=statement("h1"))), Reason.INVALID_FIELD)
    assert pair.states == ("performed", "armed")


async def test_a_host_that_was_wrongly_declared_dead_learns_it_without_a_restart(brief: Pair) -> None:
    brief.destination.settle()
    driver = brief.driver()
    running = asyncio.create_task(finished(driver))
    await brief.in_doubt(driver)
    driver.view.declare_dead("destination", statement("h2"))
    await running
    brief.wire.starts.set()
    brief.to_destination.cut = False
    await until(lambda: brief.destination.journalled == "gone")
    assert brief.runs_on == ["h1"]


async def test_an_armed_host_that_was_declared_dead_pauses_what_has_started_meanwhile(brief: Pair) -> None:
    h2 = brief.destination
    h2.keep(record(Role.DESTINATION, "armed"))
    h2.hypervisor.put(WAITS)
    brief.source.keep(record(Role.SOURCE, "kept", statement=Statement.of(statement("h2"))))
    held = h2.hypervisor.held["abandon"] = asyncio.Event()
    await h2.restart()
    await until(lambda: "abandon" in h2.effects)
    h2.hypervisor.put(ARRIVED)
    held.set()
    await until(lambda: h2.journalled == "gone")
    assert h2.hypervisor.domains[UUID].state is DomainState.PAUSED


async def test_news_that_was_overtaken_is_not_told_for_ever(brief: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy starts while its source is asked: the event of the source's answer is dropped, not retried."""
    h2 = brief.destination
    h2.keep(record(Role.DESTINATION, "armed"))
    h2.hypervisor.put(WAITS)
    brief.source.keep(record(Role.SOURCE, "kept"))
    asked = brief.to_source.get_record

    async def answers_late(request: pb.GetRecordRequest) -> object:
        answer = await asked(request)
        h2.hypervisor.put(ARRIVED)
        await until(lambda: h2.journalled == "running")
        return answer

    monkeypatch.setattr(brief.to_source, "get_record", answers_late, raising=False)
    await h2.restart()
    await until(lambda: any(entry["event"] == "event dropped" for entry in brief.logs))
    assert (await h2.record()).waiting_for == ""
    assert h2.calls.count("journal running") == 1


@pytest.mark.parametrize("address", ["h2.example:7400", "h2", "unix:relative"])
async def test_an_agent_that_could_not_be_asked_later_is_refused_now(pair: Pair, address: str) -> None:
    await fails(pair.source.engine.begin(begin(destination_agent=address)), Reason.INVALID_FIELD)
    await fails(pair.destination.engine.reserve_slot(reserve(source_agent=address)), Reason.INVALID_FIELD)
    assert pair.states == ("", "")


async def test_a_refused_giving_up_leaves_no_failure_behind(pair: Pair) -> None:
    h2 = pair.destination
    pair.source.keep(record(Role.SOURCE, "kept"))
    h2.keep(record(Role.DESTINATION, "armed"))
    h2.hypervisor.put(WAITS)
    held = h2.hypervisor.held["abandon"] = asyncio.Event()
    await h2.restart()
    giving_up = asyncio.create_task(h2.engine.abandon(pb.AbandonRequest(ref=REF, source_kept=True)))
    await until(lambda: "abandon" in h2.effects)
    h2.hypervisor.put(ARRIVED)
    held.set()
    await giving_up
    assert h2.journalled == "running"
    assert not (await h2.record()).HasField("failure")


async def test_a_cancel_ends_a_transfer_that_failed_in_an_unforeseen_way(pair: Pair) -> None:
    pair.wire.all_sent.clear()
    driver = pair.driver()
    running = asyncio.create_task(finished(driver))
    await pair.are("performing", "armed")
    pair.source.hypervisor.fails["get_domain"] = [RuntimeError("odd"), DomainBusy("busy")]
    driver.view.cancel(CANCELLED)
    await running
    pair.stayed()


async def test_6_13_a_question_without_an_answer_forgets_no_news(pair: Pair) -> None:
    """The question about an arriving copy is cancelled as Finish returns: Finish's report is newer."""
    h2 = pair.destination
    h2.keep(record(Role.DESTINATION, "armed", seen=GuestFact(GuestState.WAITING)))
    h2.hypervisor.put(WAITS)
    await h2.restart()
    attempt = h2.engine.active()[0]
    held = h2.hypervisor.held["get_domain"] = asyncio.Event()
    asking = asyncio.create_task(look_up(h2.engine.host, attempt))
    await asyncio.sleep(0)
    attempt.saw(GuestFact(GuestState.RUNNING))
    asking.cancel()
    await asyncio.wait({asking})
    assert attempt.record.seen is not None
    assert (attempt.record.seen.state, attempt.record.seen.silence) == (GuestState.RUNNING, "")
    held.set()


async def test_6_13_a_copy_that_was_shut_off_before_it_started_has_not_run(pair: Pair) -> None:
    """A signal leaves it shut off, as if its user had shut it down after its arrival; but its handle knows that it never ran."""
    agent = pair.destination
    await agent.engine.reserve_slot(reserve())
    await agent.engine.prepare(prepare())
    agent.hypervisor.unrun.add(UUID)
    agent.hypervisor.fails["finish"] = [HypervisorUnavailable("libvirtd is away")]
    agent.hypervisor.put(guest(state=DomainState.SHUTOFF, reason="shutdown"))
    answer = await agent.engine.finish(finish(wait={"seconds": 20}))
    assert state_from_proto(answer.record) == "gone"
