"""agent.migration.takeover: which agents it can call, and what a user can do to a migration that was taken over."""

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from structlog.testing import capture_logs

import agent.migration.migrations
from agent.admission.store import Place
from agent.admission.values import Direction, Kind
from agent.handshake.host.attempt import Attempt
from agent.handshake.host.records import Role
from agent.migration.attempts import MOST_WARNINGS
from agent.migration.takeover import WAITED, WARNING, take_over, take_over_waiting, waiting_taken_over
from agent.runtime.alongside import alongside
from agent.runtime.errors import Reason
from agent.runtime.wire import duration
from agent.service.peers import MAX_CHANNELS, Channels, other_side
from agent.service.remote_peer import RemotePeer
from drover.agent.v1 import handshake_pb2
from drover.agent.v1 import migration_pb2 as pb
from tests.unit.asking import ID, begin, finish, perform, prepare, record, reserve, statement, until
from tests.unit.fake_directory import Driving
from tests.unit.fake_hypervisor import UUID
from tests.unit.two_agents import Agent, Pair


@pytest.fixture
async def channels() -> AsyncIterator[Channels]:
    channels = Channels()
    yield channels
    await channels.close()


async def performing(address: str) -> tuple[Agent, Attempt]:
    """Return a source that sends memory to an agent at that address, which its driver gave it."""
    agent = Agent("h1")
    agent.keep(record(Role.SOURCE, "performing", peer_agent=address))
    await agent.engine.recover()
    return agent, agent.engine.active()[0]


@pytest.mark.parametrize("address", ["", "h2.example:7400", "10.91.0.2", "nonsense"])
async def test_an_agent_whose_address_is_none_is_not_asked(channels: Channels, driving: Driving, address: str) -> None:
    agent, attempt = await performing(address)
    with capture_logs() as logs:
        assert other_side(channels, attempt) is None
        take_over(attempt, driving.migrations, "h1", functools.partial(other_side, channels))
    assert driving.migrations.collection.list(active_only=False) == []
    assert [line["log_level"] for line in logs] == ["error"] * (3 if address else 1)
    await agent.close()


async def test_the_other_side_is_a_peer_at_its_address(channels: Channels) -> None:
    agent, attempt = await performing("127.0.0.1:1")
    assert isinstance(other_side(channels, attempt), RemotePeer)
    await agent.close()


async def left_alone(pair: Pair, driving: Driving, channels: Channels) -> Callable[[], None]:
    """Let a driver go away after Finish and h1 take over. Return a function that takes over once more."""
    pair.wire.all_sent.clear()
    h1, h2 = pair.source.engine, pair.destination.engine
    await h2.reserve_slot(reserve())
    await h1.begin(begin())
    await h2.prepare(prepare())
    await h1.perform(perform())
    await h2.finish(finish())
    again = functools.partial(take_over, h1.active()[0], driving.migrations, "h1", functools.partial(other_side, channels))
    again()
    return again


async def test_what_was_taken_over_is_driven_once_and_can_be_seen(pair: Pair, driving: Driving, channels: Channels) -> None:
    again = await left_alone(pair, driving, channels)
    task = driving.migrations.collection.get(ID).task
    again()
    assert driving.migrations.collection.get(ID).task is task
    shown = driving.migrations.collection.get(ID).migration
    assert (shown.domain_name, shown.source_host, shown.destination_host) == ("web1", "h1", "h2")
    assert list(shown.warnings) == [WARNING]
    pair.wire.all_sent.set()
    ended = await driving.ended(ID)
    assert (ended.state, ended.runs_on) == (pb.MIGRATION_STATE_SUCCEEDED, "h2")
    pair.moved()


async def test_what_was_taken_over_can_be_cancelled(pair: Pair, driving: Driving, channels: Channels) -> None:
    await left_alone(pair, driving, channels)
    await driving.migrations.cancel(ID)
    assert (await driving.ended(ID)).state == pb.MIGRATION_STATE_CANCELLED
    pair.stayed()


async def test_what_was_taken_over_can_be_resolved(pair: Pair, driving: Driving, channels: Channels) -> None:
    await left_alone(pair, driving, channels)
    pair.wire.starts.clear()
    pair.to_destination.cut = True
    pair.wire.all_sent.set()
    await until(lambda: driving.migrations.collection.get(ID).migration.state == pb.MIGRATION_STATE_OUTCOME_UNKNOWN)
    said: handshake_pb2.Statement = statement("h2")
    await driving.migrations.resolve(ID, said)
    ended = await driving.ended(ID)
    assert (ended.runs_on, ended.statement.said_by) == ("h1", "root@admin1")


async def test_addresses_that_anybody_names_do_not_pile_up(channels: Channels) -> None:
    first = channels.get("127.7.0.1:9")
    for number in range(2, MAX_CHANNELS + 2):
        channels.get(f"127.7.0.{number}:9")
    assert len(channels._open) == MAX_CHANNELS
    assert channels.get("127.7.0.1:9") is not first
    assert channels.get(f"127.7.0.{MAX_CHANNELS}:9") is channels.get(f"127.7.0.{MAX_CHANNELS}:9")


