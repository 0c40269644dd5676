"""agent.handshake.drive.driver: one attempt over two peers, whatever the lines between them do."""

import asyncio

import pytest

import agent.handshake.drive.driver as driver_module
import agent.handshake.host.destination_side
from agent.handshake.drive.driver import Driver
from agent.handshake.machines.destination import DestinationState
from agent.handshake.machines.source import SourceState
from agent.runtime.errors import DroverError, Reason
from agent.runtime.events import Bus
from agent.runtime.failure import Failure
from drover.agent.v1 import handshake_pb2 as pb
from drover.agent.v1 import migration_pb2
from tests.unit.asking import CANCELLED, REF, fails, finished, make_plan, until
from tests.unit.clocks import FakeClock
from tests.unit.two_agents import Pair

CALLS = ("reserve_slot", "begin", "prepare", "perform", "finish", "confirm")


# --- the way it should go ---------------------------------------------------------------------------------------------


async def test_a_full_run_and_each_cookie_reaches_its_phase(pair: Pair) -> None:
    driver = pair.driver(make_plan(settings=migration_pb2.MigrationSettings(bandwidth_bytes_per_second=1000)))
    await finished(driver)
    pair.moved()
    assert driver.view.ended
    assert not driver.view.outcome_unknown
    assert driver.view.uri == "tcp://127.92.0.2:49152"
    assert pair.destination.hypervisor.arguments["prepare"][1] == b"begun"
    uri, _, cookie, *_, bandwidth, _ = pair.source.hypervisor.arguments["perform"]
    assert (uri, cookie, bandwidth) == (driver.view.uri, b"prepared", 1000)
    assert pair.source.hypervisor.arguments["remove"][0] == b"finished"


async def test_the_slot_comes_first_and_finish_is_armed_while_the_memory_flows(pair: Pair) -> None:
    pair.wire.all_sent.clear()
    running = asyncio.create_task(finished(pair.driver()))
    await pair.are("performing", "armed")
    assert pair.runs_on == ["h1"]
    assert pair.to_destination.count["reserve_slot"] == 1
    pair.wire.all_sent.set()
    await running
    pair.moved()


async def test_the_driver_tells_every_change(pair: Pair) -> None:
    seen: list[tuple[SourceState | None, DestinationState | None]] = []
    driver = pair.driver(on_change=lambda: seen.append(driver.view.states))
    await finished(driver)
    sources = [list(SourceState).index(src) for src, _ in seen if src]
    assert sources == sorted(sources)
    assert seen[-1] == ("removed", "running")


# --- refusals ---------------------------------------------------------------------------------------------------------


async def test_a_refused_reservation_is_the_callers_answer_and_changed_nothing(pair: Pair) -> None:
    pair.destination.hypervisor.problems = ["no such CPU"]
    driver = pair.driver()
    error = await fails(driver.reserve(), Reason.INCOMPATIBLE_GUEST)
    assert "no such CPU" in error.message
    assert pair.to_destination.count == {"reserve_slot": 1}
    assert not pair.to_source.count
    assert not pair.destination.engine.active()


@pytest.mark.parametrize("call", ["reserve_slot", "begin", "prepare", "perform"])
async def test_a_refusal_before_the_memory_flows_ends_it_with_that_reason(pair: Pair, call: str) -> None:
    line = pair.to_source if call in ("begin", "perform") else pair.to_destination
    line.refuse[call] = [DroverError(Reason.HYPERVISOR_FAILED, "it will not")] * 9
    driver = pair.driver()
    await finished(driver)
    pair.stayed()
    assert driver.view.failure is not None
    assert driver.view.failure.reason is Reason.HYPERVISOR_FAILED
    assert "perform" not in pair.source.effects


