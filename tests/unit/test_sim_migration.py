"""Successful migrations between two simulated hosts in one process, over a real loopback connection, and their states meanwhile."""

import asyncio
import itertools
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from agent.hypervisor.base import (
    Begun,
    Domain,
    DomainBusy,
    DomainNotFound,
    DomainState,
    Finished,
    HypervisorError,
    Incompatible,
    Job,
    NoTransfer,
    Performed,
    Prepared,
)
from agent.hypervisor.interface import Hypervisor
from agent.hypervisor.options import Options
from agent.hypervisor.sim import Latencies, SimConfig, SimGuest, SimHypervisor
from agent.hypervisor.sim.config import uuid_of

MIB = 1 << 20
UUID = uuid_of("web")
QUICK = Latencies(begin=0, prepare=0, finish=0, confirm=0, switch=0)

_addresses = itertools.count()


def fresh_address() -> str:
    """Return a loopback address that no other test uses, so that parallel tests never share ports."""
    n = next(_addresses)
    return f"127.{1 + os.getpid() % 250}.{1 + os.getpid() // 250 % 250}.{1 + n % 250}"


def web(**changes: Any) -> SimGuest:
    given: dict[str, Any] = {"name": "web", "memory_bytes": 4 * MIB} | changes
    return SimGuest(**given)


def slow(**changes: Any) -> SimGuest:
    """Return a guest whose transfer takes minutes, so that a test can act during it."""
    return web(memory_bytes=100_000 * MIB, dirty_rate=1000 * MIB, **changes)


@asynccontextmanager
async def host(name: str, *guests: SimGuest, **config: Any) -> AsyncIterator[SimHypervisor]:
    given: dict[str, Any] = {"host_uuid": name, "guests": guests, "latencies": QUICK} | config
    hypervisor = SimHypervisor(SimConfig(**given))
    await hypervisor.open()
    try:
        yield hypervisor
    finally:
        await hypervisor.close()


@dataclass
class Move:
    """One migration, whose phases are called one by one."""

    a: SimHypervisor
    b: SimHypervisor
    options: Options = field(default_factory=Options)
    uuid: str = UUID
    name: str = ""
    bandwidth: int = 0

    def __post_init__(self) -> None:
        self.out = self.a.outgoing(self.uuid)
        self.into = self.b.incoming(self.uuid)
        self.address = fresh_address()

    async def prepare(self, uri: str = "") -> Prepared:
        self.begun: Begun = await self.out.begin(self.options, self.name)
        self.prepared = await self.into.prepare(self.begun.domain_xml, self.begun.cookie, self.options, self.name, self.address, uri)
        return self.prepared

    def perform(self) -> "asyncio.Task[Performed]":
        return asyncio.create_task(
            self.out.perform(self.prepared.uri, self.begun.domain_xml, self.prepared.cookie, self.options, self.name, self.bandwidth)
        )

    def finish(self) -> "asyncio.Task[Finished]":
        return asyncio.create_task(self.into.finish(self.begun.domain_xml, b"", self.options, self.name))

    async def flow(self) -> None:
        """Wait until memory flows."""
        await until(lambda: self.out.progress(), lambda progress: progress is not None and progress.processed_bytes > 0)

    async def whole(self) -> Domain:
        """Run the whole migration. Return the guest at the destination."""
        await self.prepare()
        finishing = self.finish()
        await self.perform()
        finished = await finishing
        await self.out.remove(finished.cookie, self.options)
        return await self.b.get_domain(self.uuid)

    async def whole_offline(self) -> Domain:
        await self.prepare()
        await self.finish()
        await self.out.remove(b"", self.options)
        return await self.b.get_domain(self.uuid)


async def until(read: Callable[[], Awaitable[Any]], good: Callable[[Any], bool]) -> Any:
    async with asyncio.timeout(10):
        while not good(value := await read()):  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(0.002)
    return value


async def facts(hypervisor: SimHypervisor) -> Domain | None:
    try:
        return await hypervisor.get_domain(UUID)
    except DomainNotFound:
        return None


def state_text(domain: Domain | None) -> str:
    return f"{domain.state} ({domain.reason})" if domain else "none"


