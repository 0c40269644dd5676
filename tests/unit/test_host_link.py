"""coordinator.hosts.host_link: how often, and how many at once, it tries to reach silent hosts."""

import asyncio
from pathlib import Path

import pytest

from agent.runtime.events import Bus
from coordinator.hosts import host_link
from coordinator.hosts.host_link import ConnectLimits, HostLink
from coordinator.hosts.host_table import PREFIX
from coordinator.hosts.hosts import HostRegistry
from coordinator.store import MemoryStore, Put
from drover.agent.v1 import host_pb2 as agent_pb
from drover.coordinator.v1 import host_pb2 as pb
from tests.unit.asking import until
from tests.unit.clocks import FakeClock


async def test_6_24_a_bounded_number_of_silent_hosts_is_tried_at_once() -> None:
    lanes, never, release, inside = ConnectLimits(), asyncio.Event(), asyncio.Event(), 0

    async def attempt(spoken: asyncio.Event) -> None:
        nonlocal inside
        async with lanes.turn(spoken):
            inside += 1
            await release.wait()

    attempts = [asyncio.create_task(attempt(never)) for _ in range(host_link.OTHERS_AT_ONCE + 10)]
    await until(lambda: inside == host_link.OTHERS_AT_ONCE)
    spoken = asyncio.Event()
    attempts.append(asyncio.create_task(attempt(spoken)))
    await asyncio.sleep(0.01)
    assert inside == host_link.OTHERS_AT_ONCE
    spoken.set()  # it need not queue behind the silent ones
    await until(lambda: inside == host_link.OTHERS_AT_ONCE + 1)
    attempts[-2].cancel()
    release.set()
    await asyncio.wait(attempts)
    assert inside == host_link.OTHERS_AT_ONCE + 10
    assert (lanes._silent._value, lanes._spoken._value) == (host_link.OTHERS_AT_ONCE, host_link.REGISTERED_AT_ONCE)


async def test_6_24_the_channel_to_a_host_that_stays_silent_is_closed_and_opened_again_when_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_link, "FIRST_REPORT_SECONDS", 0.02)
    silences: list[str] = []
    link = HostLink(
        "h1", f"unix:{tmp_path}/none.sock", lambda *_: None, lambda _, why: silences.append(why), ConnectLimits(), clock=FakeClock()
    )
    first = link.channel
    await until(lambda: len(silences) > host_link.CLOSE_CHANNEL_AFTER)
    assert link.channel is not first
    await link.close()


@pytest.mark.timeout(60)
async def test_6_24_a_coordinator_with_many_dead_hosts_stops_soon(tmp_path: Path) -> None:
    async with await MemoryStore.open() as store:
        for number in range(1000):
            host = agent_pb.Host(name=f"h{number}", host_uuid=f"u{number}")
            known = pb.ClusterHost(host=host, agent_address=f"unix:{tmp_path}/{number}.sock", state=pb.HOST_STATE_UNREACHABLE)
            await store.txn([], [Put(PREFIX + host.name, known.SerializeToString())])
        registry = HostRegistry(store, Bus())
        await registry.open()
        assert len(registry.names()) == 1000
        async with asyncio.timeout(20):
            await registry.close()


@pytest.mark.parametrize("ticks", range(6))
async def test_6_24_whoever_is_cancelled_keeps_no_turn(ticks: int) -> None:
    """At any moment, also when the turn has just been granted."""
    lanes = ConnectLimits()

    async def connect() -> None:
        async with lanes.turn(asyncio.Event()):
            await asyncio.Event().wait()

    for _ in range(host_link.OTHERS_AT_ONCE + 1):
        connecting = asyncio.create_task(connect())
        for _ in range(ticks):
            await asyncio.sleep(0)
        connecting.cancel()
        await asyncio.wait({connecting})
    async with asyncio.timeout(5), lanes.turn(asyncio.Event()):
        pass