@pytest.mark.parametrize(
    "uri", ["tcp://10.66.6.6:49152", "tcp://127.92.0.2:22", "unix:///tmp/x", "tcp://127.92.0.2", "tcp://h2:49152"]
)
async def test_a_destination_that_points_elsewhere_is_not_believed(pair: Pair, uri: str) -> None:
    def lie(answer: pb.PrepareResponse) -> pb.PrepareResponse:
        answer.uri_out = uri
        return answer

    pair.to_destination.answer["prepare"] = lie
    driver = pair.driver()
    await finished(driver)
    pair.stayed()
    assert driver.view.failure is not None
    assert driver.view.failure.reason is Reason.URI_NOT_ALLOWED
    assert "perform" not in pair.source.effects


async def test_a_copy_that_takes_longer_than_a_call_is_waited_for(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent.handshake.host.destination_side, "MAX_WAIT", 0.2)
    pair.destination.hypervisor.held["prepare"] = asyncio.Event()
    driver = pair.driver()
    running = asyncio.create_task(finished(driver))
    await until(lambda: pair.to_destination.count["prepare"] == 3)
    assert driver.view.uri == ""
    pair.destination.hypervisor.held["prepare"].set()
    await running
    pair.moved()
    assert driver.view.failure is None
    assert pair.to_destination.count["prepare"] <= 4  # each has waited, so it was not asked in a loop


# --- lost calls and lost answers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("loss", ["call", "answer"])
async def test_one_lost_message_changes_nothing(pair: Pair, call: str, loss: str) -> None:
    line = pair.to_source if call in ("begin", "perform", "confirm") else pair.to_destination
    (line.lose if loss == "call" else line.lose_answer)[call] = 1
    driver = pair.driver()
    await finished(driver)
    pair.moved()
    assert driver.view.failure is None
    # A watch may tell that the guest runs, and all be over, before a lost answer to Finish is made up for.
    assert not driver.view.silent_since or (call, loss) == ("finish", "answer")
    assert line.count[call] >= 2 or loss == "answer"
    assert pair.source.hypervisor.arguments["remove"][0] == b"finished" or (call, loss) == ("finish", "answer")


async def test_every_first_call_and_every_first_answer_is_lost(pair: Pair) -> None:
    for line in (pair.to_source, pair.to_destination):
        for call in (*CALLS, "get_record"):
            line.lose[call] = line.lose_answer[call] = 1
    await finished(pair.driver())
    pair.moved()


async def test_an_outage_is_no_busy_loop(pair: Pair) -> None:
    clock = FakeClock()
    driver = Driver(REF, pair.to_source, pair.to_destination, make_plan(), lambda: None, Bus(), clock)
    pair.to_destination.cut = True
    running = asyncio.create_task(finished(driver))
    await until(lambda: pair.to_destination.count["reserve_slot"] > 10)
    assert sum(pair.to_destination.count.values()) <= 2 * len(clock.slept) + 2  # a call and a look after each pause
    assert "does not answer" in driver.view.waiting_for
    pair.to_destination.cut = False
    await running
    pair.moved()


@pytest.mark.parametrize(("side", "call"), [("source", "begin"), ("destination", "prepare")])
async def test_patience_ends_before_the_transfer_is_asked_for(
    pair: Pair, side: str, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver_module, "PATIENCE", 0.1)
    driver = pair.driver()
    line = pair.to_source if side == "source" else pair.to_destination
    line.on_call = lambda name: setattr(line, "cut", True) if name == call else None
    running = asyncio.create_task(finished(driver))
    await until(lambda: driver.view.cancelling)
    assert driver.view.failure is not None
    assert driver.view.failure.reason is Reason.HOST_UNREACHABLE
    line.on_call = lambda name: None
    line.cut = False
    await running
    pair.stayed()


@pytest.mark.parametrize("side", ["source", "destination"])
async def test_6_10_silence_cancels_nothing_while_memory_flows(pair: Pair, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver_module, "PATIENCE", 0.05)
    pair.wire.all_sent.clear()
    driver = pair.driver()
    running = asyncio.create_task(finished(driver))
    await pair.are("performing", "armed")
    line = pair.to_source if side == "source" else pair.to_destination
    line.cut = True
    await until(lambda: driver.view.silent_for(side) > 0.1)
    assert not driver.view.cancelling
    assert "does not answer" in driver.view.waiting_for
    line.cut = False
    await until(lambda: not driver.view.silent_since)
    pair.wire.all_sent.set()
    await running
    pair.moved()


