"""agent.handshake.host.engine: restarts, silence, leases, a hypervisor that is away, and copies that were disowned."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from agent.handshake.host.records import Role, state_from_proto
from agent.hypervisor.base import Domain, DomainState, HypervisorUnavailable, Job, TransferFailed
from agent.hypervisor.wire import domain_to_proto
from agent.runtime.errors import Reason
from drover.agent.v1 import handshake_pb2 as pb
from drover.agent.v1 import host_pb2
from tests.unit.asking import ID, PATIENCE, REF, begin, confirm, fails, finish, perform, prepare, record, reserve, until
from tests.unit.fake_hypervisor import UUID, guest
from tests.unit.two_agents import Agent, Pair, pair_of_agents

AWAY = HypervisorUnavailable("libvirtd is being restarted")
RUNNING, GONE = confirm(pb.DECISION_RUNNING), confirm(pb.DECISION_GONE)

RUNS = guest()
PAUSED = guest(state=DomainState.PAUSED, reason="migration")
DEAD = guest(state=DomainState.SHUTOFF, reason="crashed")
WAITS = guest(state=DomainState.PAUSED, reason="migration", job=Job.INCOMING, incoming=True)
ARRIVED_PAUSED = guest(state=DomainState.PAUSED, reason="user")


@pytest.fixture
def pair(pair: Pair) -> Pair:
    """A pair without a guest."""
    pair.source.hypervisor.domains.clear()
    return pair


async def restarted(agent: Agent, role: Role, state: str, fact: Domain | None, **fields: Any) -> None:
    agent.keep(record(role, state, **fields))
    if fact is not None:
        agent.hypervisor.put(fact)
    await agent.restart()


# --- restart from each state, with each fact --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "fact", "end", "effects"),
    [
        ("beginning", RUNS, "kept", []),
        ("begun", RUNS, "kept", []),
        ("begun", None, "kept", []),
        ("performing", RUNS, "kept", ["settle"]),
        ("performing", PAUSED, "performed", ["settle"]),
        ("performed", PAUSED, "performed", []),
        ("removing", PAUSED, "removed", ["remove"]),
        ("removing", None, "removed", ["remove"]),
        ("resuming", PAUSED, "kept", ["resume"]),
        ("resuming", RUNS, "kept", ["resume"]),
    ],
)
async def test_a_source_goes_on_after_a_restart(pair: Pair, state: str, fact: Domain | None, end: str, effects: list[str]) -> None:
    agent = pair.source
    await restarted(agent, Role.SOURCE, state, fact)
    await agent.reaches(end)
    assert agent.effects == effects
    assert (agent.engine.active() == []) == (end in ("kept", "removed"))


@pytest.mark.parametrize("fact", [DEAD, None])
async def test_a_source_whose_guest_died_is_never_kept(pair: Pair, fact: Domain | None) -> None:
    """The copy at the destination may run, so only the destination's record decides."""
    agent = pair.source
    await restarted(agent, Role.SOURCE, "performing", fact)
    await agent.reaches("performed", "lost")
    assert "resume" not in agent.effects
    assert "remove" not in agent.effects


async def test_a_source_whose_guest_died_and_that_has_no_copy_says_so(pair: Pair) -> None:
    agent = pair.source
    await restarted(agent, Role.SOURCE, "resuming", None)
    ended = await agent.reaches("kept")
    assert ended.failure.reason == Reason.DOMAIN_NOT_FOUND
    assert ended.guest.state == pb.GUEST_STATE_ABSENT


