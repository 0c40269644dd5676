"""Issue 6, lines 1, 5 and 7: a decision is read from the host that made it, memory goes where the destination listens."""

import asyncio
from collections.abc import Awaitable

import pytest

from agent.handshake.drive.driver import Driver
from agent.handshake.host import peer_record
from agent.handshake.host.path import open_responder, prove
from agent.handshake.host.records import Role, state_from_proto
from agent.hypervisor.base import Domain, DomainState, HypervisorUnavailable, Incompatible, Job
from agent.runtime.errors import Reason
from agent.runtime.events import Bus
from agent.service.remote_peer import QUESTION_SECONDS
from drover.agent.v1 import handshake_pb2 as pb
from tests.unit.asking import (
    ADDRESSES,
    CANCELLED,
    PROBE,
    REF,
    begin,
    confirm,
    destination_record,
    fails,
    finished,
    make_plan,
    perform,
    prepare,
    record,
    requirements,
    reserve,
    source_record,
    statement,
    until,
)
from tests.unit.clocks import QUICK
from tests.unit.fake_hypervisor import UUID, guest
from tests.unit.two_agents import Agent, Line, Pair

PAUSED = guest(state=DomainState.PAUSED, reason="migration")
WAITS = guest(state=DomainState.PAUSED, reason="migration", job=Job.INCOMING, incoming=True)
KEPT = pb.AbandonRequest(ref=REF, source_kept=True)
OTHER_UUID = "8b2f4f7e-0d5c-4a57-9c55-3c1f5a9e0002"


async def stopped(pair: Pair, destination: str = "armed") -> None:
    """Let the source send everything: it is PERFORMED, and the destination waits."""
    pair.source.hypervisor.put(PAUSED)
    pair.source.keep(record(Role.SOURCE, "performed"))
    pair.destination.hypervisor.put(WAITS)
    pair.destination.keep(record(Role.DESTINATION, destination))
    await pair.source.restart()
    await pair.destination.restart()


# --- the source reads ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("claim", [pb.DECISION_GONE, pb.DECISION_RUNNING])
async def test_6_01_a_source_does_not_take_anybodys_decision(pair: Pair, claim: pb.Decision.ValueType) -> None:
    await stopped(pair)
    error = await fails(pair.source.engine.confirm(confirm(claim)), Reason.UNDECIDED)
    assert "h2" in error.message
    assert "armed" in error.message
    assert pair.states == ("performed", "armed")


async def test_6_01_a_source_does_what_its_destination_says_whatever_is_claimed(pair: Pair) -> None:
    await stopped(pair, "running")
    answer = await pair.source.engine.confirm(confirm(pb.DECISION_GONE))
    assert state_from_proto(answer.record) == "removed"


async def test_6_01_a_statement_does_not_count_while_the_host_answers(pair: Pair) -> None:
    await stopped(pair)
    request = confirm(pb.DECISION_GONE, statement=statement("h2"), destination_record=None)
    error = await fails(pair.source.engine.confirm(request), Reason.NOT_IN_DOUBT)
    assert "h2 answers h1" in error.message
    assert pair.states == ("performed", "armed")
    pair.to_destination.cut = True
    answer = await pair.source.engine.confirm(request)
    assert answer.record.statement.dead_host == "h2"


@pytest.mark.parametrize(
    "wrong",
    [
        {"host": "h3"},
        {"host": ""},
        {"peer_host": "h9"},
        {"domain_uuid": OTHER_UUID},
        {"ref": pb.AttemptRef(migration_id=REF.migration_id, attempt=2)},
    ],
    ids=str,
)
async def test_6_01_a_relayed_record_counts_only_if_it_is_the_destinations(pair: Pair, wrong: dict[str, object]) -> None:
    """A statement about the destination counts only while that is unreachable."""
    await stopped(pair)
    pair.to_destination.cut = True
    other = destination_record("gone", **wrong)
    await fails(pair.source.engine.confirm(confirm(pb.DECISION_GONE, destination_record=other)), Reason.UNDECIDED)
    assert pair.source.journalled == "performed"
    answer = await pair.source.engine.confirm(confirm(pb.DECISION_GONE, destination_record=destination_record("gone")))
    assert state_from_proto(answer.record) == "kept"