@pytest.fixture
async def hosts() -> AsyncIterator[Callable[..., Awaitable[tuple[SimHypervisor, SimHypervisor]]]]:
    async with AsyncExitStack() as stack:

        async def make(*guests: SimGuest, **config: Any) -> tuple[SimHypervisor, SimHypervisor]:
            a = await stack.enter_async_context(host("a", *guests, **config))
            return a, await stack.enter_async_context(host("b", **config))

        yield make


Hosts = Callable[..., Awaitable[tuple[SimHypervisor, SimHypervisor]]]


# --- whole migrations -------------------------------------------------------------------------------------------------


async def test_finish_armed_early_starts_the_guest_by_itself(hosts: Hosts) -> None:
    a, b = await hosts(web())
    move = Move(a, b)
    await move.prepare()
    assert move.prepared.uri == f"tcp://{move.address}:49152"
    waiting = await b.get_domain(UUID)
    assert (waiting.incoming, waiting.job, state_text(waiting)) == (True, Job.INCOMING, "paused (migration)")
    finishing = move.finish()
    performed = await move.perform()
    finished = await finishing
    assert state_text(await b.get_domain(UUID)) == "running (migrated)"
    arrived = await b.get_domain(UUID)
    assert (arrived.persistent, arrived.incoming, arrived.job) == (True, False, Job.NONE)
    assert state_text(await facts(a)) == "paused (migration)"
    assert performed.final.processed_bytes >= 4 * MIB
    assert performed.final.remaining_bytes == 0
    await move.out.remove(finished.cookie, move.options)
    await move.out.remove(finished.cookie, move.options)
    assert await a.list_domains() == []
    assert [d.name for d in await b.list_domains()] == ["web"]


async def test_without_finish_the_whole_copy_waits_and_both_are_paused(hosts: Hosts) -> None:
    a, b = await hosts(web())
    move = Move(a, b)
    await move.prepare()
    await move.perform()
    assert (state_text(await facts(a)), state_text(await facts(b))) == ("paused (migration)", "paused (migration)")
    await move.finish()
    assert state_text(await facts(b)) == "running (migrated)"


async def test_finish_is_idempotent_on_its_handle_and_fails_on_a_new_one(hosts: Hosts) -> None:
    a, b = await hosts(web())
    move = Move(a, b)
    await move.whole()
    await move.finish()
    assert state_text(await facts(b)) == "running (migrated)"
    move.into = b.incoming(UUID)
    with pytest.raises(HypervisorError, match="not being migrated"):
        await move.finish()


async def test_a_guest_migrates_there_and_back(hosts: Hosts) -> None:
    a, b = await hosts(web())
    await Move(a, b).whole()
    await Move(b, a).whole()
    assert (state_text(await facts(a)), state_text(await facts(b))) == ("running (migrated)", "none")


async def test_a_renamed_guest_keeps_its_uuid(hosts: Hosts) -> None:
    a, b = await hosts(web())
    arrived = await Move(a, b, name="web-2").whole()
    assert (arrived.name, arrived.uuid) == ("web-2", UUID)


async def test_definitions_are_kept_or_removed_as_requested(hosts: Hosts) -> None:
    a, b = await hosts(web())
    arrived = await Move(a, b, Options(undefine_source=False, persist_destination=False)).whole()
    assert not arrived.persistent
    assert state_text(await facts(a)) == "shutoff (migrated)"


async def test_a_definition_at_the_destination_outlives_a_copy_that_fails(hosts: Hosts) -> None:
    a, b = await hosts(web())
    await Move(a, b, Options(undefine_source=False)).whole()
    back = Move(b, a)
    await back.prepare()
    assert state_text(await facts(a)) == "paused (migration)"
    await back.into.close()
    assert state_text(await facts(a)) == "shutoff (failed)"


@pytest.mark.parametrize(
    ("state", "options"), [("paused", Options()), ("running", Options(paused=True))], ids=["by its user", "by option"]
)
async def test_a_guest_arrives_paused(hosts: Hosts, state: str, options: Options) -> None:
    a, b = await hosts(web(state=state))
    assert state_text(await Move(a, b, options).whole()) == "paused (user)"


async def test_a_guest_that_is_not_live_is_stopped_during_the_transfer(hosts: Hosts) -> None:
    a, b = await hosts(slow())
    move = Move(a, b, Options(live=False))
    await move.prepare()
    performing = move.perform()
    await move.flow()
    assert state_text(await facts(a)) == "paused (migration)"
    await move.out.abort()
    with pytest.raises(HypervisorError):
        await performing
    assert state_text(await facts(a)) == "running (migration canceled)"