@pytest.mark.parametrize(
    ("state", "fact", "end", "effects"),
    [
        ("reserved", None, "reserved", []),
        ("preparing", None, "gone", ["abandon"]),
        ("preparing", WAITS, "gone", ["abandon"]),
        ("prepared", WAITS, "gone", ["abandon"]),
        ("prepared", None, "gone", ["abandon"]),
        ("armed", RUNS, "running", []),
        ("armed", ARRIVED_PAUSED, "running", []),
        ("abandoning", WAITS, "gone", ["abandon"]),
        ("abandoning", None, "gone", ["abandon"]),
        ("abandoning", RUNS, "running", ["abandon"]),
    ],
)
async def test_a_destination_goes_on_after_a_restart(
    pair: Pair, state: str, fact: Domain | None, end: str, effects: list[str]
) -> None:
    agent = pair.destination
    await restarted(agent, Role.DESTINATION, state, fact)
    await agent.reaches(end)
    assert agent.effects == effects
    assert (UUID in agent.hypervisor.domains) == (end == "running")
    assert agent.in_use == (1 if end == "reserved" else 0)


async def test_an_armed_copy_without_a_process_is_gone(pair: Pair) -> None:
    await restarted(pair.destination, Role.DESTINATION, "armed", None)
    await pair.destination.reaches("gone")


async def test_an_armed_copy_that_waits_is_waited_for_after_a_restart(pair: Pair) -> None:
    agent = pair.destination
    await restarted(agent, Role.DESTINATION, "armed", WAITS)
    await asyncio.sleep(0.05)
    assert state_from_proto(await agent.record()) == "armed"
    assert agent.effects == []
    await fails(agent.engine.abandon(pb.AbandonRequest(ref=REF)), Reason.WRONG_PHASE)
    agent.hypervisor.put(RUNS)
    await agent.reaches("running")


async def test_a_job_that_goes_on_without_its_agent_is_followed_to_its_end(pair: Pair) -> None:
    agent = pair.source
    await restarted(agent, Role.SOURCE, "performing", guest(job=Job.OUTGOING))
    await asyncio.sleep(0.05)
    assert state_from_proto(await agent.record()) == "performing"
    assert "settle" not in agent.effects
    agent.hypervisor.put(PAUSED)
    await agent.reaches("performed")


async def test_a_job_can_be_aborted_after_a_restart(pair: Pair) -> None:
    agent = pair.source
    await restarted(agent, Role.SOURCE, "performing", guest(job=Job.OUTGOING))
    aborting = asyncio.create_task(agent.engine.abort(pb.AbortRequest(ref=REF)))
    await until(lambda: "abort" in agent.effects)
    agent.hypervisor.put(RUNS)
    assert state_from_proto((await aborting).record) == "kept"


async def test_what_has_ended_is_not_touched_by_a_restart(pair: Pair) -> None:
    await restarted(pair.source, Role.SOURCE, "removed", None)
    await restarted(pair.destination, Role.DESTINATION, "running", RUNS)
    assert pair.source.calls == pair.destination.calls == []
    assert state_from_proto(await pair.source.record()) == "removed"


async def test_an_attempt_that_has_not_ended_is_found_behind_any_number_that_have(pair: Pair) -> None:
    """A guest may wait for an operator for days, while its host does a thousand other migrations."""
    agent = pair.source
    agent.keep(record(Role.SOURCE, "performed", updated=1.0))
    agent.hypervisor.put(PAUSED)
    for number in range(1001):
        agent.keep(record(Role.SOURCE, "removed", updated=10.0 + number).changed(migration_id=f"m{number}"))
    await agent.restart()
    assert [attempt.record.migration_id for attempt in agent.engine.active()] == [ID]


async def test_6_6_an_epoch_is_never_given_twice(pair: Pair) -> None:
    """Not after a restart either, nor for another attempt of the same migration."""
    agent = pair.destination
    first = (await agent.engine.reserve_slot(reserve())).record.slot.epoch
    await agent.engine.abandon(pb.AbandonRequest(ref=REF))
    await agent.restart()
    again = pb.AttemptRef(migration_id=ID, attempt=2)
    second = (await agent.engine.reserve_slot(reserve(ref=again))).record.slot.epoch
    assert second > first
    await fails(agent.engine.prepare(prepare(epoch=first, ref=again)), Reason.STALE_LEASE)