@pytest.mark.parametrize("number", [0, 99, pb.RECORD_STATE_KEPT])
@pytest.mark.parametrize("relayed", [False, True])
async def test_6_11_a_state_that_is_none_of_a_destination_decides_nothing(pair: Pair, number: int, *, relayed: bool) -> None:
    """A state of a newer version, or a caller's mistake, never causes an internal error."""
    await stopped(pair)
    pair.to_destination.cut = relayed
    odd = destination_record("gone")
    odd.ClearField("state")
    odd.MergeFromString(bytes([2 << 3, number]))
    pair.to_destination.answer["get_record"] = lambda _: pb.GetRecordResponse(record=odd)
    error = await fails(pair.source.engine.confirm(confirm(pb.DECISION_GONE, destination_record=odd)), Reason.UNDECIDED)
    assert "its record is" in error.message
    assert pair.source.journalled == "performed"


async def test_6_01_another_agent_at_the_destinations_address_is_not_the_destination(pair: Pair) -> None:
    await stopped(pair)
    pair.to_destination.answer["get_record"] = lambda answer: pb.GetRecordResponse(record=destination_record("gone", host="h3"))
    error = await fails(pair.source.engine.confirm(confirm(pb.DECISION_GONE, destination_record=None)), Reason.UNDECIDED)
    assert "h3" in error.message
    assert pair.source.journalled == "performed"


@pytest.mark.parametrize(
    ("here", "shown"),
    [
        (guest(), "is there (running, booted)"),
        (guest(state=DomainState.SHUTOFF, reason="shutdown"), "is there (shutoff, shutdown)"),
    ],
    ids=["runs", "has_run"],
)
@pytest.mark.parametrize("stored", [True, False])
async def test_6_01_a_record_that_was_made_by_giving_up_decides_only_where_the_guest_is_not(
    pair: Pair, here: Domain, shown: str, *, stored: bool
) -> None:
    """The destination lost its journal while the guest runs there, or its user has shut it down there since."""
    pair.source.hypervisor.put(PAUSED)
    pair.source.keep(record(Role.SOURCE, "performed"))
    await pair.source.restart()
    pair.destination.hypervisor.put(here)
    giving_up = pb.AbandonRequest(ref=REF, domain_uuid=UUID, source_host="h1")
    gone = await pair.destination.engine.abandon(giving_up)
    assert f"guest web1 {shown}" in gone.record.failure.message
    await fails(pair.source.engine.confirm(confirm(pb.DECISION_GONE)), Reason.UNDECIDED)
    pair.destination.hypervisor.domains.clear()
    if stored:
        pair.destination.hypervisor.put(guest(state=DomainState.SHUTOFF, reason="unknown"))
    await pair.destination.engine.abandon(giving_up)
    answer = await pair.source.engine.confirm(confirm(pb.DECISION_GONE))
    assert state_from_proto(answer.record) == "kept"


# --- the destination reads ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leaves", [True, False])
async def test_6_01_giving_up_what_the_hypervisor_does_not_tell_leaves_nothing_in_memory(pair: Pair, *, leaves: bool) -> None:
    agent = pair.destination
    if leaves:
        agent.hypervisor.held["get_domain"] = asyncio.Event()
    else:
        agent.hypervisor.fails_always["get_domain"] = HypervisorUnavailable("libvirtd is being restarted")
    giving_up = asyncio.create_task(agent.engine.abandon(pb.AbandonRequest(ref=REF, domain_uuid=UUID, source_host="h1")))
    if leaves:
        await until(lambda: "get_domain" in agent.hypervisor.arguments)
        giving_up.cancel()
        await asyncio.wait({giving_up})
    else:
        await fails(giving_up, Reason.HYPERVISOR_UNAVAILABLE)
    assert agent.engine._attempts.all() == []