async def test_an_offline_migration_moves_the_definition(hosts: Hosts) -> None:
    a, b = await hosts(web(state="shutoff"))
    arrived = await Move(a, b, Options(offline=True)).whole_offline()
    assert (state_text(arrived), arrived.persistent) == ("shutoff (migrated)", True)
    assert await a.list_domains() == []


# --- while it runs ----------------------------------------------------------------------------------------------------


async def test_progress_and_bandwidth(hosts: Hosts) -> None:
    a, b = await hosts(slow())
    move = Move(a, b, bandwidth=50 * MIB)
    assert await move.out.progress() is None
    await move.prepare()
    performing = move.perform()
    await move.flow()
    reading = await a.outgoing(UUID).progress()
    assert reading is not None
    assert (reading.iteration, reading.rate, reading.total_bytes) == (1, 50 * MIB, 100_000 * MIB)
    await a.outgoing(UUID).set_bandwidth(20 * MIB)
    await until(move.out.progress, lambda progress: progress.rate == 20 * MIB)
    await a.outgoing(UUID).set_bandwidth(0)
    await until(move.out.progress, lambda progress: progress.rate == 1_000_000_000)
    await move.out.abort()
    await asyncio.gather(performing, return_exceptions=True)


async def test_8_7_a_limit_and_a_downtime_are_read_back(hosts: Hosts) -> None:
    a, b = await hosts(slow())
    move = Move(a, b, bandwidth=50 * MIB)
    with pytest.raises(NoTransfer):
        await move.out.set_max_downtime(1.0)
    await move.prepare()
    performing = move.perform()
    await move.flow()
    assert await move.out.set_bandwidth(20 * MIB + 5) == 20 * MIB
    assert await move.out.set_bandwidth(0) == 0
    assert await move.out.set_max_downtime(0.25) == 0.25
    with pytest.raises(Incompatible):
        await move.out.set_bandwidth(MIB - 1)
    await move.out.abort()
    await asyncio.gather(performing, return_exceptions=True)


async def test_two_migrations_share_the_link(hosts: Hosts) -> None:
    a, b = await hosts(slow(), slow(name="db"), link_rate=300 * MIB)
    moves = [Move(a, b, bandwidth=100 * MIB), Move(a, b, uuid=uuid_of("db"))]
    for move in moves:
        await move.prepare()
    tasks = [move.perform() for move in moves]
    for move, rate in zip(moves, [100 * MIB, 200 * MIB], strict=True):
        await until(move.out.progress, lambda p, rate=rate: p is not None and p.rate == rate)  # type: ignore[misc]
    await moves[0].out.abort()
    await until(moves[1].out.progress, lambda p: p.rate == 300 * MIB)
    await moves[1].out.abort()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_8_0_two_migrations_share_the_link_of_their_destination(hosts: Hosts) -> None:
    a, b = await hosts(slow(), slow(name="db"), incoming_link_rate=300 * MIB)
    moves = [Move(a, b), Move(a, b, uuid=uuid_of("db"))]
    for move in moves:
        await move.prepare()
    tasks = [move.perform() for move in moves]
    for move in moves:
        await until(move.out.progress, lambda p: p is not None and p.rate == 150 * MIB)
    await moves[0].out.set_bandwidth(100 * MIB)  # the destination does not know of it, so the other one gains nothing
    await until(moves[0].out.progress, lambda p: p.rate == 100 * MIB)
    await moves[0].out.abort()
    await until(moves[1].out.progress, lambda p: p.rate == 300 * MIB)
    await moves[1].out.abort()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_cancelling_the_await_leaves_perform_running(hosts: Hosts) -> None:
    a, b = await hosts(web())
    move = Move(a, b)
    await move.prepare()
    performing = move.perform()
    await asyncio.sleep(0)
    performing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await performing
    await move.out.close()
    waiting = await until(lambda: facts(a), lambda domain: domain.job is Job.NONE)
    assert state_text(waiting) == "paused (migration)"
    await move.finish()
    assert state_text(await facts(b)) == "running (migrated)"
    await a.outgoing(UUID).remove(b"", Options())
    assert await a.list_domains() == []