async def test_6_19_what_never_took_place_says_nothing_of_how_long_a_slot_is_held(pair: Pair) -> None:
    """Such as tombstones, and slots that were given back at once: any caller can make as many as it likes."""
    agent = pair.destination
    for number in range(30):
        ref = pb.AttemptRef(migration_id=f"m{number}", attempt=1)
        if number % 2:
            await agent.engine.reserve_slot(reserve(ref=ref))
        await agent.engine.abandon(pb.AbandonRequest(ref=ref))
    for number in range(agent.slots):
        taken = reserve(ref=pb.AttemptRef(migration_id=f"taken{number}", attempt=1))
        taken.requirements.uuid, taken.requirements.name = f"uuid{number}", f"guest{number}"
        await agent.engine.reserve_slot(taken)
    busy = await fails(agent.engine.reserve_slot(reserve()), Reason.BUSY)
    assert busy.retry_after == pytest.approx(5.0, abs=1.0)


# --- silence ----------------------------------------------------------------------------------------------------------


@pytest.fixture
async def brief() -> AsyncIterator[Pair]:
    """Leases and take-over after 300 ms: long enough for a few calls on a busy machine."""
    async with pair_of_agents(lease=0.3, takeover=0.3) as pair:
        yield pair


async def test_a_lock_that_nobody_asks_about_is_let_go(brief: Pair) -> None:
    await brief.source.engine.begin(begin())
    ended = await brief.source.reaches("kept")
    assert ended.failure.reason == Reason.DRIVER_SILENT
    assert brief.source.effects == ["begin"]
    await until(lambda: brief.source.hypervisor.closed_sessions == 1)


@pytest.mark.parametrize("driver", ["", "begin", "another", "driver-1"])
async def test_6_6_a_watch_of_somebody_else_keeps_no_silent_driver_unnoticed(brief: Pair, driver: str) -> None:
    await brief.source.engine.begin(begin(request_id="driver-1"))
    async with asyncio.timeout(PATIENCE):
        last = [r.record async for r in brief.source.engine.watch_record(pb.WatchRecordRequest(ref=REF, driver=driver))][-1]
    assert last.failure.reason == Reason.DRIVER_SILENT


async def test_6_6_a_driver_that_watches_is_not_silent(brief: Pair) -> None:
    """Its watch started before Begin was accepted; its id counts from then on."""
    agent = brief.source
    held = agent.hypervisor.held["begin"] = asyncio.Event()
    beginning = asyncio.create_task(agent.engine.begin(begin(request_id="driver-1")))
    await until(lambda: agent.journalled == "beginning")
    seen: list[str] = []

    async def watch() -> None:
        async for response in agent.engine.watch_record(pb.WatchRecordRequest(ref=REF, driver="driver")):
            seen.append(state_from_proto(response.record))  # noqa: PERF401 - looked at as they come

    watching = asyncio.create_task(watch())
    await until(lambda: seen == ["beginning"])
    held.set()
    await beginning
    await asyncio.sleep(0.6)  # twice the take-over time
    assert agent.journalled == "begun"
    watching.cancel()
    await asyncio.wait({watching})
    assert (await agent.reaches("kept")).failure.reason == Reason.DRIVER_SILENT


async def test_a_lock_that_comes_late_is_let_go_too(brief: Pair) -> None:
    """The caller went away during a Begin that takes longer than the take-over time."""
    agent = brief.source
    held = agent.hypervisor.held["begin"] = asyncio.Event()
    leaving = asyncio.create_task(agent.engine.begin(begin()))
    await until(lambda: agent.effects)
    leaving.cancel()
    await asyncio.sleep(2 * agent.takeover)
    held.set()
    await agent.reaches("kept")


