"""coordinator.hosts.hosts and coordinator.hosts.host_service, with agents that are real gRPC servers on unix sockets."""

import asyncio
import time
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from structlog.testing import capture_logs

from agent.hypervisor.base import HypervisorInfo
from agent.runtime.errors import DroverError, Reason
from agent.runtime.events import Bus
from agent.service.channel import open_channel
from agent.service.host import SHORTEST_REPEAT_SECONDS, AgentHost
from agent.service.host_service import HostServicer as AgentServicer
from agent.service.server import start_server
from agent.service.status import error_from_rpc
from coordinator.hosts import host_link
from coordinator.hosts.host_service import SERVICE, HostServicer
from coordinator.hosts.host_table import PREFIX
from coordinator.hosts.hosts import HostRegistry
from coordinator.store import MemoryStore, SqliteStore
from drover.agent.v1 import host_pb2 as agent_pb
from drover.agent.v1 import host_pb2_grpc as agent_rpc
from drover.coordinator.v1 import host_pb2 as pb
from drover.coordinator.v1 import host_pb2_grpc as rpc
from tests.unit.asking import until as so
from tests.unit.fake_agents import UNREACHABLE, UP, Active, Clock, names, register, until
from tests.unit.fake_hypervisor import FEATURES
from tests.unit.two_agents import Pair


async def test_register_get_list(registry: HostRegistry, store: MemoryStore, agents: Any, clock: Clock) -> None:
    beta, alpha = await agents("beta"), await agents("alpha")
    await register(registry, beta)
    clock.now += 1
    await register(registry, alpha)
    assert await names(registry) == {"alpha": UP, "beta": UP}
    known = await registry.get("alpha")
    assert (known.host, known.agent_address) == (alpha.host, alpha.address)
    assert known.last_seen_time.seconds == 1001
    stored = await store.get(PREFIX + "alpha")
    assert stored is not None
    saved = pb.ClusterHost.FromString(stored.value)
    assert (saved.host, saved.agent_address, saved.state) == (known.host, known.agent_address, UP)
    known.agent_address = "mine"  # a copy, so the registry does not change
    assert (await registry.get("alpha")).agent_address == alpha.address
    with pytest.raises(DroverError, match="drover host list") as caught:
        await registry.get("gamma")
    assert caught.value.reason is Reason.HOST_NOT_FOUND
    assert caught.value.metadata["host"] == "gamma"


async def test_watch_updates_the_host(registry: HostRegistry, store: MemoryStore, agents: Any) -> None:
    agent = await agents("alpha")
    await register(registry, agent)
    agent.change(incoming_in_use=2)
    await until(store, "alpha", lambda known: known.host.incoming_in_use == 2)
    assert (await registry.get("alpha")).host.incoming_in_use == 2


async def test_broken_watch_is_unreachable_at_once_and_comes_back(registry: HostRegistry, store: MemoryStore, agents: Any) -> None:
    agent = await agents("alpha")
    await register(registry, agent)
    agent.change(incoming_in_use=1)
    await until(store, "alpha", lambda known: known.host.incoming_in_use == 1)  # the watch is open
    await agent.stop()
    await until(store, "alpha", lambda known: known.state == UNREACHABLE)
    assert await names(registry) == {"alpha": UNREACHABLE}
    await agent.start()
    await until(store, "alpha", lambda known: known.state == UP)


async def test_an_agent_that_is_back_says_so_and_is_looked_for_at_once(
    registry: HostRegistry, store: MemoryStore, agents: Any, clock: Clock
) -> None:
    clock.stopped = True
    agent = await agents("alpha")
    await register(registry, agent)
    agent.change(incoming_in_use=1)
    await until(store, "alpha", lambda known: known.host.incoming_in_use == 1)
    await agent.stop()
    await until(store, "alpha", lambda known: known.state == UNREACHABLE)
    agent.change(incarnation="2")
    await agent.start()
    await register(registry, agent)
    assert (await until(store, "alpha", lambda known: known.state == UP)).host.incarnation == "2"


