"""agent.handshake.drive.driver: silent hosts, operators' statements, several drivers, and a driver that was restarted."""

import asyncio

import pytest

import agent.handshake.drive.driver
from agent.handshake.drive.driver import Driver
from agent.handshake.machines.decide import Call
from agent.runtime.errors import Reason
from agent.runtime.events import Bus
from drover.agent.v1 import handshake_pb2 as pb
from tests.unit.asking import CANCELLED, ID, PATIENCE, REF, begin, finished, make_plan, statement, until
from tests.unit.clocks import QUICK
from tests.unit.two_agents import Line, Pair, pair_of_agents

# --- in doubt ---------------------------------------------------------------------------------------------------------


async def test_the_outcome_is_unknown_while_the_destination_is_silent_and_known_once_it_answers(pair: Pair) -> None:
    driver = pair.driver()
    seen: list[bool] = []
    driver.view._on_change = lambda: seen.append(driver.view.outcome_unknown)
    running = asyncio.create_task(finished(driver))
    await pair.in_doubt(driver)
    assert driver.view.outcome_unknown
    assert pair.runs_on == []
    pair.to_destination.cut = False
    pair.wire.starts.set()
    await running
    assert not driver.view.outcome_unknown
    assert True in seen
    assert seen[-1] is False
    pair.moved()


async def cut_off(pair: Pair) -> tuple[Driver, "asyncio.Task[None]"]:
    """Only the driver loses the destination, after the source has sent everything."""
    driver_line = Line(pair.destination)
    driver = Driver(REF, pair.to_source, driver_line, make_plan(), lambda: None, Bus(), QUICK)
    running = asyncio.create_task(finished(driver))
    pair.wire.all_sent.clear()
    await pair.are("performing", "armed")
    pair.wire.starts.clear()
    driver_line.cut = True
    pair.wire.all_sent.set()
    await until(lambda: driver.view.source_state == "performed" and "destination" in driver.view.silent_since)
    return driver, running


async def test_6_13_a_driver_that_is_cut_off_alone_learns_the_outcome_from_the_source(pair: Pair) -> None:
    driver, running = await cut_off(pair)
    pair.wire.starts.set()
    await running
    pair.moved()
    assert driver.view.states == ("removed", "running")
    assert not driver.view.outcome_unknown


async def test_6_13_a_driver_that_takes_up_learns_from_the_source_alone_that_the_guest_has_left(pair: Pair) -> None:
    await finished(pair.driver())
    pair.to_destination.cut = True
    driver = pair.driver()
    async with asyncio.timeout(PATIENCE):
        await driver.resume()
    await finished(driver)
    assert driver.view.states == ("removed", "running")


async def test_6_12_a_destination_that_its_source_hears_is_not_fenced(pair: Pair) -> None:
    """It is the driver that is cut off; an operator's statement does not count either."""
    driver, running = await cut_off(pair)
    await until(lambda: driver.view.is_reported_alive("destination"))
    assert driver.view.outcome_unknown
    assert driver.view.decisive_side == ""
    assert await driver.answers("destination")
    pair.wire.starts.set()
    await running


async def test_6_01_an_id_that_a_guest_came_by_moves_nothing_on(pair: Pair) -> None:
    """A driver with the id of the migration that brought the guest here gets an error and gives its slot back."""
    await finished(pair.driver())
    async with pair_of_agents() as others:
        third = Line(others.destination)
        third.agent.name = "h2"
        driver = Driver(REF, pair.to_destination, third, make_plan(source_host="h2"), lambda: None, Bus(), QUICK)
        await finished(driver)
        assert driver.view.foreign is not None
        assert driver.view.foreign.reason is Reason.MIGRATION_EXISTS
        assert others.destination.journalled in ("", "gone")


async def test_silence_before_the_guest_has_left_is_no_doubt(pair: Pair) -> None:
    pair.wire.all_sent.clear()
    driver = pair.driver()
    running = asyncio.create_task(finished(driver))
    await pair.are("performing", "armed")
    pair.to_destination.cut = True
    await until(lambda: driver.view.silent_since)
    assert not driver.view.outcome_unknown
    pair.to_source.cut = True
    await until(lambda: len(driver.view.silent_since) == 2)
    assert driver.view.outcome_unknown
    pair.to_source.cut = pair.to_destination.cut = False
    pair.wire.all_sent.set()
    await running
    pair.moved()


