import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import cast

import pytest

from agent.runtime.errors import DroverError, Reason
from coordinator.client import (
    Busy,
    Client,
    DeadlineExceeded,
    DroverClientError,
    HostState,
    InvalidRequest,
    Migration,
    MigrationCancelled,
    MigrationFailed,
    MigrationState,
    NotFound,
    Options,
    OutcomeUnknown,
    Refused,
    ServerFailed,
    Unreachable,
)
from coordinator.client.errors import client_error, raise_unless_succeeded
from drover.agent.v1 import migration_pb2 as pb
from tests.unit.fake_server import MIB, FakeMigrations, serve_agent, serve_coordinator

UUID = "0b6f3c1e-8f0a-4c57-9a53-1f5d2f0c9a11"


@pytest.fixture
async def fake() -> FakeMigrations:
    return FakeMigrations()  # type: ignore[abstract]


@pytest.fixture
async def client(tmp_path: Path, fake: FakeMigrations) -> AsyncIterator[Client]:
    server = await serve_coordinator(f"unix:{tmp_path}/c.sock", fake)
    async with Client(server.addresses[0], timeout=5) as client:
        yield client
    await server.stop(0)


@pytest.fixture
async def agent_client(tmp_path: Path, fake: FakeMigrations) -> AsyncIterator[Client]:
    server = await serve_agent(f"unix:{tmp_path}/a.sock", fake)
    async with Client(server.addresses[0], timeout=5) as client:
        yield client
    await server.stop(0)


async def test_migrate_returns_when_it_is_done(client: Client, fake: FakeMigrations) -> None:
    migration = await client.migrate(
        "vm1", "b", source="a", name="vm2", network="mig0", bandwidth=1000, options={"live": False}, migration_id=UUID
    )
    assert (migration.id, migration.state, migration.runs_on) == (UUID, MigrationState.SUCCEEDED, "b")
    assert migration.duration == 0.5
    assert migration.overhead == pytest.approx(0.01)
    assert migration.progress is not None
    assert (migration.progress.downtime, migration.progress.total_bytes) == (0.023, 64 * MIB)
    assert [timing.phase for timing in migration.timings] == ["begin", "prepare", "perform", "finish"]
    assert not fake.started[0].HasField("slot_wait") or not fake.started[0].slot_wait.ToNanoseconds()
    spec = fake.started[0].spec
    assert (spec.source_host, spec.destination_name, spec.network, spec.bandwidth_bytes_per_second) == ("a", "vm2", "mig0", 1000)
    assert spec.options.HasField("live")
    assert not spec.options.live
    assert not spec.options.HasField("paused")


async def test_7_a_start_may_wait_for_its_slot(client: Client, fake: FakeMigrations) -> None:
    started = await client.start_migration("waits", "b", slot_wait=60.5)
    assert fake.started[0].slot_wait.ToMilliseconds() == 60_500
    async with aclosing(client.watch_migration(started.id)) as changes:
        waits = [(migration.wait_reason, migration.waiting_for) async for migration in changes]
    assert waits[1] == ("slot", "an incoming slot of b: 2 of 2 are taken")
    assert waits[-1] == ("unspecified", "")


async def test_an_id_is_made_where_none_is_given(client: Client) -> None:
    first, second = await client.start_migration("vm1", "b"), await client.start_migration("vm1", "b")
    assert len(first.id) == 36
    assert first.id != second.id


@pytest.mark.parametrize(
    ("guest", "kind", "reason"),
    [
        ("busy", Busy, "BUSY"),
        ("ghost", NotFound, "DOMAIN_NOT_FOUND"),
        ("stopped", Refused, "DOMAIN_NOT_RUNNING"),
        ("far", Unreachable, "HOST_UNREACHABLE"),
        ("bug", ServerFailed, "INTERNAL"),
        ("x" * 300, InvalidRequest, "FIELD_TOO_LARGE"),
    ],
)
async def test_refusals(client: Client, guest: str, kind: type[DroverClientError], reason: str) -> None:
    with pytest.raises(kind) as caught:
        await client.start_migration(guest, "b")
    assert caught.value.reason == reason
    assert isinstance(caught.value, DroverClientError)
    if kind is Busy:
        assert (caught.value.retry_after, caught.value.metadata["limit"]) == (7.0, "2")