async def test_6_24_a_forged_registration_of_a_host_that_is_up_changes_nothing(
    registry: HostRegistry, store: MemoryStore, agents: Any
) -> None:
    agent = await agents("alpha")
    await register(registry, agent)
    agent.change(incoming_in_use=1)
    before = await until(store, "alpha", lambda known: known.host.incoming_in_use == 1)
    await registry.register(forged(agent.host), agent.address)
    known = await registry.get("alpha")
    assert (known.host, known.state) == (agent.host, UP)
    agent.change(incoming_in_use=2)  # the next report is the agent's own
    after = await until(store, "alpha", lambda known: known.host != before.host)
    assert after.host == agent.host


async def test_6_24_a_forged_registration_makes_no_host_up(registry: HostRegistry, store: MemoryStore, agents: Any) -> None:
    agent = await agents("alpha")
    await register(registry, agent)
    await agent.stop()
    before = await until(store, "alpha", lambda known: known.state == UNREACHABLE)
    await registry.register(forged(agent.host), agent.address)
    known = await registry.get("alpha")
    assert (known.host, known.state, known.last_seen_time) == (agent.host, UNREACHABLE, before.last_seen_time)


async def test_6_24_what_a_new_host_says_is_asked_of_its_agent(registry: HostRegistry, store: MemoryStore, agents: Any) -> None:
    agent = await agents("alpha")
    await registry.register(forged(agent.host), agent.address)
    assert (await registry.get("alpha")).host == agent.host
    stored = await store.get(PREFIX + "alpha")
    assert stored is not None
    assert pb.ClusterHost.FromString(stored.value).host == agent.host


def forged(host: agent_pb.Host) -> agent_pb.Host:
    """Return a false description of that host, as another caller may send it."""
    said = agent_pb.Host()
    said.CopyFrom(host)
    said.incarnation, said.incoming_limit, said.draining = "forged", 99, True
    said.hypervisor, said.coordinators[:] = "QEMU 0", ["somebody"]
    said.networks.add(name="mig", address="10.0.0.66", roles=["migration"])
    return said


async def test_6_16_the_coordinator_compares_its_clock_with_what_the_agent_itself_says(
    registry: HostRegistry, store: MemoryStore, agents: Any, clock: Clock
) -> None:
    agent = await agents("alpha")
    agent.clock = lambda: clock.now + 3600
    await register(registry, agent)
    agent.change(incoming_in_use=1)
    known = await until(store, "alpha", lambda known: known.host.incoming_in_use == 1)
    assert known.clock_skew.ToTimedelta().total_seconds() == 3600


async def test_agent_that_never_says_a_word(
    registry: HostRegistry, store: MemoryStore, agents: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_link, "FIRST_REPORT_SECONDS", 0.1)
    agent = await agents("alpha")
    agent.hangs = True
    await register(registry, agent)
    await until(store, "alpha", lambda known: known.state == UNREACHABLE)


async def test_an_agent_that_repeats_its_word_stays_up_and_one_that_hangs_does_not(store: MemoryStore, agents: Any) -> None:
    agent = await agents("alpha")
    registry = HostRegistry(store, Bus(), 0.2)
    await registry.open()
    await register(registry, agent)
    await so(lambda: agent.words > 6)  # longer than three heartbeats, though nothing has changed
    assert (agent.watches_ever, await names(registry)) == (1, {"alpha": UP})
    agent.hangs = True  # the connection stays open
    await until(store, "alpha", lambda known: known.state == UNREACHABLE)
    await register(registry, agent)  # anybody could claim that
    assert await names(registry) == {"alpha": UNREACHABLE}
    agent.hangs = False
    agent.change()
    await until(store, "alpha", lambda known: known.state == UP)
    await registry.close()


async def test_an_agent_of_an_older_version_repeats_nothing_and_stays_up(store: MemoryStore, agents: Any) -> None:
    agent = await agents("alpha")
    agent.older = True
    registry = HostRegistry(store, Bus(), 0.05)
    await registry.open()
    await register(registry, agent)
    await asyncio.sleep(1.0)  # many times three heartbeats, in which nothing may happen
    assert (agent.watches_ever, agent.words, await names(registry)) == (1, 1, {"alpha": UP})
    await registry.close()


