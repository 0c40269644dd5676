"""Where events come from: records, slots, decisions, statements, migrations, hosts, calls."""

import asyncio
import base64
import itertools
import os
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
import pytest

from agent.hypervisor.base import HypervisorInfo
from agent.runtime.errors import DroverError, Reason
from agent.runtime.events import (
    Bus,
    CallFailed,
    CallHandled,
    DriverDecided,
    Event,
    HostChanged,
    MigrationChanged,
    RecordChanged,
    SlotChanged,
    StatementChanged,
)
from agent.service import host as host_module
from agent.service.channel import open_channel
from agent.service.host import AgentHost
from agent.service.migration_service import SERVICE, MigrationServicer
from agent.service.server import start_server
from coordinator.hosts.hosts import HostRegistry
from coordinator.store import MemoryStore
from drover.agent.v1 import handshake_pb2
from drover.agent.v1 import migration_pb2 as pb
from drover.agent.v1 import migration_pb2_grpc as rpc
from tests.unit.asking import CANCELLED, ID, fails, finished, reserve, statement
from tests.unit.asking import until as so
from tests.unit.fake_agents import UNREACHABLE, UP, register, until
from tests.unit.fake_directory import Driving
from tests.unit.fake_hypervisor import FEATURES, UUID
from tests.unit.test_interceptor import failure
from tests.unit.test_migrations_doubt import flowing, in_doubt
from tests.unit.two_agents import JOURNAL_DOWN, Agent, Pair

E = TypeVar("E", bound=Event)


class RecordCache:
    """All events of a bus, from its creation on."""

    def __init__(self, bus: Bus) -> None:
        self.all: list[Event] = []
        publish = bus.publish

        def heard(event: Event) -> None:
            self.all.append(event)
            publish(event)

        bus.publish = heard  # type: ignore[method-assign]

    def of(self, kind: type[E]) -> list[E]:
        return [event for event in self.all if isinstance(event, kind)]


# --- records and slots ------------------------------------------------------------------------------------------------