@pytest.mark.parametrize(("guest", "kind"), [("fails", MigrationFailed), ("lost", OutcomeUnknown)])
async def test_ends_without_success_carry_the_migration(client: Client, guest: str, kind: type[DroverClientError]) -> None:
    started = await client.start_migration(guest, "b")
    with pytest.raises(kind) as caught:
        await client.wait(started.id, unknown_patience=0.05)
    assert caught.value.migration is not None
    assert caught.value.migration.id == started.id
    assert caught.value.reason in ("TRANSFER_FAILED", "OUTCOME_UNKNOWN")


async def test_cancel(client: Client, fake: FakeMigrations) -> None:
    started = await client.start_migration("long", "b")
    waiting = asyncio.create_task(client.wait(started.id))
    async with aclosing(client.watch_migration(started.id)) as changes:
        await anext(changes)
    assert (await client.cancel_migration(started.id)).state is MigrationState.CANCELLED
    with pytest.raises(MigrationCancelled):
        await asyncio.wait_for(waiting, 5)
    assert (await client.cancel_migration(started.id)).state is MigrationState.CANCELLED


async def test_watch_shows_every_change_once_and_leaving_it_ends_the_stream(client: Client, fake: FakeMigrations) -> None:
    started = await client.start_migration("vm1", "b")
    revisions = [migration.revision async for migration in client.watch_migration(started.id)]
    assert revisions == [1, 2, 3, 4, 5, 6]
    long = await client.start_migration("long", "b")
    async with aclosing(client.watch_migration(long.id)) as changes:
        async for _ in changes:
            break
    async with asyncio.timeout(5), fake.changed:
        await fake.changed.wait_for(lambda: fake.open_watches == 0)


async def test_watch_goes_on_from_the_last_revision_when_it_is_dropped(client: Client, fake: FakeMigrations) -> None:
    started = await client.start_migration("drops", "b")
    revisions = [migration.revision async for migration in client.watch_migration(started.id)]
    assert revisions == [1, 2, 3, 4]
    assert [watch.from_revision for watch in fake.watches] == [0, 2, 3]


async def test_watch_survives_a_restart_of_the_server(tmp_path: Path, fake: FakeMigrations) -> None:
    address = f"unix:{tmp_path}/c.sock"
    server = await serve_coordinator(address, fake)
    async with Client(address, timeout=5) as client, asyncio.timeout(20):
        started = await client.start_migration("long", "b")
        async with aclosing(client.watch_migration(started.id)) as changes:
            assert (await anext(changes)).state is MigrationState.PENDING
            assert (await anext(changes)).phase == "perform"
            following = asyncio.create_task(anext(changes))
            await server.stop(0)
            server = await serve_coordinator(address, fake)
            await client.cancel_migration(started.id)
            assert (await following).state is MigrationState.CANCELLED
    await server.stop(0)


async def test_watch_gives_up_after_its_bound(tmp_path: Path, fake: FakeMigrations) -> None:
    server = await serve_coordinator(f"unix:{tmp_path}/c.sock", fake)
    async with Client(server.addresses[0], timeout=2) as client:
        started = await client.start_migration("long", "b")
        async with aclosing(client.watch_migration(started.id, reconnect=0.3)) as changes:
            await anext(changes)
            await anext(changes)
            await server.stop(0)
            with pytest.raises(Unreachable):
                await asyncio.wait_for(anext(changes), 5)