async def test_a_dead_destination_lets_the_guest_run_on_and_the_word_is_recorded(pair: Pair) -> None:
    driver = pair.driver()
    running = asyncio.create_task(finished(driver))
    await pair.in_doubt(driver)
    driver.view.declare_dead("destination", statement("h2"))
    assert not driver.view.outcome_unknown
    await running
    assert pair.runs_on == ["h1"]
    assert pair.states == ("kept", "armed")
    said = (await pair.source.record()).statement
    assert (said.dead_host, said.said_by, said.reason) == ("h2", "root@admin1", "power pulled")
    assert (await pair.source.record()).failure.reason == Reason.DECLARED_DEAD


async def test_a_dead_source_ends_an_armed_copy_that_hears_nothing(pair: Pair) -> None:
    pair.wire.all_sent.clear()
    driver = pair.driver()
    running = asyncio.create_task(finished(driver))
    await pair.are("performing", "armed")
    pair.to_source.cut = True
    await until(lambda: "source" in driver.view.silent_since)
    driver.view.declare_dead("source", statement("h1"))
    await running
    record = await pair.destination.record()
    assert pair.states[1] == "gone"
    assert record.statement.dead_host == "h1"
    assert record.failure.reason == Reason.DECLARED_DEAD


async def test_a_dead_source_of_a_guest_that_has_come_is_not_waited_for(pair: Pair) -> None:
    driver = pair.driver()
    pair.to_source.on_call = lambda name: setattr(pair.to_source, "cut", pair.to_source.cut or name == "confirm")
    running = asyncio.create_task(finished(driver))
    await until(lambda: driver.view.destination_state == "running" and "source" in driver.view.silent_since)
    assert not driver.view.outcome_unknown  # the destination's record is RUNNING, whatever the source says
    driver.view.declare_dead("source", statement("h1"))
    await running
    assert driver.view.states == ("removed", "running")


async def test_the_next_answer_of_a_host_refutes_the_word(pair: Pair) -> None:
    driver = pair.driver()
    running = asyncio.create_task(finished(driver))
    await pair.in_doubt(driver)
    pair.to_source.cut = True  # so that the statement has no effect at once
    driver.view.declare_dead("destination", statement("h2"))
    assert driver.view.states[1] == "gone"
    pair.to_destination.cut = False
    await driver._look("destination")
    assert driver.view.states[1] == "armed"
    pair.to_source.cut = False
    pair.wire.starts.set()
    await running
    pair.moved()


async def test_a_host_that_answers_after_all_refutes_the_word_for_good(pair: Pair) -> None:
    """The source is unreachable too, so the statement has had no effect yet. A host that answered is not dead, and later silence
    does not bring the statement back."""
    driver = pair.driver()
    running = asyncio.create_task(finished(driver))
    await pair.in_doubt(driver)
    pair.to_source.cut = True
    driver.view.declare_dead("destination", statement("h2"))
    await until(lambda: "source" in driver.view.silent_since)
    pair.to_destination.cut = False
    await driver._look("destination")
    assert driver.view.destination_state == "armed"
    pair.to_destination.cut = True
    await until(lambda: "destination" in driver.view.silent_since)
    pair.to_source.cut = False
    await asyncio.sleep(0.15)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert pair.states[0] == "performed"
    assert pair.runs_on == []


async def test_both_hosts_can_be_declared_dead(pair: Pair) -> None:
    driver = pair.driver()
    running = asyncio.create_task(finished(driver))
    await pair.in_doubt(driver)
    pair.to_source.cut = True
    driver.view.declare_dead("destination", statement("h2"))
    await until(lambda: "source" in driver.view.silent_since)
    driver.view.declare_dead("source", statement("h1"))
    await running
    assert driver.view.ended


async def test_a_host_that_was_not_dead_is_looked_at_until_it_has_learned_what_was_said(pair: Pair) -> None:
    driver = pair.driver()
    running = asyncio.create_task(finished(driver))
    await pair.in_doubt(driver)
    driver.view.declare_dead("destination", statement("h2"))
    await pair.source.reaches("kept")
    await running
    pair.wire.starts.set()  # it was not dead
    await pair.destination.reaches("running")
    pair.to_destination.cut = False
    again = pair.driver()
    await again.resume()
    looks: list[bool] = []
    again.view._on_change = lambda: looks.append(again.view.disputed)
    running = asyncio.create_task(finished(again))
    await until(lambda: len(looks) > 1)  # it looks again and again
    assert all(looks)
    assert not running.done()
    await pair.destination.restart(settling=True)
    await running
    assert pair.runs_on == ["h1"]
    assert pair.states == ("kept", "gone")