async def test_6_01_an_armed_copy_is_not_given_up_on_anybodys_word(pair: Pair) -> None:
    pair.wire.all_sent.clear()
    driving = asyncio.create_task(finished(pair.driver()))
    await pair.are("performing", "armed")
    error = await fails(pair.destination.engine.abandon(KEPT), Reason.UNDECIDED)
    assert "performing" in error.message
    stated = pb.AbandonRequest(ref=REF, source_kept=True, statement=statement("h1"))
    await fails(pair.destination.engine.abandon(stated), Reason.NOT_IN_DOUBT)
    pair.wire.all_sent.set()
    await driving
    pair.moved()


async def test_6_01_a_guest_is_not_lost_to_two_claims(pair: Pair) -> None:
    """Otherwise Confirm(RUNNING) here and Abandon(source_kept) there would remove it on both hosts."""
    await stopped(pair)
    await fails(pair.source.engine.confirm(confirm(pb.DECISION_RUNNING)), Reason.UNDECIDED)
    await pair.destination.engine.abandon(KEPT)  # its source is PERFORMED: nothing flows, and the destination itself decides GONE
    answer = await pair.source.engine.confirm(confirm(pb.DECISION_RUNNING))
    assert state_from_proto(answer.record) == "kept"
    assert pair.runs_on == ["h1"]


async def test_6_01_a_relayed_record_of_the_source_counts_where_that_is_out_of_reach(pair: Pair) -> None:
    await stopped(pair)
    pair.to_source.cut = True
    for relayed in (None, source_record("performing"), source_record("kept", host="h3")):
        request = pb.AbandonRequest(ref=REF, source_kept=True, source_record=relayed)
        await fails(pair.destination.engine.abandon(request), Reason.UNDECIDED)
    request = pb.AbandonRequest(ref=REF, source_kept=True, source_record=source_record("kept"))
    assert state_from_proto((await pair.destination.engine.abandon(request)).record) == "gone"


async def test_6_01_a_source_that_was_stopped_before_it_began_lets_the_copy_go(pair: Pair) -> None:
    """Its record names no guest, as no call has named one."""
    pair.destination.hypervisor.put(WAITS)
    pair.destination.keep(record(Role.DESTINATION, "armed"))
    await pair.destination.restart()
    await pair.source.engine.abort(pb.AbortRequest(ref=REF))
    assert state_from_proto((await pair.destination.engine.abandon(KEPT)).record) == "gone"


# --- one id, one migration ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cancelled", [True, False])
async def test_6_01_the_same_id_towards_a_third_host_ends_and_moves_nothing(pair: Pair, cancelled: bool) -> None:
    third = Agent("h2", pair.wire)
    third.engine.host.name = "h3"
    third.other_side = pair.to_source
    first = pair.driver()
    running = asyncio.create_task(finished(first))
    await pair.in_doubt(first)
    again = Driver(REF, pair.to_source, Line(third), make_plan(destination_host="h3"), lambda: None, Bus(), QUICK)
    if cancelled:
        again.view.cancel(CANCELLED)
    await finished(again)
    assert again.view.foreign is not None
    assert again.view.foreign.reason is Reason.MIGRATION_EXISTS
    assert "h2" in again.view.foreign.message
    assert pair.source.journalled == "performed"
    assert third.engine.active() == []
    await third.close()
    pair.wire.starts.set()
    pair.to_destination.cut = False
    await running
    pair.moved()


@pytest.mark.parametrize("address", ["", "10.91.0.66:7400"])
@pytest.mark.parametrize("side", ["source", "destination"])
async def test_6_01_nobody_lends_a_migration_his_own_agent_to_ask(pair: Pair, side: str, address: str) -> None:
    """A caller that begins it first, with everything right except for the address of the other host's agent, decides nothing."""
    if side == "source":
        await pair.source.engine.begin(begin(destination_agent=address))
    else:
        await pair.destination.engine.reserve_slot(reserve(source_agent=address))
    driver = pair.driver()
    await finished(driver)
    assert driver.view.foreign is not None
    assert driver.view.foreign.reason is Reason.MIGRATION_EXISTS
    assert pair.runs_on == ["h1"]
    assert "perform" not in pair.source.effects


OTHERS: dict[str, pb.BeginRequest | pb.ReserveSlotRequest] = {
    "destination": begin(destination_host="h3"),
    "guest": begin(domain="web2"),
    "name": begin(destination_name="web9"),
    "source": reserve(source_host="h3"),
    "agent of the destination": begin(destination_agent="10.91.0.66:7400"),
    "agent of the source": reserve(source_agent="10.91.0.66:7400"),
    "uuid": reserve(requirements=requirements(OTHER_UUID)),
}