async def test_7_a_record_is_told_once_it_is_durable(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the moment of each event, the journal has that state."""
    told: list[tuple[str, str]] = []

    def watch(agent: Agent) -> None:
        def publish(event: Event) -> None:
            if isinstance(event, RecordChanged):
                told.append((event.state, agent.durable.state))

        monkeypatch.setattr(agent.bus, "publish", publish)

    for agent in (pair.source, pair.destination):
        watch(agent)
    await finished(pair.driver())
    pair.moved()
    assert [state for state, durable in told if state != durable] == []
    written = [call.split()[1] for agent in (pair.source, pair.destination) for call in agent.calls if call.startswith("journal")]
    assert sorted(state for state, _ in told) == sorted(written)


async def test_7_a_record_that_could_not_be_written_is_not_told(pair: Pair) -> None:
    heard = RecordCache(pair.destination.bus)
    pair.destination.journal.fails = [JOURNAL_DOWN]
    await fails(pair.destination.engine.reserve_slot(reserve()), Reason.JOURNAL_UNAVAILABLE)
    assert not heard.of(RecordChanged)
    assert [event.change for event in heard.of(SlotChanged)] == ["taken", "freed"]  # it holds one until it knows
    await pair.destination.engine.reserve_slot(reserve())
    assert [(event.state, event.was) for event in heard.of(RecordChanged)] == [("reserved", "")]


async def test_7_a_record_and_its_slot_say_what_they_are_about_and_why_they_end(pair: Pair) -> None:
    heard = RecordCache(pair.destination.bus)
    driver = pair.driver()
    await driver.reserve()
    driver.view.cancel(CANCELLED)
    await finished(driver)
    reserved, *_, gone = heard.of(RecordChanged)
    assert reserved == RecordChanged(
        ID, 1, role="destination", state="reserved", was="", peer_host="h1", domain_uuid=UUID, waiting_for=""
    )
    assert (gone.state, gone.reason) == ("gone", "GIVEN_UP")
    assert heard.of(SlotChanged) == [
        SlotChanged(migration_id=ID, direction="incoming", slot_kind="transferring", change="taken", in_use=1, limit=2),
        SlotChanged(migration_id=ID, direction="incoming", slot_kind="transferring", change="freed", in_use=0, limit=2),
    ]


async def test_7_a_slot_of_an_earlier_life_is_told_when_it_is_free(pair: Pair) -> None:
    await pair.destination.engine.reserve_slot(reserve())
    await pair.destination.restart()
    heard = RecordCache(pair.destination.bus)
    driver = pair.driver()
    driver.view.cancel(CANCELLED)
    await driver.resume()
    await finished(driver)
    assert heard.of(SlotChanged) == [
        SlotChanged(migration_id=ID, direction="incoming", slot_kind="transferring", change="freed", in_use=0, limit=2)
    ]


async def test_7_an_attempt_that_never_had_a_slot_frees_none(pair: Pair) -> None:
    heard = RecordCache(pair.destination.bus)
    driver = pair.driver()
    driver.view.cancel(CANCELLED)
    await finished(driver)
    assert [event.state for event in heard.of(RecordChanged)] == ["gone"]
    assert not heard.of(SlotChanged)


async def test_7_no_event_holds_a_cookie_xml_or_the_name_of_a_driver(pair: Pair) -> None:
    heard = [RecordCache(agent.bus) for agent in (pair.source, pair.destination)]
    begun: list[handshake_pb2.BeginResponse] = []

    def answer(response: handshake_pb2.BeginResponse) -> handshake_pb2.BeginResponse:
        response.cookie_out = b"s3cret"
        begun.append(response)
        return response

    pair.to_source.answer["begin"] = answer
    driver = pair.driver()
    await finished(driver)
    told = " ".join(msgspec.json.encode(event).decode() for each in heard for event in each.all)
    assert ID in told
    assert pair.destination.hypervisor.arguments["prepare"][:2] == (begun[0].domain_xml, b"s3cret")
    for secret in ("s3cret", base64.b64encode(b"s3cret").decode(), begun[0].domain_xml, "<", driver.calls.token):
        assert secret not in told


# --- the driver -------------------------------------------------------------------------------------------------------


async def test_7_a_driver_tells_each_new_decision_once(pair: Pair) -> None:
    heard = RecordCache(pair.source.bus)
    await finished(pair.driver())
    decisions = [(event.calls, event.source_state, event.destination_state) for event in heard.of(DriverDecided)]
    assert decisions[0] == (("reserve",), "", "")
    assert decisions[1] == (("begin",), "", "reserved")
    assert all(one[0] != other[0] for one, other in itertools.pairwise(decisions))
    assert {event.reason for event in heard.of(DriverDecided)} == {""}


async def test_7_a_call_that_failed_is_told_with_its_reason_and_so_is_giving_up(pair: Pair) -> None:
    heard = RecordCache(pair.source.bus)
    refusal = DroverError(Reason.BUSY, "all slots are taken" * 100)
    pair.to_destination.refuse = {"reserve_slot": [refusal]}
    await finished(pair.driver())
    (failed,) = heard.of(CallFailed)
    assert (failed.migration_id, failed.attempt, failed.call, failed.side, failed.reason) == (
        ID,
        1,
        "reserve",
        "destination",
        "BUSY",
    )
    assert failed.message == refusal.message[:1024]
    assert heard.of(DriverDecided)[-1].reason == "BUSY"


# --- migrations and statements ----------------------------------------------------------------------------------------


async def test_7_a_migration_is_told_at_each_change_of_its_state_and_not_at_each_reading(driving: Driving) -> None:
    heard = RecordCache(driving.pair.source.bus)
    await flowing(driving)
    for _ in range(5):
        driving.migrations.runner.tell(driving.migrations.collection.get(ID))
    driving.pair.wire.all_sent.set()
    await driving.ended(ID)
    told = heard.of(MigrationChanged)
    assert told[0].state == "pending"
    assert (told[-1].state, told[-1].source_host, told[-1].destination_host) == ("succeeded", "h1", "h2")
    assert all(one != other for one, other in itertools.pairwise(told))


async def test_7_a_migration_says_why_it_failed(driving: Driving) -> None:
    heard = RecordCache(driving.pair.source.bus)
    await in_doubt(driving)
    assert [(event.state, event.reason) for event in heard.of(MigrationChanged)][-1] == ("outcome_unknown", "OUTCOME_UNKNOWN")


async def test_7_a_statement_is_told_once_it_counts(driving: Driving) -> None:
    heard = RecordCache(driving.pair.source.bus)
    await in_doubt(driving)
    driving.log.fails = [JOURNAL_DOWN]
    await fails(driving.migrations.resolve(ID, statement("h2")), Reason.JOURNAL_UNAVAILABLE)
    assert not heard.of(StatementChanged)
    await driving.migrations.resolve(ID, statement("h2"))
    (made,) = heard.of(StatementChanged)
    assert (made.migration_id, made.change, made.dead_host, made.said_by) == (ID, "made", "h2", "root@admin1")
    assert made.message == statement("h2").reason


async def test_7_a_statement_that_is_refuted_is_told(pair: Pair) -> None:
    heard = RecordCache(pair.source.bus)
    view = pair.driver().view
    view.declare_dead("destination", statement("h2"))
    view.answered("source")
    assert not heard.all
    view.answered("destination")
    view.answered("destination")
    assert [(event.change, event.dead_host) for event in heard.of(StatementChanged)] == [("refuted", "h2")]


# --- hosts ------------------------------------------------------------------------------------------------------------


async def test_7_a_coordinator_tells_what_becomes_of_a_host(
    registry: HostRegistry, store: MemoryStore, bus: Bus, agents: Any
) -> None:
    heard = RecordCache(bus)
    agent = await agents("alpha")
    await register(registry, agent)
    await register(registry, agent)
    agent.change(incoming_in_use=1)
    await until(store, "alpha", lambda known: known.host.incoming_in_use == 1)
    await agent.stop()
    await until(store, "alpha", lambda known: known.state == UNREACHABLE)
    await agent.start()
    await register(registry, agent)
    await until(store, "alpha", lambda known: known.state == UP)
    await agent.stop()
    await until(store, "alpha", lambda known: known.state == UNREACHABLE)
    await registry.remove("alpha")
    changes = [(event.host, event.change, event.reason) for event in heard.of(HostChanged)]
    assert changes == [
        ("alpha", "registered", ""),
        ("alpha", "unreachable", "HOST_UNREACHABLE"),
        ("alpha", "up", ""),
        ("alpha", "unreachable", "HOST_UNREACHABLE"),
        ("alpha", "removed", ""),
    ]
    assert agent.address in heard.of(HostChanged)[0].message


async def test_7_an_agent_tells_once_that_its_hypervisor_has_changed(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = RecordCache(pair.source.bus)
    monkeypatch.setattr(host_module, "REFRESH_SECONDS", 0.0)
    older = HypervisorInfo("fake", "fake 0", "fake 1", "uuid of h1", FEATURES)
    host = AgentHost(older, pair.source.hypervisor, pair.source.engine, pair.source.bus)
    asked: list[str] = []
    info = pair.source.hypervisor.info

    async def count() -> HypervisorInfo:
        asked.append("info")
        return await info()

    monkeypatch.setattr(pair.source.hypervisor, "info", count)
    keeping = asyncio.create_task(host.keep_current())
    await so(lambda: len(asked) > 2)
    keeping.cancel()
    assert heard.all == [HostChanged("h1", change="hypervisor", message="fake 1, library fake 1, host UUID uuid of h1")]


# --- calls ------------------------------------------------------------------------------------------------------------


async def test_7_who_cancels_and_who_makes_a_statement_is_told_as_the_server_sees_it(driving: Driving, tmp_path: Any) -> None:
    bus = driving.pair.source.bus
    heard = RecordCache(bus)
    add: Callable[[Any], None] = lambda s: rpc.add_MigrationServiceServicer_to_server(MigrationServicer(driving.migrations), s)  # noqa: E731
    server = await start_server([f"unix:{tmp_path}/s", "127.0.0.1:0"], add, [SERVICE], bus)
    await flowing(driving)
    local, remote = [open_channel(address) for address in server.addresses]
    await rpc.MigrationServiceStub(local).GetMigration(pb.GetMigrationRequest(migration_id=ID))
    await rpc.MigrationServiceStub(local).CancelMigration(pb.CancelMigrationRequest(migration_id=ID))
    resolve = pb.ResolveMigrationRequest(migration_id=ID, statement=statement("h2"))
    await failure(rpc.MigrationServiceStub(remote).ResolveMigration(resolve))
    await local.close()
    await remote.close()
    await server.stop(0)
    cancel, refused = heard.of(CallHandled)
    assert (cancel.method, cancel.migration_id, cancel.right) == (f"/{SERVICE}/CancelMigration", ID, "migrate")
    assert (cancel.caller, cancel.reason) == (f"unix:uid={os.geteuid()}", "")
    assert (refused.right, refused.reason) == ("operate", "NOT_IN_DOUBT")
    assert refused.caller.startswith("127.0.0.1:")