# --- migrations that wait ---------------------------------------------------------------------------------------------


def place_of(**fields: Any) -> Place:
    """Return the place at h1 of a migration as the coordinator has stored it."""
    stored = pb.Migration(
        migration_id=ID,
        spec=pb.MigrationSpec(domain="web1", destination_host="h2", wait_mode=pb.WAIT_MODE_WAIT),
        domain_uuid=UUID,
        source_host="h1",
        destination_host="h2",
        attempt=1,
        driver="co",
        revision=7,
        create_revision=3,
    )
    stored.slot_wait.CopyFrom(duration(60))
    stored.create_uptime.SetInParent()
    values: dict[str, Any] = {
        "direction": Direction.OUTGOING,
        "migration_id": ID,
        "place": 1,
        "kind": Kind.PREPARED,
        "peer": "h2",
        "importance": 2,
        "memory": 0,
        "since": 0.0,
        "driver": "co",
        "pending": stored.SerializeToString(),
        "peer_agent": "10.91.0.2:7400",
    }
    return Place(**{**values, **fields})


def test_8_2_one_that_waits_is_taken_over_by_the_guest_and_the_address_that_its_driver_knew() -> None:
    migration = waiting_taken_over(place_of(), "h1")
    spec = migration.spec
    assert (spec.domain, spec.source_host, spec.destination_host) == (UUID, "h1", "10.91.0.2:7400")
    assert (migration.driver, migration.revision, migration.create_revision) == ("h1", 0, 0)
    assert not migration.HasField("create_uptime"), "it is of the coordinator's machine"
    assert not migration.HasField("slot_duration"), "it has no slot yet"
    again = waiting_taken_over(place_of(pending=migration.SerializeToString()), "h1")
    assert list(again.warnings) == [WAITED]


def test_8_2_of_one_that_waits_only_what_its_driver_may_say_is_believed() -> None:
    """A statement would declare a host dead, a slot would let it resume a record that nobody has, another clock lets it wait."""
    stored = pb.Migration.FromString(place_of().pending)
    stored.state, stored.source_host = pb.MIGRATION_STATE_ACTIVE, "h9"
    stored.statements.add().CopyFrom(statement("h2"))
    stored.slot_duration.CopyFrom(duration(1))
    stored.create_time.FromSeconds(1 << 33)
    stored.warnings.extend(["a warning"] * 64)
    migration = waiting_taken_over(place_of(pending=stored.SerializeToString(), since=7.0), "h1")
    assert (migration.state, migration.source_host) == (pb.MIGRATION_STATE_PENDING, "h1")
    assert (list(migration.statements), migration.HasField("slot_duration")) == ([], False)
    assert migration.create_time.ToSeconds() == 7
    assert len(migration.warnings) == MOST_WARNINGS + 1


async def taken_over_wait(driving: Driving, **fields: Any) -> None:
    """Let h1 take over a migration whose destination does not answer."""
    stored = pb.Migration.FromString(place_of().pending)
    for name, value in fields.items():
        stored.ClearField(name)  # type: ignore[arg-type]
        stored.MergeFrom(pb.Migration(**{name: value}))
    silent: asyncio.Queue[Place] = asyncio.Queue()
    silent.put_nowait(place_of(pending=stored.SerializeToString(), since=time.time()))
    driving.pair.to_destination.cut = True
    async with alongside(take_over_waiting(silent, driving.migrations, "h1")):
        await until(silent.empty)


async def test_8_2_one_that_waits_for_a_host_that_never_answers_ends_by_its_time(driving: Driving) -> None:
    await taken_over_wait(driving, slot_wait=duration(0.2), state=pb.MIGRATION_STATE_ACTIVE, slot_duration=duration(1))
    ended = await driving.ended(ID)
    assert (ended.state, ended.failure.reason) == (pb.MIGRATION_STATE_FAILED, Reason.HOST_UNREACHABLE)


async def test_8_2_one_that_waits_for_a_host_that_never_answers_can_be_cancelled(driving: Driving) -> None:
    await taken_over_wait(driving, state=pb.MIGRATION_STATE_ACTIVE, slot_duration=duration(1))
    await until(lambda: driving.migrations.collection.find(ID))
    await driving.migrations.cancel(ID)
    assert (await driving.ended(ID)).state == pb.MIGRATION_STATE_CANCELLED


async def test_8_2_no_more_are_taken_over_than_may_wait(driving: Driving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent.migration.migrations, "MOST_WAITING", 1)
    await taken_over_wait(driving)
    await taken_over_wait(driving, migration_id="another")
    assert [entry.migration.migration_id for entry in driving.migrations.collection.all()] == [ID]