# --- who is silent ----------------------------------------------------------------------------------------------------


async def test_a_host_is_not_blamed_for_the_other_ones_silence(pair: Pair) -> None:
    """The answer to Prepare was lost, so the driver calls it again before Perform: its silence is the destination's."""
    driver = pair.driver()
    pair.to_destination.lose_answer["prepare"] = 1
    blamed: set[str] = set()
    driver.view._on_change = lambda: blamed.update(driver.view.silent_since)

    def cut(name: str) -> None:
        if name == "prepare" and pair.to_destination.count["prepare"] == 2:
            pair.to_destination.lose["prepare"] = 2

    pair.to_destination.on_call = cut
    await finished(driver)
    pair.moved()
    assert blamed == {"destination"}


async def test_an_old_answer_does_not_replace_a_newer_one(pair: Pair) -> None:
    driver = pair.driver()
    await finished(driver)
    old = pb.Record(ref=driver.view.ref, state=pb.RECORD_STATE_ARMED, revision=1)
    driver.view.saw_destination(old)
    assert driver.view.destination_state == "running"


# --- two drivers, and a restart ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("first_sees", [0, 1, 2, 3])
async def test_two_drivers_at_once_move_it_once(pair: Pair, first_sees: int) -> None:
    one, two = pair.driver(), pair.driver()
    running = asyncio.create_task(finished(one))
    for _ in range(first_sees * 15):
        await asyncio.sleep(0)
    await asyncio.gather(running, finished(two))
    pair.moved()
    assert pair.source.effects.count("begin") == pair.destination.effects.count("prepare") == 1


async def test_one_driver_cancels_what_another_one_drives(pair: Pair) -> None:
    pair.wire.all_sent.clear()
    one, two = pair.driver(), pair.driver()
    running = asyncio.create_task(finished(one))
    await pair.are("performing", "armed")
    await two.resume()
    two.view.cancel(CANCELLED)
    await asyncio.gather(running, finished(two))
    pair.stayed()


async def test_a_cancelled_driver_that_missed_the_end_asks_the_destination(pair: Pair) -> None:
    """Another driver has ended the migration while this one was cut off from both hosts and was cancelled."""
    pair.wire.all_sent.clear()
    lonely = pair.driver()
    running = asyncio.create_task(finished(lonely))
    await pair.are("performing", "armed")
    await until(lambda: lonely.view.destination_state == "armed")
    pair.to_source.cut = pair.to_destination.cut = True
    await until(lambda: len(lonely.view.silent_since) == 2)
    lonely.view.cancel(CANCELLED)
    asked = pair.to_destination.count["finish"]
    await asyncio.sleep(0.1)  # the calls under way have failed; only Abort is called now
    assert pair.to_destination.count["finish"] <= asked + 1
    other = Driver(lonely.view.ref, pair.source.engine, pair.destination.engine, None, lambda: None, Bus(), QUICK)
    await other.resume()
    pair.wire.all_sent.set()
    await finished(other)
    pair.to_source.cut = pair.to_destination.cut = False
    calls = sum(pair.to_source.count.values())
    try:
        await running
    finally:
        assert sum(pair.to_source.count.values()) - calls < 40
    pair.moved()
    assert lonely.view.ended


@pytest.mark.parametrize("call", ["begin", "prepare", "perform", "finish", "confirm"])
async def test_a_driver_that_goes_on_from_the_records(pair: Pair, call: str) -> None:
    """The first driver dies as it makes a call; the next has a plan without the guest's requirements, as after a restart."""
    first = pair.driver()
    dying = asyncio.create_task(first.run())
    for line in (pair.to_source, pair.to_destination):
        line.on_call = lambda name: dying.cancel() if name == call else None  # type: ignore[assignment]
    await asyncio.gather(dying, return_exceptions=True)
    for line in (pair.to_source, pair.to_destination):
        line.on_call = lambda name: None
    second = pair.driver(make_plan(requirements=None))
    await second.resume()
    await finished(second)
    pair.moved()