async def test_a_server_that_is_not_there_is_unreachable_soon(tmp_path: Path) -> None:
    async with Client(f"unix:{tmp_path}/none.sock") as client:
        calls = (client.list_hosts(), client.get_migration(UUID), client.wait(UUID), client.start_migration("a", "b"))
        for error in await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 10):
            assert isinstance(error, Unreachable)
            assert "none.sock cannot be reached: No such file" in str(error)


async def test_deadlines(tmp_path: Path, fake: FakeMigrations) -> None:
    server = await serve_coordinator(f"unix:{tmp_path}/c.sock", fake)
    async with Client(server.addresses[0], start_timeout=1) as client:
        with pytest.raises(DeadlineExceeded):
            await client.start_migration("slow", "b")
        client.start_timeout = 5
        with pytest.raises(DeadlineExceeded, match="it goes on") as caught:
            await client.migrate("long", "b", timeout=1)
        assert caught.value.migration is not None
    await server.stop(0)


async def test_migrations_are_listed_and_got(client: Client) -> None:
    first, second = await client.start_migration("vm1", "b"), await client.start_migration("vm2", "b")
    assert [migration.id for migration in await client.list_migrations()] == [second.id, first.id]
    assert (await client.get_migration(first.id)).domain == "vm1"
    with pytest.raises(NotFound):
        await client.get_migration(UUID)


async def test_hosts_and_guests_of_a_cluster(client: Client) -> None:
    hosts = await client.list_hosts()
    assert [(host.name, host.state) for host in hosts] == [("a", HostState.UP), ("b", HostState.UNREACHABLE)]
    host = await client.get_host("a")
    assert host.option_support == {"live": "supported", "rdma": "unsupported"}
    assert host.networks[0].line_rate == 125_000_000
    domains = await client.list_domains()
    assert [(domain.name, domain.host) for domain in domains] == [("vm1", "a")]
    assert domains.unreachable_hosts == ("b",)
    with pytest.raises(NotFound):
        await client.get_host("z")


async def test_an_agent_answers_the_same_questions(agent_client: Client) -> None:
    assert [host.name for host in await agent_client.list_hosts()] == ["a"]
    assert (await agent_client.get_host("a")).address == agent_client.address
    assert [domain.host for domain in await agent_client.list_domains()] == ["a"]
    assert (await agent_client.migrate("vm1", "b")).state is MigrationState.SUCCEEDED
    for call in (agent_client.get_host("b"), agent_client.list_domains("b")):
        with pytest.raises(NotFound, match='own host "a"'):
            await call


async def test_mistakes_that_need_no_server(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="not an IP address"):
        async with Client("there:1"):
            pass
    with pytest.raises(RuntimeError, match="not open"):
        await Client("unix:/x").list_migrations()
    async with Client(f"unix:{tmp_path}/none.sock") as client:
        with pytest.raises(InvalidRequest, match='did you mean "post_copy"'):
            await client.start_migration("a", "b", options=cast(Options, {"postcopy": True}))
        with pytest.raises(InvalidRequest, match='"live": expected on or off'):
            await client.start_migration("a", "b", options=cast(Options, {"live": 1}))


@pytest.mark.parametrize("reason", list(Reason))
def test_every_reason_has_its_exception(reason: Reason) -> None:
    error = client_error(DroverError(reason, "so", metadata={"a": "b"}))
    assert type(error) is not DroverClientError
    assert (error.reason, error.message, error.metadata) == (reason, "so", {"a": "b"})


@pytest.mark.parametrize(("runs_on", "says"), [("h1", '"vm1" runs on h1'), ("", '"vm1" runs nowhere')])
def test_a_failed_migration_says_where_the_guest_runs(runs_on: str, says: str) -> None:
    ended = pb.Migration(migration_id=UUID, domain_name="vm1", source_host="h1", runs_on=runs_on, state=pb.MIGRATION_STATE_FAILED)
    with pytest.raises(MigrationFailed, match=says):
        raise_unless_succeeded(Migration.from_proto(ended))