async def test_6_10_a_transfer_that_may_have_begun_is_not_cancelled(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer to Perform is lost with the link to the source, so the driver knows it as begun only."""
    monkeypatch.setattr(driver_module, "PATIENCE", 0.05)
    pair.wire.all_sent.clear()
    driver = pair.driver()
    line = pair.to_source
    line.on_call = lambda name: setattr(line, "is_cut", lambda: True) if name == "perform" else None
    running = asyncio.create_task(finished(driver))
    await until(lambda: driver.view.silent_for("source") > 0.1)
    assert driver.view.source_state == "begun"
    assert pair.states[0] == "performing"
    assert not driver.view.cancelling
    line.on_call = lambda name: None
    line.is_cut = lambda: line.cut  # type: ignore[method-assign]
    pair.wire.all_sent.set()
    await running
    pair.moved()


async def test_no_patience_ends_once_the_guest_has_left(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver_module, "PATIENCE", 0.05)
    driver = pair.driver()
    running = asyncio.create_task(finished(driver))
    await pair.in_doubt(driver)
    await asyncio.sleep(0.1)
    assert not driver.view.cancelling
    pair.to_destination.cut = False
    pair.wire.starts.set()
    await running
    pair.moved()


# --- cancel -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["reserve_slot", "begin", "prepare", "perform", "finish"])
async def test_cancel_in_each_phase_keeps_the_guest(pair: Pair, call: str) -> None:
    pair.wire.all_sent.clear()
    driver = pair.driver()
    for line in (pair.to_source, pair.to_destination):
        line.on_call = lambda name: driver.view.cancel(CANCELLED) if name == call else None
    await finished(driver)
    pair.stayed()
    assert driver.view.failure == CANCELLED


async def test_cancel_that_comes_too_late_says_so_by_the_records(pair: Pair) -> None:
    driver = pair.driver()
    pair.to_source.on_call = lambda name: driver.view.cancel(CANCELLED) if name == "confirm" else None
    await finished(driver)
    pair.moved()


async def test_cancel_before_the_first_call(pair: Pair) -> None:
    driver = pair.driver()
    driver.view.cancel(CANCELLED)
    await finished(driver)
    assert pair.states == ("kept", "gone")
    assert pair.source.effects == pair.destination.effects == []


async def test_an_armed_copy_is_given_up_only_after_the_source_has_kept_the_guest(pair: Pair) -> None:
    pair.wire.all_sent.clear()
    driver = pair.driver()
    running = asyncio.create_task(finished(driver))
    await pair.are("performing", "armed")
    at_abandon: list[str] = []
    pair.to_destination.on_call = lambda name: at_abandon.append(pair.source.journalled) if name == "abandon" else None
    driver.view.cancel(CANCELLED)
    await running
    pair.stayed()
    assert set(at_abandon) <= {"kept"}


async def test_the_first_reason_to_stop_is_kept(pair: Pair) -> None:
    driver = pair.driver()
    driver.view.cancel(CANCELLED)
    driver.view.cancel(Failure(Reason.HOST_UNREACHABLE, "later"))
    assert driver.view.failure == CANCELLED


async def test_cancelling_run_leaves_no_task_and_changes_nothing(pair: Pair) -> None:
    pair.wire.all_sent.clear()
    before = asyncio.all_tasks()
    driver = pair.driver()
    running = asyncio.create_task(driver.run())
    await pair.are("performing", "armed")
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await asyncio.sleep(0)
    left = [task.get_name() for task in asyncio.all_tasks() - before]
    assert not [name for name in left if name.split()[-1] in ("perform", "finish", "follow") and len(name.split()) == 2], left
    assert pair.states == ("performing", "armed")
    pair.wire.all_sent.set()
    await pair.destination.reaches("running")
    another = pair.driver()
    await another.resume()
    await finished(another)
    pair.moved()