@pytest.mark.parametrize(("call", "end"), [("begin", "stayed"), ("prepare", "stayed"), ("perform", "stayed"), ("finish", "moved")])
async def test_a_take_over_has_no_plan_and_ends_what_has_begun(pair: Pair, call: str, end: str) -> None:
    first = pair.driver()
    dying = asyncio.create_task(first.run())
    for line in (pair.to_source, pair.to_destination):
        line.on_call = lambda name: dying.cancel() if name == call else None  # type: ignore[assignment]
    await asyncio.gather(dying, return_exceptions=True)
    for line in (pair.to_source, pair.to_destination):
        line.on_call = lambda name: None
    second = Driver(first.view.ref, pair.to_source, pair.to_destination, None, lambda: None, Bus(), QUICK)
    await second.resume()
    await finished(second)
    getattr(pair, end)()
    if end == "stayed":
        assert second.view.failure is not None
        assert second.view.failure.reason is Reason.DRIVER_SILENT


async def test_resume_learns_both_sides_though_one_is_silent(pair: Pair) -> None:
    await finished(pair.driver())
    pair.to_source.cut = True
    driver = pair.driver()
    resuming = asyncio.create_task(driver.resume())
    await until(lambda: "source" in driver.view.silent_since)
    try:
        await until(lambda: driver.view.destination_state == "running")
    finally:
        pair.to_source.cut = False
        await resuming
    assert driver.view.ended


async def test_resume_goes_on_without_a_host_that_is_declared_dead(pair: Pair) -> None:
    await finished(pair.driver())
    pair.to_source.cut = True
    driver = pair.driver()
    resuming = asyncio.create_task(driver.resume())
    await until(lambda: "source" in driver.view.silent_since)
    driver.view.declare_dead("source", statement("h1"))
    await asyncio.wait_for(resuming, PATIENCE)
    assert driver.view.ended


async def test_6_10_a_lease_ends_no_transfer_though_the_driver_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Finish never arrives, so the destination stays prepared; it asks its source, which is sending."""
    monkeypatch.setattr(agent.handshake.drive.driver, "FOLLOW_AFTER", 1000.0)  # as if the watch had ended with the link
    async with pair_of_agents(lease=0.4) as pair:
        pair.wire.all_sent.clear()
        line = Line(pair.destination)
        driver = Driver(REF, pair.to_source, line, make_plan(), lambda: None, Bus(), QUICK)
        line.on_call = lambda name: setattr(line, "cut", line.cut or name == "finish")
        running = asyncio.create_task(finished(driver))
        await pair.are("performing", "prepared")
        asked = pair.to_source.count["get_record"]
        await until(lambda: pair.to_source.count["get_record"] >= asked + 3)
        assert pair.states == ("performing", "prepared")
        line.on_call = lambda name: None
        line.cut = False
        pair.wire.all_sent.set()
        await running
        pair.moved()


async def test_a_lease_ends_a_copy_whose_source_does_not_send() -> None:
    async with pair_of_agents(lease=0.4) as pair:
        driver = pair.driver()
        pair.to_source.hang = {"perform"}
        running = asyncio.create_task(driver.run())
        await pair.are("begun", "prepared")
        running.cancel()
        await asyncio.wait({running})
        await pair.are("begun", "gone")


async def test_7_an_attempt_that_a_later_one_has_overtaken_ends(pair: Pair) -> None:
    """Somebody else began a later attempt at the source, which therefore takes no call of this one, and has no record of it."""
    later = pb.AttemptRef(migration_id=ID, attempt=2)
    await pair.source.engine.begin(begin(ref=later))
    await pair.source.engine.abort(pb.AbortRequest(ref=later))
    await pair.source.reaches("kept", ref=later)
    driver = pair.driver()
    await finished(driver)
    assert driver.view.failure is not None
    assert (driver.view.failure.reason, driver.view.overtaken) == (Reason.STALE_ATTEMPT, {"source"})
    await pair.destination.reaches("gone")


async def test_7_a_call_that_is_not_made_says_nothing_about_the_host(pair: Pair) -> None:
    """A driver without a plan cannot reserve: that is no answer of the destination, which is as silent as before."""
    pair.to_destination.cut = True
    driver = Driver(REF, pair.to_source, pair.to_destination, None, lambda: None, Bus(), QUICK)
    driver.view.silent_since["destination"] = 1.0
    driver.view.declare_dead("destination", statement("h2"))
    await driver._make(Call.RESERVE)
    assert "destination" in driver.view.silent_since
    assert "destination" in driver.view.statements