async def test_channel_is_kept_and_rebuilt_with_the_address(
    registry: HostRegistry, store: MemoryStore, agents: Any, tmp_path: Path
) -> None:
    (tmp_path / "new").mkdir()
    agent = await agents("alpha")
    await register(registry, agent)
    channel = registry.channel("alpha")
    assert registry.channel("alpha") is channel
    agent.change(incoming_in_use=1)
    await until(store, "alpha", lambda known: known.host.incoming_in_use == 1)
    moved = await agents("alpha", "uuid-alpha", "new")
    with pytest.raises(DroverError, match="is alive"):
        await register(registry, moved)
    await agent.stop()
    await until(store, "alpha", lambda known: known.state == UNREACHABLE)
    await register(registry, moved)
    rebuilt = registry.channel("alpha")
    assert rebuilt is not channel
    response = await agent_rpc.HostServiceStub(rebuilt).GetHost(agent_pb.GetHostRequest(), timeout=2)
    assert response.host == moved.host
    async with asyncio.timeout(5):
        await agent.all_left.wait()  # the old watch was not leaked
    await registry.close()
    async with asyncio.timeout(5):
        await moved.all_left.wait()


async def test_find_domain(registry: HostRegistry, store: MemoryStore, agents: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_link, "QUESTION_SECONDS", 0.3)
    alpha, beta, gamma, delta = [await agents(name) for name in ("alpha", "beta", "gamma", "delta")]
    for agent in (alpha, beta, gamma, delta):
        await register(registry, agent)
    beta.domains.append(agent_pb.Domain(name="vm-alpha", uuid="u-other", state=agent_pb.DOMAIN_STATE_SHUTOFF))
    gamma.hangs = True
    await delta.stop()
    await until(store, "delta", lambda known: known.state == UNREACHABLE)
    found, silent = await registry.find_domain(agent_pb.GetDomainRequest(domain="vm-alpha"))
    assert [(host, guest.domain.uuid) for host, guest in found] == [("alpha", "u-alpha"), ("beta", "u-other")]
    assert silent == ["delta", "gamma"]
    found, silent = await registry.find_domain(agent_pb.GetDomainRequest(domain="u-beta"))
    assert [(host, guest.domain) for host, guest in found] == [("beta", beta.domains[0])]
    assert silent == ["delta", "gamma"]
    assert await registry.find_domain(agent_pb.GetDomainRequest(domain="none")) == ([], ["delta", "gamma"])


async def test_restart_of_the_coordinator(tmp_path: Path, agents: Any) -> None:
    agent, gone = await agents("alpha"), await agents("gone")
    async with await SqliteStore.open(tmp_path / "s.db") as store:
        registry = HostRegistry(store, Bus())
        await registry.open()
        await register(registry, agent)
        await register(registry, gone)
        await registry.close()
    await gone.stop()
    async with await SqliteStore.open(tmp_path / "s.db") as store:
        watch = store.watch(PREFIX + "alpha")
        registry = HostRegistry(store, Bus())
        await registry.open()
        assert await names(registry) == {"alpha": UNREACHABLE, "gone": UNREACHABLE}
        assert (await registry.get("gone")).host == gone.host
        # The coordinator connects to its agent, though that has not registered again.
        async with asyncio.timeout(5):
            async for changes in watch:
                now = changes.events[0].now
                if now is not None and pb.ClusterHost.FromString(now.value).state == UP:
                    break
        assert await names(registry) == {"alpha": UP, "gone": UNREACHABLE}
        await until(store, "gone", lambda known: known.state == UNREACHABLE)
        await registry.close()


