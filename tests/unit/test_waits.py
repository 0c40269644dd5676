"""agent.handshake.host.waits: what a transfer waits for, why, and until when (issue 6, line 8)."""

import asyncio

import pytest

from agent.handshake.host import attempt as attempts
from agent.handshake.host import waits
from agent.handshake.host.waits import Flow, nobody_answers, stands_still
from agent.runtime.errors import DroverError, Reason
from agent.transfer.progress import Progress
from drover.agent.v1 import handshake_pb2 as pb
from drover.agent.v1 import host_pb2
from tests.unit.asking import CANCELLED, REF, finished, until
from tests.unit.fake_hypervisor import guest
from tests.unit.two_agents import Agent, Pair

STOPPED = "the QEMU of web1 (process 7) is stopped; `kill -CONT 7` lets it continue"


async def told(agent: Agent, *parts: str) -> pb.Record:
    """Return the agent's record once its `waiting_for` has all parts; without parts, once `waiting_for` is empty."""
    await until(lambda: bool(agent.journalled))
    async with asyncio.timeout(10):
        async for response in agent.engine.watch_record(pb.WatchRecordRequest(ref=REF)):
            waits_for = response.record.waiting_for
            if all(part in waits_for for part in parts) and bool(parts) == bool(waits_for):
                return response.record
    raise AssertionError("it ended, and never said so")


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waits, "PROGRESS_SECONDS", 0.02)
    monkeypatch.setattr(waits, "STALL_SECONDS", 0.1)
    monkeypatch.setattr(attempts, "REPORT_AFTER_SECONDS", 0.1)


def test_6_8_a_flow_is_idle_from_the_last_byte_on() -> None:
    now = 0.0
    flow = Flow(lambda: now)
    now = 3.0
    assert flow.idle == 3.0, "nothing was ever sent"
    flow.saw(Progress(processed_bytes=10))
    now = 5.0
    flow.saw(Progress(processed_bytes=10))
    assert flow.idle == 2.0
    flow.saw(Progress(processed_bytes=11))
    assert flow.idle == 0.0


def test_6_8_what_is_said_of_a_port_that_nobody_answers() -> None:
    flowing = nobody_answers("h2", "tcp://10.92.0.2:49152", 4, 12.3, cannot_end="", ending=False)
    for part in ("h2", "tcp://10.92.0.2:49152", "5 times in 12 s", "a firewall?", "given up after 20 s"):
        assert part in flowing
    assert nobody_answers("h2", "tcp://10.92.0.2:49152", 4, 12.3, cannot_end="", ending=True).endswith(
        "the connection is being ended"
    )
    stuck = nobody_answers("h2", "tcp://10.92.0.2:49152", 4, 12.3, cannot_end="Operation not permitted", ending=True)
    assert "cannot end the connection (Operation not permitted); the kernel gives it up 130 s" in stuck
    assert stands_still("h1", "h2", 9.0, "").startswith("h2 to take more, as nothing was sent for 9 s; a cancel ends it at once")


async def test_6_8_a_port_that_nobody_answers_is_told_and_given_up(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waits, "CONNECT_SECONDS", 0.6)
    pair.source.hypervisor.stands_still, pair.source.hypervisor.connect_retries = True, 4
    pair.wire.all_sent.clear()
    driver = pair.driver()
    running = asyncio.create_task(finished(driver, within=20))
    record = await told(pair.source, "h2 to answer at tcp://", "asked 5 times", "given up after 0.6 s")
    assert record.progress.bytes_per_second == 0
    await running
    assert "h1: h2 has not answered at tcp://" in (await pair.source.record()).failure.message
    pair.stayed()


async def test_6_8_a_cancel_ends_a_connection_that_nobody_answers(pair: Pair) -> None:
    pair.source.hypervisor.stands_still, pair.source.hypervisor.connect_retries = True, 1
    pair.source.hypervisor.held["abort"] = asyncio.Event()  # libvirt's abort needs an open connection
    pair.wire.all_sent.clear()
    driver = pair.driver()
    running = asyncio.create_task(finished(driver, within=20))
    await told(pair.source, "h2 to answer at tcp://")
    driver.view.cancel(CANCELLED)
    await pair.source.reaches("kept", within=10)
    pair.source.hypervisor.held["abort"].set()
    await running
    assert pair.runs_on == ["h1"]


async def test_6_8_a_transfer_that_stands_still_promises_no_end(pair: Pair) -> None:
    pair.source.hypervisor.stands_still = True
    pair.source.hypervisor.hindrances["web1"] = STOPPED
    pair.wire.all_sent.clear()
    running = asyncio.create_task(finished(pair.driver(), within=20))
    record = await told(pair.source, "nothing was sent for", f"h1: {STOPPED}", "nor be stopped")
    assert record.progress.bytes_per_second == 0
    assert record.progress.reason.startswith("nothing was sent for")
    pair.source.hypervisor.stands_still = False
    await told(pair.source)
    pair.wire.all_sent.set()
    await running
    pair.moved()


async def test_6_8_a_copy_whose_process_is_stopped_is_told_by_its_host(pair: Pair) -> None:
    pair.destination.hypervisor.hindrances["web1"] = STOPPED
    pair.wire.all_sent.clear()
    running = asyncio.create_task(finished(pair.driver(), within=20))
    await told(pair.destination, "the copy on h2 to take its stream", STOPPED)
    pair.wire.all_sent.set()
    await running
    assert (await pair.destination.record()).waiting_for == ""


@pytest.mark.parametrize(("call", "side"), [("begin", "source"), ("prepare", "destination")])
async def test_6_8_a_call_that_lasts_is_told_with_its_reason(pair: Pair, call: str, side: str) -> None:
    agent = {"source": pair.source, "destination": pair.destination}[side]
    agent.hypervisor.hindrances["web1"] = STOPPED
    agent.hypervisor.held[call] = asyncio.Event()
    driver = pair.driver()
    running = asyncio.create_task(finished(driver, within=20))
    await told(agent, f"the hypervisor of {agent.name} to {call}", "asked 0 s ago and not answered yet", STOPPED)
    agent.hypervisor.held[call].set()
    await running
    pair.moved()
    assert (await agent.record(REF)).waiting_for == ""


async def test_6_8_a_guest_whose_process_is_stopped_is_refused_with_the_reason(pair: Pair) -> None:
    pair.source.hypervisor.hindrances["web1"] = STOPPED
    with pytest.raises(DroverError, match=r"cannot leave h1: .*kill -CONT 7") as refused:
        await pair.source.engine.check_leaving(guest(), host_pb2.Leaving())
    assert refused.value.reason is Reason.DOMAIN_BUSY
