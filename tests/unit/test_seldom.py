"""agent.runtime.seldom, and two log lines that callers can provoke (line 36)."""

import contextlib
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from agent.hypervisor.base import HypervisorInfo
from agent.runtime.events import Bus
from agent.runtime.seldom import SECONDS, Seldom
from agent.service.host import MAX_COORDINATORS, AgentHost
from coordinator.hosts.hosts import HostRegistry
from tests.unit.fake_agents import Clock, FakeAgent, register
from tests.unit.fake_hypervisor import FEATURES
from tests.unit.two_agents import Pair


@pytest.fixture
def host(pair: Pair) -> AgentHost:
    return AgentHost(
        HypervisorInfo("fake", "fake 1", "fake 1", "uuid-h1", FEATURES), pair.source.hypervisor, pair.source.engine, Bus()
    )


def test_a_line_is_due_again_after_a_while_and_tells_how_many_were_not() -> None:
    lines = Seldom()
    assert (lines.due(0.0), lines.told(0.0)) == (True, 0)
    lines.held_back += 7
    assert (lines.due(SECONDS - 0.1), lines.due(SECONDS)) == (False, True)
    assert (lines.told(SECONDS), lines.told(2 * SECONDS)) == (7, 0)


async def test_6_36_who_claims_a_host_again_and_again_writes_no_log_of_it(host: AgentHost) -> None:
    with capture_logs() as logs:
        async with contextlib.aclosing(host.watch("co")) as real:
            await anext(real)
            for number in range(100):
                async with contextlib.aclosing(host.watch(f"a{number}")) as claim:
                    await anext(claim)
    told = [line for line in logs if "more than one coordinator" in line["event"]]
    assert [(line["coordinators"], line["held_back"]) for line in told] == [(["a0", "co"], 0)]
    assert host._warnings.held_back == 99


async def test_6_36_no_newcomer_hides_a_coordinator(host: AgentHost) -> None:
    async with AsyncExitStack() as watches:
        for name in ("co", *(f"a{number:02}" for number in range(12))):
            watch = await watches.enter_async_context(contextlib.aclosing(host.watch(name)))
            await anext(watch)
        shown = list(host.describe().coordinators)
        assert shown == sorted(["co", *(f"a{number:02}" for number in range(MAX_COORDINATORS - 1))])


async def test_6_36_rivals_are_told_of_seldom_and_none_that_stays_is_forgotten(
    registry: HostRegistry, clock: Clock, tmp_path: Path
) -> None:
    agent = FakeAgent(tmp_path, "alpha")
    await agent.start()
    await register(registry, agent)
    entry = registry._find("alpha")
    with capture_logs() as logs:
        for rivals in ({"x"}, {"y"}, {"z"}, {"z"}, set(), {"z"}):
            registry._warn_of_rivals(entry, frozenset(rivals))
        clock.now += SECONDS
        for rivals in ({"z"}, {"z"}, {"z", "x"}):
            registry._warn_of_rivals(entry, frozenset(rivals))
    await agent.stop()
    told = [line for line in logs if line["event"] == "host.claimed_by_another_coordinator"]
    assert [(line["others"], line["held_back"]) for line in told] == [(["x"], 0), (["z"], 3)]
    assert entry.warnings.held_back == 1