async def test_store_that_fails_makes_no_host_unreachable(
    registry: HostRegistry, store: MemoryStore, agents: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> int:
        tried.set()
        raise DroverError(Reason.JOURNAL_UNAVAILABLE, "disk full")

    tried = asyncio.Event()
    agent, newcomer = await agents("alpha"), await agents("new")
    await register(registry, agent)
    with monkeypatch.context() as broken:
        broken.setattr(store, "txn", fail)
        agent.change(incoming_in_use=1)
        async with asyncio.timeout(5):
            await tried.wait()
        known = await registry.get("alpha")
        assert (known.state, known.host.incoming_in_use) == (UP, 1)
        with pytest.raises(DroverError) as caught:
            await register(registry, newcomer)
        assert caught.value.reason is Reason.JOURNAL_UNAVAILABLE
    await until(store, "alpha", lambda known: known.host.incoming_in_use == 1)


async def test_service(registry: HostRegistry, agents: Any, tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/c.sock"
    active: dict[str, list[str]] = {}
    servicer = HostServicer(registry, Active(active))  # type: ignore[arg-type]
    server = await start_server([address], lambda s: rpc.add_HostServiceServicer_to_server(servicer, s), [SERVICE], Bus())
    agent = await agents("alpha")
    async with open_channel(address) as channel:
        stub = rpc.HostServiceStub(channel)
        answer = await stub.RegisterHost(pb.RegisterHostRequest(host=agent.host, agent_address=agent.address), timeout=5)
        assert answer.heartbeat_interval.ToTimedelta().total_seconds() == 5
        host = (await stub.GetHost(pb.GetHostRequest(name="alpha"), timeout=5)).host
        assert host.state == UP
        assert [h.host.name for h in (await stub.ListHosts(pb.ListHostsRequest(), timeout=5)).hosts] == ["alpha"]
        domains = pb.ListDomainsResponse(domains=[pb.PlacedDomain(host="alpha", domain=agent.domains[0])])
        assert await stub.ListDomains(pb.ListDomainsRequest(), timeout=5) == domains
        assert await stub.ListDomains(pb.ListDomainsRequest(host="alpha"), timeout=5) == domains
        active["alpha"] = ["m1"]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.RemoveHost(pb.RemoveHostRequest(name="alpha"), timeout=5)
        refused = error_from_rpc(caught.value, "coordinator")
        assert (refused.reason, refused.metadata["migration_id"]) == (Reason.HOST_IN_USE, "m1")
        await agent.stop()
        for request, reasons in (
            (pb.ListDomainsRequest(host="none"), [Reason.HOST_NOT_FOUND]),
            (pb.ListDomainsRequest(host="alpha"), [Reason.HOST_UNREACHABLE]),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.ListDomains(request, timeout=5)
            assert error_from_rpc(caught.value, "coordinator").reason in reasons
        response = await stub.ListDomains(pb.ListDomainsRequest(), timeout=5)
        assert response.unreachable_hosts == ["alpha"]
    await server.stop(0)


async def test_6_36_two_coordinators_that_claim_one_agent_are_both_told(pair: Pair, tmp_path: Path) -> None:
    info = HypervisorInfo("fake", "fake 1", "fake 1", "uuid-h1", FEATURES)
    host = AgentHost(info, pair.source.hypervisor, pair.source.engine, Bus())
    address = f"unix:{tmp_path}/agent.sock"
    add = agent_rpc.add_HostServiceServicer_to_server
    server = await start_server([address], lambda grpc_server: add(AgentServicer(host), grpc_server), [SERVICE], Bus())
    async with await MemoryStore.open() as one, await MemoryStore.open() as two:
        registries = [HostRegistry(store, Bus(), coordinator=name) for store, name in ((one, "c one"), (two, "c two"))]
        with capture_logs() as logs:
            for registry in registries:
                await registry.open()
                await registry.register(host.describe(), address)
            for store in (one, two):
                await until(store, "h1", lambda known: list(known.host.coordinators) == ["c one", "c two"])
        told = [entry["others"] for entry in logs if entry["event"] == "host.claimed_by_another_coordinator"]
        assert sorted(told) == [["c one"], ["c two"]]
        await registries[1].close()
        await until(one, "h1", lambda known: list(known.host.coordinators) == ["c one"])
        await registries[0].close()
    await server.stop(0)


async def test_a_watch_repeats_its_word_when_nothing_changes_if_that_is_asked(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = HypervisorInfo("fake", "fake 1", "fake 1", "uuid-h1", FEATURES)
    address = f"unix:{tmp_path}/agent.sock"
    servicer = AgentServicer(AgentHost(info, pair.source.hypervisor, pair.source.engine, Bus()))
    server = await start_server([address], lambda s: agent_rpc.add_HostServiceServicer_to_server(servicer, s), [SERVICE], Bus())
    async with open_channel(address) as channel:
        request = agent_pb.WatchHostRequest()
        request.repeat_interval.FromNanoseconds(1)  # counts as the shortest one
        began = time.monotonic()
        call = agent_rpc.HostServiceStub(channel).WatchHost(request, timeout=10)
        words: list[Any] = [await call.read() for _ in range(4)]
        assert time.monotonic() - began >= 3 * SHORTEST_REPEAT_SECONDS
        assert {word.host.host_uuid for word in words} == {"uuid-h1"}
        assert all(abs(word.send_time.seconds - time.time()) < 60 for word in words)
        call.cancel()
    await server.stop(0)