@pytest.mark.parametrize("under_way", [False, True])
@pytest.mark.parametrize("what", OTHERS)
async def test_6_01_a_known_id_with_other_content_is_refused(pair: Pair, what: str, *, under_way: bool) -> None:
    """It is refused as another migration (MIGRATION_EXISTS), not with WRONG_PHASE: its driver must stop."""
    if under_way:
        driver = asyncio.create_task(finished(pair.driver()))
        pair.wire.all_sent.clear()
        await pair.are("performing", "armed")
    else:
        await pair.destination.engine.reserve_slot(reserve())
        await pair.source.engine.begin(begin())
    before, other = pair.states, OTHERS[what]
    if isinstance(other, pb.ReserveSlotRequest):
        await fails(pair.destination.engine.reserve_slot(other), Reason.MIGRATION_EXISTS)
    else:
        await fails(pair.source.engine.begin(other), Reason.MIGRATION_EXISTS)
    assert pair.states == before
    if under_way:
        pair.wire.all_sent.set()
        await driver
        pair.moved()


# --- the path -----------------------------------------------------------------------------------------------------------


async def test_6_05_a_path_that_leads_elsewhere_is_refused_before_the_guest_is_touched(pair: Pair) -> None:
    other = await open_responder(ADDRESSES["h1"], (49200, 49215))
    try:
        told = other.add()
        swapped = pb.PathProbe(address=told.address, nonce=PROBE.nonce)
        error = await fails(pair.source.engine.begin(begin(probe=swapped)), Reason.PATH_NOT_PROVED)
        assert "something else answers there" in error.message
    finally:
        other.close()
    closed = await fails(pair.source.engine.begin(begin(probe=told)), Reason.PATH_NOT_PROVED)
    assert "connection refused" in closed.message
    assert pair.source.calls == []


async def test_6_05_a_scope_that_is_no_interface_is_told_in_words() -> None:
    nowhere = pb.PathProbe(address="[fe80::1%99999999999999999999]:5", nonce=PROBE.nonce)
    assert "cannot be reached from this host" in (await fails(prove(nowhere, "h1", "h2"), Reason.PATH_NOT_PROVED)).message


async def test_6_05_a_probe_proves_its_address_until_the_slot_is_used(pair: Pair) -> None:
    h2 = pair.destination
    told = (await h2.engine.reserve_slot(reserve())).probe
    assert (await prove(told, "h1", "h2")).address == ADDRESSES["h2"]
    assert (await h2.engine.reserve_slot(reserve())).probe == told
    await h2.engine.prepare(prepare())
    await until(lambda: not h2.engine._destination._probes._open)
    await fails(prove(told, "h1", "h2"), Reason.PATH_NOT_PROVED)


async def test_6_05_a_slot_outlives_a_restart_and_is_proved_anew(pair: Pair) -> None:
    """The journalled fields are enough for it: cookies are not journalled."""
    h2 = pair.destination
    await h2.engine.reserve_slot(reserve())
    await h2.restart()
    again = await h2.engine.reserve_slot(reserve())
    assert (await prove(again.probe, "h1", "h2")).address == ADDRESSES["h2"]
    answer = await h2.engine.prepare(prepare(again.record.slot.epoch))
    assert state_from_proto(answer.record) == "prepared"


@pytest.mark.parametrize(
    "probe", [{"nonce": b"short"}, {"nonce": b"x" * 65}, {"address": "unix:/tmp/x"}, {"address": "h2:1"}], ids=str
)
async def test_6_05_a_probe_that_is_none_is_refused(pair: Pair, probe: dict[str, object]) -> None:
    wrong = pb.PathProbe(**{"address": PROBE.address, "nonce": PROBE.nonce, **probe})  # type: ignore[arg-type]
    await fails(pair.source.engine.begin(begin(probe=wrong)), Reason.INVALID_FIELD)