async def test_cancelling_the_await_leaves_finish_armed(hosts: Hosts) -> None:
    a, b = await hosts(web())
    move = Move(a, b)
    await move.prepare()
    finishing = move.finish()
    await asyncio.sleep(0.01)
    finishing.cancel()
    await asyncio.gather(finishing, return_exceptions=True)
    await move.into.close()
    await move.perform()
    await until(lambda: facts(b), lambda domain: state_text(domain) == "running (migrated)")


async def test_events_of_a_migration_in_order(hosts: Hosts) -> None:
    a, b = await hosts(web())
    at_a, at_b = a.events(), b.events()
    await Move(a, b).whole()
    await a.close()
    await b.close()
    assert [(e.kind, e.detail) async for e in at_a if e.kind != "job"] == [
        ("suspended", "migration"),
        ("stopped", "migrated"),
    ]
    assert [(e.kind, e.detail) async for e in at_b] == [("started", "migration"), ("resumed", "migrated")]


# --- post-copy --------------------------------------------------------------------------------------------------------


async def test_post_copy_runs_at_the_destination_at_once(hosts: Hosts) -> None:
    a, b = await hosts(slow())
    move = Move(a, b, bandwidth=MIB)
    await move.prepare()
    finishing, performing = move.finish(), move.perform()
    await move.flow()
    await move.out.start_postcopy()
    there = await until(lambda: facts(b), lambda domain: domain.state is DomainState.RUNNING)
    assert (there.reason, there.postcopy, there.incoming) == ("post-copy", True, False)
    assert state_text(await facts(a)) == "paused (post-copy)"
    with pytest.raises(HypervisorError, match="post-copy"):
        await move.out.abort()
    with pytest.raises(HypervisorError):
        await move.into.abandon()
    assert (await performing).final.postcopy
    with pytest.raises(DomainBusy):
        await move.out.remove(b"", Options())
    await a.outgoing(UUID).set_bandwidth(1 << 50)
    a._host.link.rate = 1 << 50
    a._host.link.divide()
    await finishing
    assert state_text(await facts(b)) == "running (migrated)"
    await until(lambda: facts(a), lambda domain: not domain.postcopy)
    with pytest.raises(HypervisorError):
        await move.out.resume()
    await move.out.remove(b"", Options())
    assert await a.list_domains() == []


async def test_post_copy_that_was_not_armed_is_refused(hosts: Hosts) -> None:
    a, b = await hosts(slow())
    move = Move(a, b, Options(post_copy=False))
    with pytest.raises(HypervisorError, match="no transfer"):
        await move.out.start_postcopy()
    await move.prepare()
    performing = move.perform()
    await move.flow()
    with pytest.raises(HypervisorError, match="not armed"):
        await move.out.start_postcopy()
    await move.out.abort()
    await asyncio.gather(performing, return_exceptions=True)


# --- the host ---------------------------------------------------------------------------------------------------------


async def test_info_and_incompatibilities_of_a_host(hosts: Hosts) -> None:
    a, b = await hosts(web(machine="pc-new", cpu="cpu-new"))
    _: Hypervisor = a  # for the type checker: the simulator implements the interface
    info = await a.info()
    assert (info.driver, info.host_uuid, info.features.ports) == ("sim", "a", (49_152, 49_215))
    needs = (await a.describe(UUID))[1]
    assert await b.incompatibilities(needs) == [
        "machine type pc-new is not supported here",
        "CPU model cpu-new is not supported here",
    ]
    with pytest.raises(Incompatible, match="pc-new"):
        await Move(a, b).prepare()


async def lines_of(log: Path) -> int:
    return log.read_text().count("\n") if log.exists() else 0


async def test_a_serial_log_continues_without_a_gap_or_a_repeat(hosts: Hosts, tmp_path: Path) -> None:
    log = tmp_path / "web.log"
    a, b = await hosts(web(log=str(log)), log_root=str(tmp_path))
    await until(lambda: lines_of(log), lambda count: count >= 3)
    await Move(a, b).whole()
    before = await lines_of(log)
    await until(lambda: lines_of(log), lambda count: count >= before + 2)
    await b.close()
    lines = log.read_text().splitlines()
    assert lines[0] == "BOOT 4 1024 100"
    numbers = [int(line.split()[1]) for line in lines if line.startswith("S ")]
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) > 3
    assert len(log.with_suffix(".stamps").read_text().splitlines()) == len(lines)
