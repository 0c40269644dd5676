"""coordinator.hosts and coordinator.host_service, with agents that are real gRPC servers on unix sockets."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from agent.errors import DroverError, Reason
from agent.service.channel import open_channel
from agent.service.server import Server, start_server
from agent.service.status import error_from_rpc
from coordinator import host_link
from coordinator.host_service import SERVICE, HostServicer
from coordinator.hosts import PREFIX, HostRegistry
from coordinator.store import Changes, MemoryStore, Put, SqliteStore
from drover.agent.v1 import host_pb2 as agent_pb
from drover.agent.v1 import host_pb2_grpc as agent_rpc
from drover.coordinator.v1 import host_pb2 as pb
from drover.coordinator.v1 import host_pb2_grpc as rpc

UP, UNREACHABLE = pb.HOST_STATE_UP, pb.HOST_STATE_UNREACHABLE
AGENT_SERVICE = agent_pb.DESCRIPTOR.services_by_name["HostService"].full_name


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class FakeAgent(agent_rpc.HostServiceServicer):
    """An agent whose host can be changed, and that can hang."""

    def __init__(self, directory: Path, name: str, uuid: str = "") -> None:
        self.host = agent_pb.Host(name=name, host_uuid=uuid or f"uuid-{name}", incarnation="1", incoming_limit=2)
        self.domains = [agent_pb.Domain(name=f"vm-{name}", uuid=f"u-{name}", state=agent_pb.DOMAIN_STATE_RUNNING)]
        self.address = f"unix:{directory}/{name}.sock"
        self.hangs = False
        self.watches = 0
        self.all_left = asyncio.Event()
        self._changed = asyncio.Event()
        self._server: Server | None = None

    async def start(self) -> None:
        self._server = await start_server(
            [self.address], lambda server: agent_rpc.add_HostServiceServicer_to_server(self, server), [AGENT_SERVICE]
        )

    async def stop(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            await server.stop(0)

    def change(self, **fields: Any) -> None:
        for name, value in fields.items():
            setattr(self.host, name, value)
        self._changed.set()
        self._changed = asyncio.Event()

    async def WatchHost(self, request: Any, context: Any) -> AsyncIterator[agent_pb.WatchHostResponse]:  # noqa: N802
        self.watches += 1
        try:
            while self.hangs:
                await self._changed.wait()
            while True:
                changed = self._changed
                yield agent_pb.WatchHostResponse(host=self.host)
                await changed.wait()
        finally:
            self.watches -= 1
            if not self.watches:
                self.all_left.set()

    async def GetHost(self, request: Any, context: Any) -> agent_pb.GetHostResponse:  # noqa: N802
        return agent_pb.GetHostResponse(host=self.host)

    async def GetDomain(self, request: agent_pb.GetDomainRequest, context: Any) -> agent_pb.GetDomainResponse:  # noqa: N802
        await self._hang()
        for domain in self.domains:
            if request.domain in (domain.name, domain.uuid):
                return agent_pb.GetDomainResponse(domain=domain)
        raise DroverError(Reason.DOMAIN_NOT_FOUND, "no such guest", metadata={"domain": request.domain})

    async def ListDomains(self, request: Any, context: Any) -> agent_pb.ListDomainsResponse:  # noqa: N802
        await self._hang()
        return agent_pb.ListDomainsResponse(domains=self.domains)

    async def _hang(self) -> None:
        while self.hangs:
            await self._changed.wait()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def store() -> AsyncIterator[MemoryStore]:
    async with await MemoryStore.open() as opened:
        yield opened


@pytest.fixture
async def registry(store: MemoryStore, clock: Clock) -> AsyncIterator[HostRegistry]:
    made = HostRegistry(store, 5.0, clock, wall=lambda: clock.now)
    await made.open()
    yield made
    await made.close()


@pytest.fixture
async def agents(tmp_path: Path) -> AsyncIterator[Callable[..., Any]]:
    started: list[FakeAgent] = []

    async def start(name: str, uuid: str = "", directory: str = "") -> FakeAgent:
        agent = FakeAgent(tmp_path / directory, name, uuid)
        started.append(agent)
        await agent.start()
        return agent

    yield start
    for agent in started:
        await agent.stop()


async def until(store: MemoryStore | SqliteStore, name: str, true: Callable[[pb.ClusterHost], bool]) -> pb.ClusterHost:
    """Wait until what the store says of the host is so."""
    watch = store.watch(PREFIX + name)
    async with asyncio.timeout(10):
        item = await store.get(PREFIX + name)
        while True:
            known = pb.ClusterHost.FromString(item.value) if item is not None else pb.ClusterHost()
            if true(known):
                return known
            changes: Changes = await anext(watch)
            item = changes.events[-1].now


async def register(registry: HostRegistry, agent: FakeAgent) -> None:
    await registry.register(agent.host, agent.address)


async def names(registry: HostRegistry) -> dict[str, int]:
    return {known.host.name: known.state for known in await registry.list_hosts()}


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
    assert pb.ClusterHost.FromString(stored.value) == known
    known.agent_address = "mine"  # a copy: nobody else's business
    assert (await registry.get("alpha")).agent_address == alpha.address
    with pytest.raises(DroverError, match="drover host list") as caught:
        await registry.get("gamma")
    assert caught.value.reason is Reason.HOST_NOT_FOUND
    assert caught.value.metadata["host"] == "gamma"


@pytest.mark.parametrize(
    ("host", "address", "field"),
    [
        (agent_pb.Host(host_uuid="u"), "unix:/a", "host.name"),
        (agent_pb.Host(name="a"), "unix:/a", "host.host_uuid"),
        (agent_pb.Host(name="a", host_uuid="u"), "a.example:7400", "agent_address"),
    ],
)
async def test_bad_claims(registry: HostRegistry, host: agent_pb.Host, address: str, field: str) -> None:
    with pytest.raises(DroverError) as caught:
        await registry.register(host, address)
    assert caught.value.reason is Reason.INVALID_FIELD
    assert caught.value.metadata["field"] == field
    assert await registry.list_hosts() == []


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


async def test_new_incarnation_is_up_at_once(registry: HostRegistry, store: MemoryStore, agents: Any) -> None:
    agent = await agents("alpha")
    await register(registry, agent)
    await agent.stop()
    await until(store, "alpha", lambda known: known.state == UNREACHABLE)
    await register(registry, agent)  # alive, it says, but it does not answer: the same incarnation proves nothing
    assert await names(registry) == {"alpha": UNREACHABLE}
    agent.change(incarnation="2")
    await agent.start()
    await register(registry, agent)
    assert await names(registry) == {"alpha": UP}


async def test_agent_that_cannot_be_reached(registry: HostRegistry, store: MemoryStore, tmp_path: Path) -> None:
    await registry.register(agent_pb.Host(name="alpha", host_uuid="u"), f"unix:{tmp_path}/none.sock")
    await until(store, "alpha", lambda known: known.state == UNREACHABLE)


async def test_agent_that_never_says_a_word(
    registry: HostRegistry, store: MemoryStore, agents: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_link, "FIRST_WORD_SECONDS", 0.1)
    agent = await agents("alpha")
    agent.hangs = True
    await register(registry, agent)
    await until(store, "alpha", lambda known: known.state == UNREACHABLE)


async def test_missed_heartbeats(registry: HostRegistry, store: MemoryStore, agents: Any, clock: Clock) -> None:
    agent = await agents("alpha")
    await register(registry, agent)
    agent.change(incoming_in_use=1)
    await until(store, "alpha", lambda known: known.host.incoming_in_use == 1)
    clock.now += 14
    await register(registry, agent)
    clock.now += 14
    assert await names(registry) == {"alpha": UP}
    clock.now += 1  # the connection lives, but the agent has said nothing for three heartbeats
    assert await names(registry) == {"alpha": UNREACHABLE}
    await until(store, "alpha", lambda known: known.state == UNREACHABLE)
    await register(registry, agent)
    assert await names(registry) == {"alpha": UP}


async def test_missed_heartbeats_without_being_asked(store: MemoryStore, agents: Any) -> None:
    agent = await agents("alpha")
    registry = HostRegistry(store, 0.05)
    await registry.open()
    await register(registry, agent)
    await until(store, "alpha", lambda known: known.state == UNREACHABLE)
    await registry.close()


async def test_name_taken_and_taken_over(registry: HostRegistry, store: MemoryStore, agents: Any, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    agent, other = await agents("alpha"), await agents("alpha", "uuid-2", "other")
    await register(registry, agent)
    with pytest.raises(DroverError, match="another name") as caught:
        await register(registry, other)
    assert caught.value.reason is Reason.HOST_NAME_TAKEN
    assert (await registry.get("alpha")).host.host_uuid == "uuid-alpha"
    await agent.stop()
    await until(store, "alpha", lambda known: known.state == UNREACHABLE)
    await register(registry, other)
    known = await registry.get("alpha")
    assert (known.state, known.host.host_uuid, known.agent_address) == (UP, "uuid-2", other.address)


async def test_two_claim_one_name_at_once(registry: HostRegistry, agents: Any) -> None:
    agent = await agents("alpha")
    agent.hangs = True  # so that the winner is neither heard nor lost while this goes on
    claims = [agent_pb.Host(name="alpha", host_uuid=f"u{i}") for i in range(3)]
    results = await asyncio.gather(*(registry.register(host, agent.address) for host in claims), return_exceptions=True)
    refused = [result for result in results if isinstance(result, DroverError)]
    assert [error.reason for error in refused] == [Reason.HOST_NAME_TAKEN] * 2
    assert len(await registry.list_hosts()) == 1


async def test_renamed_host_leaves_its_old_name(registry: HostRegistry, store: MemoryStore, agents: Any) -> None:
    agent = await agents("alpha")
    await register(registry, agent)
    agent.change(name="beta")
    await register(registry, agent)
    assert await names(registry) == {"beta": UP}
    assert await store.get(PREFIX + "alpha") is None


async def test_another_host_at_the_address_is_not_believed(registry: HostRegistry, store: MemoryStore, agents: Any) -> None:
    agent = await agents("alpha")
    await register(registry, agent)
    agent.change(host_uuid="somebody else")
    await until(store, "alpha", lambda known: known.state == UNREACHABLE)
    assert (await registry.get("alpha")).host.host_uuid == "uuid-alpha"


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
    found, silent = await registry.find_domain("vm-alpha")
    assert [(host, guest.domain.uuid) for host, guest in found] == [("alpha", "u-alpha"), ("beta", "u-other")]
    assert silent == ["delta", "gamma"]
    found, silent = await registry.find_domain("u-beta")
    assert [(host, guest.domain) for host, guest in found] == [("beta", beta.domains[0])]
    assert silent == ["delta", "gamma"]
    assert await registry.find_domain("none") == ([], ["delta", "gamma"])


async def test_restart_of_the_coordinator(tmp_path: Path, agents: Any) -> None:
    agent, gone = await agents("alpha"), await agents("gone")
    async with await SqliteStore.open(tmp_path / "s.db") as store:
        registry = HostRegistry(store)
        await registry.open()
        await register(registry, agent)
        await register(registry, gone)
        await registry.close()
    await gone.stop()
    async with await SqliteStore.open(tmp_path / "s.db") as store:
        watch = store.watch(PREFIX + "alpha")
        registry = HostRegistry(store)
        await registry.open()
        assert await names(registry) == {"alpha": UNREACHABLE, "gone": UNREACHABLE}
        assert (await registry.get("gone")).host == gone.host
        # Its agent is asked, though it has not registered again.
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
    agent = await agents("alpha")
    await register(registry, agent)
    monkeypatch.setattr("coordinator.hosts.RETRY_SECONDS", 0.05)
    with monkeypatch.context() as broken:
        broken.setattr(store, "txn", fail)
        agent.change(incoming_in_use=1)
        async with asyncio.timeout(5):
            await tried.wait()
        await register(registry, agent)
        known = await registry.get("alpha")
        assert (known.state, known.host.incoming_in_use) == (UP, 1)
        with pytest.raises(DroverError) as caught:
            await registry.register(agent_pb.Host(name="new", host_uuid="u"), agent.address)
        assert caught.value.reason is Reason.JOURNAL_UNAVAILABLE
    await until(store, "alpha", lambda known: known.host.incoming_in_use == 1)


async def test_somebody_else_wrote_to_the_store(registry: HostRegistry, store: MemoryStore, agents: Any) -> None:
    agent = await agents("alpha")
    await register(registry, agent)
    known = await registry.get("alpha")
    await store.txn([], [Put(PREFIX + "alpha", known.SerializeToString())])
    agent.change(incoming_in_use=1)
    await until(store, "alpha", lambda known: known.host.incoming_in_use == 1)
    foreign = pb.ClusterHost(host=agent_pb.Host(name="beta", host_uuid="uuid-x"), agent_address="unix:/none", state=UP)
    await store.txn([], [Put(PREFIX + "beta", foreign.SerializeToString())])
    beta = await agents("beta")
    await register(registry, beta)  # nobody here has heard of the other one
    assert (await registry.get("beta")).host.host_uuid == "uuid-beta"


@pytest.mark.parametrize("turns", range(1, 8))
async def test_cancelled_register_heals(registry: HostRegistry, agents: Any, turns: int) -> None:
    agent = await agents("alpha")
    task = asyncio.create_task(register(registry, agent))
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task}, timeout=5)  # cancelled somewhere, or already done
    await register(registry, agent)
    assert await names(registry) == {"alpha": UP}


async def test_service(registry: HostRegistry, agents: Any, tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/c.sock"
    servicer = HostServicer(registry)
    server = await start_server([address], lambda s: rpc.add_HostServiceServicer_to_server(servicer, s), [SERVICE])
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