async def test_a_transfer_whose_driver_is_silent_is_taken_over_once_it_is(brief: Pair) -> None:
    brief.wire.all_sent.clear()
    agent = brief.alone()
    begun = await agent.engine.begin(begin())
    assert begun.domain_xml
    await agent.engine.perform(perform())
    taken = await asyncio.wait_for(agent.taken_over.get(), PATIENCE)
    assert taken.record.state == "performing"
    assert agent.journalled == "performing"


async def test_a_driver_that_asks_in_time_is_not_silent(brief: Pair) -> None:
    agent = brief.alone()
    await agent.engine.begin(begin())
    waiting = asyncio.create_task(agent.engine.perform(perform(wait={"nanos": 900_000_000})))
    brief.wire.all_sent.clear()
    await waiting  # three times the take-over time
    assert agent.taken_over.empty()
    await asyncio.wait_for(agent.taken_over.get(), PATIENCE)


@pytest.mark.parametrize("state", ["reserved", "prepared"])
async def test_a_slot_that_nobody_asks_about_is_free_again(brief: Pair, state: str) -> None:
    agent = brief.destination
    await agent.engine.reserve_slot(reserve())
    if state == "prepared":
        await agent.engine.prepare(prepare())
    ended = await agent.reaches("gone")
    assert ended.failure.reason == Reason.LEASE_EXPIRED
    assert agent.in_use == 0
    assert agent.hypervisor.domains == {}


async def test_a_lease_that_was_read_from_the_journal_ends_too(brief: Pair) -> None:
    await restarted(brief.destination, Role.DESTINATION, "reserved", None)
    assert (await brief.destination.reaches("gone")).failure.reason == Reason.LEASE_EXPIRED


async def test_no_lease_ends_an_armed_copy_and_the_source_is_asked(brief: Pair) -> None:
    brief.wire.all_sent.clear()
    agent = brief.destination
    await agent.engine.reserve_slot(reserve())
    await brief.source.engine.begin(begin())
    await agent.engine.prepare(prepare())
    await brief.source.engine.perform(perform())
    await agent.engine.finish(finish())
    await until(lambda: brief.to_source.count["get_record"] >= 2)  # it runs there: asked again
    assert agent.journalled == "armed"
    brief.to_source.cut = True
    asked = brief.to_source.count["get_record"]
    await until(lambda: brief.to_source.count["get_record"] > asked)
    assert agent.journalled == "armed"
    brief.to_source.cut = False
    await brief.source.engine.abort(pb.AbortRequest(ref=REF))
    assert brief.source.journalled == "kept"
    await agent.reaches("gone")


async def test_6_08_an_armed_copy_does_not_wait_for_a_source_that_keeps_no_record(brief: Pair) -> None:
    """The record was trimmed. While a job holds the guest at the source, or has left it paused, the memory may still come."""
    source, agent = brief.source, brief.destination
    agent.hypervisor.put(WAITS)
    agent.keep(record(Role.DESTINATION, "armed"))
    source.hypervisor.put(guest(job=Job.OUTGOING))
    await agent.restart()
    await until(lambda: brief.to_source.count["get_domain"] >= 2)
    assert agent.journalled == "armed"
    source.hypervisor.put(guest(state=DomainState.PAUSED, reason="migration"))
    asked = brief.to_source.count["get_domain"]
    await until(lambda: brief.to_source.count["get_domain"] >= asked + 2)
    assert agent.journalled == "armed"
    source.hypervisor.put(guest())
    ended = await agent.reaches("gone")
    assert "h1 has no record" in ended.failure.message
    assert brief.runs_on == ["h1"]


