"""agent.migration.uptime, and the durations that are measured by it: issue 6, line 16."""

import time
from typing import Any, cast

import pytest

from agent.migration import uptime
from agent.runtime.events import Bus
from agent.runtime.wire import timestamp
from agent.service.migration_service import MigrationServicer
from coordinator.cli.follow import print_summary
from coordinator.client import Migration
from coordinator.hosts.host_table import PREFIX
from coordinator.hosts.hosts import HostRegistry
from coordinator.store import MemoryStore, Put
from drover.agent.v1 import host_pb2
from drover.agent.v1 import migration_pb2 as pb
from drover.coordinator.v1 import host_pb2 as cluster_pb2
from tests.unit.asking import ID
from tests.unit.fake_agents import UP, Clock, register, until
from tests.unit.fake_directory import Driving
from tests.unit.test_migrations import flowing

HOUR = 3600.0


def set_wall_clock(monkeypatch: pytest.MonkeyPatch, by: float) -> None:
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + by)


def start_the_machine_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uptime, "_boot_id", lambda: "another boot")


def seconds(duration: Any) -> float:
    return cast(float, duration.ToNanoseconds() / 1e9)


@pytest.mark.parametrize("by", [HOUR, -HOUR])
async def test_6_16_a_step_of_the_clock_while_the_driver_is_away_changes_no_duration(
    driving: Driving, monkeypatch: pytest.MonkeyPatch, by: float
) -> None:
    began = time.monotonic()
    await flowing(driving)
    set_wall_clock(monkeypatch, by)
    await driving.restart()
    driving.pair.wire.all_sent.set()
    ended = await driving.ended(ID)
    assert 0 < seconds(ended.duration) <= time.monotonic() - began + 0.1
    assert not ended.duration_is_least
    assert ended.create_time.ToNanoseconds() <= ended.commit_time.ToNanoseconds() <= ended.end_time.ToNanoseconds()


@pytest.mark.parametrize("by", [HOUR, -HOUR])
async def test_6_16_what_cannot_be_measured_is_not_told_as_measured(
    driving: Driving, monkeypatch: pytest.MonkeyPatch, by: float
) -> None:
    began = time.monotonic()
    await flowing(driving)
    set_wall_clock(monkeypatch, by)
    start_the_machine_again(monkeypatch)
    await driving.restart()
    driving.pair.wire.all_sent.set()
    ended = await driving.ended(ID)
    assert ended.duration_is_least
    assert 0 < seconds(ended.duration) <= time.monotonic() - began + 2.0  # the calls of the hypervisors are laid back from now
    assert ended.create_time.ToNanoseconds() <= ended.commit_time.ToNanoseconds() <= ended.end_time.ToNanoseconds()


def test_6_16_a_reader_is_told_where_a_duration_is_not_certain(capsys: pytest.CaptureFixture[str]) -> None:
    migration = pb.Migration(state=pb.MIGRATION_STATE_SUCCEEDED, domain_name="web1", duration_is_least=True)
    migration.duration.FromSeconds(3)
    migration.hypervisor_duration.FromSeconds(3)
    print_summary(Migration.from_proto(migration))
    said = capsys.readouterr().out
    assert "in at least 3 s" in said
    assert "is not measured" in said
    assert "overhead" not in said
    migration.duration_is_least = False
    print_summary(Migration.from_proto(migration))
    said = capsys.readouterr().out
    assert "in 3 s" in said
    assert "measured" not in said


async def test_6_16_each_answer_says_how_long_ago_by_the_servers_clock(driving: Driving, monkeypatch: pytest.MonkeyPatch) -> None:
    await flowing(driving)
    set_wall_clock(monkeypatch, HOUR)
    servicer, nobody = MigrationServicer(driving.migrations), cast(Any, None)
    which: dict[str, Any] = {"migration_id": ID}
    answers = [
        (await servicer.GetMigration(pb.GetMigrationRequest(**which), nobody)).migration,
        *(await servicer.ListMigrations(pb.ListMigrationsRequest(), nobody)).migrations,
        (await anext(servicer.WatchMigration(pb.WatchMigrationRequest(**which), nobody))).migration,
        (await servicer.CancelMigration(pb.CancelMigrationRequest(**which), nobody)).migration,
        (
            await servicer.StartMigration(
                pb.StartMigrationRequest(**which, spec=driving.migrations.collection.get(ID).migration.spec), nobody
            )
        ).migration,
    ]
    assert len(answers) == 5
    assert all(0 < seconds(answer.age) < 60 and not answer.age_by_wall_clock for answer in answers)
    assert not driving.migrations.collection.get(ID).migration.HasField("age"), "what is kept would be old"


def test_6_16_an_age_is_never_negative(monkeypatch: pytest.MonkeyPatch) -> None:
    migration = pb.Migration(create_time=timestamp(time.time() - 10))
    shown = uptime.with_age(migration)
    assert seconds(shown.age) == pytest.approx(10, abs=1)
    assert shown.age_by_wall_clock
    set_wall_clock(monkeypatch, -HOUR)
    assert seconds(uptime.with_age(migration).age) == 0
    assert uptime.seconds_since(uptime.uptime()) == pytest.approx(0, abs=1)
    start_the_machine_again(monkeypatch)
    assert uptime.seconds_since(pb.Uptime(boot_id="this boot")) is None


async def test_6_16_when_a_host_was_last_seen_is_measured_by_the_coordinator(
    registry: HostRegistry, store: MemoryStore, agents: Any, clock: Clock
) -> None:
    agent = await agents("alpha")
    await register(registry, agent)
    agent.change(incoming_in_use=1)
    await until(store, "alpha", lambda known: known.host.incoming_in_use == 1)
    clock.now += 90
    assert (await registry.get("alpha")).last_seen_age.seconds == 90
    assert [(host.last_seen_age.seconds, host.last_seen_by_wall_clock) for host in await registry.list_hosts()] == [(90, False)]


async def test_6_16_when_a_host_was_last_seen_in_an_earlier_life_is_told_by_the_wall_clock(store: MemoryStore, clock: Clock) -> None:
    host = host_pb2.Host(name="alpha", host_uuid="u")
    for name, seen in (("alpha", clock.now - 90), ("beta", clock.now + 90)):
        host.name = name
        known = cluster_pb2.ClusterHost(host=host, agent_address=f"unix:/none/{name}", state=UP, last_seen_time=timestamp(seen))
        await store.txn([], [Put(PREFIX + name, known.SerializeToString())])
    registry = HostRegistry(store, Bus(), 5.0, wall=clock.monotonic)
    await registry.open()
    assert [(host.last_seen_age.seconds, host.last_seen_by_wall_clock) for host in await registry.list_hosts()] == [
        (90, True),
        (0, True),
    ]
    await registry.close()