async def test_6_05_a_destination_that_was_restarted_before_begin_is_asked_where_it_answers_now(pair: Pair) -> None:
    driver = pair.driver()
    await driver.reserve()
    await pair.destination.restart()
    await finished(driver)
    pair.moved()
    assert pair.to_source.count["begin"] >= 2


async def test_6_05_memory_goes_only_to_an_address_that_was_proved(pair: Pair) -> None:
    source = pair.alone()
    await source.engine.begin(begin(probe=None))
    error = await fails(source.engine.perform(perform()), Reason.PATH_NOT_PROVED)
    assert "stays on h1" in error.message
    assert source.journalled == "begun"


async def test_6_07_memory_goes_only_where_this_attempts_destination_listens(pair: Pair) -> None:
    await pair.destination.engine.reserve_slot(reserve())
    await pair.source.engine.begin(begin())
    await fails(pair.source.engine.perform(perform()), Reason.UNDECIDED)  # its URI is not known yet
    await pair.destination.engine.prepare(prepare())
    uri = (await pair.destination.record()).uri
    error = await fails(pair.source.engine.perform(perform(uri="tcp://127.92.0.2:49199")), Reason.URI_NOT_ALLOWED)
    assert uri in error.message
    assert pair.source.journalled == "begun"


async def test_6_07_a_destination_that_does_not_answer_is_given_up_while_the_driver_still_waits(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the record that the driver relays counts."""
    assert peer_record.READ_SECONDS < QUESTION_SECONDS  # of the driver's call, and of the question to the destination
    monkeypatch.setattr(peer_record, "READ_SECONDS", 0.05)
    await pair.source.engine.begin(begin())
    pair.to_destination.hang.add("get_record")
    await asyncio.wait_for(pair.source.engine.perform(perform()), 5)
    assert pair.source.journalled in ("performing", "performed")


async def test_6_07_a_perform_that_is_refused_keeps_the_guest_at_once(pair: Pair) -> None:
    pair.source.hypervisor.fails["perform"] = [Incompatible("no")]
    await finished(pair.driver())
    assert pair.states == ("kept", "gone")
    assert pair.runs_on == ["h1"]


# --- a call that waits for its turn ----------------------------------------------------------------------------------------


async def waits_for_its_turn(agent: Agent, call: Awaitable[object], until_turn: asyncio.Event) -> "asyncio.Task[object]":
    """Make the call while the journal writes something else, then let that be written."""
    await agent.journal.waiting.wait()
    calling = asyncio.ensure_future(call)
    for _ in range(20):
        await asyncio.sleep(0)
    until_turn.set()
    return calling


async def test_6_07_a_perform_that_comes_while_begin_ends_is_checked_too(pair: Pair) -> None:
    """Its turn comes in another state than that for which it was checked."""
    agent = pair.source
    agent.hypervisor.held["begin"] = begun = asyncio.Event()
    beginning = asyncio.create_task(agent.engine.begin(begin()))
    await until(lambda: agent.journalled == "beginning")
    agent.journal.held = written = asyncio.Event()
    begun.set()
    elsewhere = perform(uri="tcp://127.92.0.9:49152", destination_record=None)
    await fails(await waits_for_its_turn(agent, agent.engine.perform(elsewhere), written), Reason.WRONG_PHASE)
    await beginning
    assert agent.journalled == "begun"
    await fails(agent.engine.perform(elsewhere), Reason.PATH_NOT_PROVED)


async def test_6_01_a_claim_that_comes_while_the_copy_is_armed_is_checked_too(pair: Pair) -> None:
    agent = pair.destination
    agent.keep(record(Role.DESTINATION, "prepared"))
    agent.hypervisor.put(WAITS)
    await agent.engine.close()
    agent.engine = agent._engine()
    await agent.record()
    agent.hypervisor.wire.all_sent.clear()
    agent.journal.held = written = asyncio.Event()
    finishing = asyncio.create_task(agent.engine.finish(pb.FinishRequest(ref=REF)))
    await fails(await waits_for_its_turn(agent, agent.engine.abandon(KEPT), written), Reason.WRONG_PHASE)
    await finishing
    await fails(agent.engine.abandon(KEPT), Reason.UNDECIDED)
    assert agent.journalled == "armed"