@pytest.mark.parametrize("other", ["host", "guest"])
async def test_6_08_who_else_answers_there_gives_no_copy_up(brief: Pair, other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another agent has got the source's address; or another guest has the UUID as its name."""
    source, agent = brief.source, brief.destination
    if other == "host":
        monkeypatch.setattr(source, "name", "h9")
    else:
        another = host_pb2.GetDomainResponse(domain=domain_to_proto(guest(uuid="8b2f4f7e-0d5c-4a57-9c55-3c1f5a9e0002", name=UUID)))

        async def get_domain(_: object) -> host_pb2.GetDomainResponse:
            brief.to_source.count["get_domain"] += 1
            return another

        monkeypatch.setattr(brief.to_source, "get_domain", get_domain)
    agent.hypervisor.put(WAITS)
    agent.keep(record(Role.DESTINATION, "armed"))
    await agent.restart()
    await until(lambda: brief.to_source.count["get_domain"] >= 2)
    assert agent.journalled == "armed"


# --- a hypervisor that is away ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("journal", ["good", "bad"])
async def test_a_source_asks_until_its_hypervisor_answers(pair: Pair, journal: str) -> None:
    agent = pair.source
    agent.hypervisor.fails_always["get_domain"] = AWAY
    if journal == "bad":
        agent.journal.down = lambda record: True
    await restarted(agent, Role.SOURCE, "performing", PAUSED)
    if journal == "bad":
        await until(lambda: agent.journal.refused)
        agent.journal.down = lambda record: False
    await until(lambda: "does not answer" in agent.engine.active()[0].record.waiting_for)
    assert agent.journalled == "performing"
    del agent.hypervisor.fails_always["get_domain"]
    ended = await agent.reaches("performed")
    await until(lambda: not agent.engine.active()[0].record.waiting_for)
    assert ended.revision > 5


@pytest.mark.parametrize("journal", ["good", "bad"])
async def test_a_destination_asks_until_its_hypervisor_answers(pair: Pair, journal: str) -> None:
    agent = pair.destination
    agent.hypervisor.fails_always["get_domain"] = AWAY
    if journal == "bad":
        agent.journal.down = lambda record: True
    await restarted(agent, Role.DESTINATION, "armed", RUNS)
    if journal == "bad":
        await until(lambda: agent.journal.refused)
        agent.journal.down = lambda record: False
    await until(lambda: "does not answer" in agent.engine.active()[0].record.waiting_for)
    del agent.hypervisor.fails_always["get_domain"]
    await agent.reaches("running")


async def test_a_finish_without_an_answer_is_settled_by_the_facts(pair: Pair) -> None:
    agent = pair.destination
    await agent.engine.reserve_slot(reserve())
    await agent.engine.prepare(prepare())
    agent.hypervisor.fails["finish"] = [AWAY]
    await agent.engine.finish(finish())
    await until(lambda: "Finish gave no answer" in agent.engine.active()[0].record.waiting_for)
    assert agent.effects == ["prepare", "finish"]  # an armed copy is not killed by hand
    agent.hypervisor.put(RUNS)
    await agent.reaches("running")


async def test_a_perform_without_an_answer_is_settled_by_the_facts(pair: Pair) -> None:
    agent = pair.alone()
    agent.hypervisor.put(RUNS)
    await agent.engine.begin(begin())
    agent.hypervisor.fails["perform"] = [AWAY]
    await agent.engine.perform(perform())
    ended = await agent.reaches("kept")
    assert agent.effects == ["begin", "perform", "settle"]
    assert ended.failure.reason == Reason.HYPERVISOR_UNAVAILABLE


@pytest.mark.parametrize(("effect", "end"), [("remove", "removed"), ("resume", "kept")])
async def test_what_must_be_done_is_tried_until_it_is_done(pair: Pair, effect: str, end: str) -> None:
    agent = pair.alone()
    agent.hypervisor.put(RUNS)
    await agent.engine.begin(begin())
    await agent.engine.perform(perform())
    await agent.reaches("performed")
    agent.hypervisor.fails[effect] = [AWAY, TransferFailed("no"), AWAY]
    answer = await agent.engine.confirm(RUNNING if effect == "remove" else GONE)
    assert state_from_proto(answer.record) == end
    assert agent.effects.count(effect) == 4
    assert not answer.record.waiting_for
