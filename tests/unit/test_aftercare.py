"""agent.handshake.host.aftercare: a guest's autostart and its user's pause follow it, whatever dies in between."""

import asyncio

import pytest

from agent.handshake.host import attempts
from agent.handshake.host.records import AttemptRecord, Role, decode, encode
from agent.hypervisor.base import HypervisorError, Stored
from agent.migration.migration import FINAL
from agent.runtime.errors import Reason
from drover.agent.v1 import handshake_pb2 as pb
from drover.agent.v1 import migration_pb2
from tests.unit.asking import ID, begin, fails, finished, record, until
from tests.unit.fake_directory import Driving
from tests.unit.fake_hypervisor import DOCUMENT, UUID, FakeOutgoing, guest
from tests.unit.two_agents import Agent, Pair


def aftercare(agent: Agent) -> bool:
    return agent.durable.aftercare


async def settled(agent: Agent) -> None:
    await until(lambda: not aftercare(agent))


def has_autostart(pair: Pair) -> dict[str, bool]:
    return {agent.name: UUID in agent.hypervisor.autostarts for agent in (pair.source, pair.destination)}


async def test_6_2_autostart_travels_and_never_is_on_two_hosts(pair: Pair) -> None:
    pair.source.hypervisor.autostarts.add(UUID)
    pair.wire.all_sent.clear()
    running = asyncio.create_task(finished(pair.driver()))
    await pair.are("performing", "armed")
    assert has_autostart(pair) == {"h1": False, "h2": False}, "a host that reboots now must not start it"
    pair.wire.all_sent.set()
    await running
    await settled(pair.destination)
    assert has_autostart(pair) == {"h1": False, "h2": True}
    assert pair.source.calls.index("journal beginning") < pair.source.calls.index("autostart off") < pair.source.calls.index("begin")


async def test_6_2_a_guest_that_stays_has_its_autostart_again(pair: Pair) -> None:
    pair.source.hypervisor.autostarts.add(UUID)
    pair.source.hypervisor.fails["begin"].append(HypervisorError("no memory for the job"))
    await finished(pair.driver())
    pair.stayed()
    await settled(pair.source)
    assert has_autostart(pair) == {"h1": True, "h2": False}


async def test_6_2_a_restart_after_the_end_still_gives_the_autostart_back(pair: Pair) -> None:
    source = pair.source
    source.hypervisor.autostarts.add(UUID)
    source.hypervisor.fails_always["autostart on"] = HypervisorError("libvirtd is away")
    source.hypervisor.fails["begin"].append(HypervisorError("no memory for the job"))
    await finished(pair.driver())
    pair.stayed()
    await until(lambda: "autostart on" in source.calls)
    assert aftercare(source)
    assert not (await source.engine.list_records(pb.ListRecordsRequest(active_only=True))).records, "the migration has ended"
    del source.hypervisor.fails_always["autostart on"]
    await source.restart()
    await settled(source)
    assert has_autostart(pair) == {"h1": True, "h2": False}


async def test_6_15_who_comes_while_the_end_is_put_right_is_told_that_and_of_no_cancel(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "AFTERCARE_WITHIN", 0.05)
    source = pair.source
    source.hypervisor.autostarts.add(UUID)
    source.hypervisor.fails_always["autostart on"] = HypervisorError("libvirtd is away")
    source.hypervisor.fails["begin"].append(HypervisorError("no memory for the job"))
    await finished(pair.driver())
    await until(lambda: "libvirtd is away" in source.durable.waiting_for)
    later = pb.AttemptRef(migration_id=ID.replace("6f1c", "7f1c"), attempt=1)
    busy = await fails(source.engine.begin(begin(ref=later)), Reason.DOMAIN_BUSY)
    assert f"migration {ID} of guest web1 has ended, but the guest's settings are still being restored" in busy.message
    assert "libvirtd is away" in busy.message
    assert "cancel" not in busy.message


async def test_6_2_a_restart_after_the_commit_still_switches_the_autostart_on(pair: Pair) -> None:
    pair.source.hypervisor.autostarts.add(UUID)
    destination = pair.destination
    destination.hypervisor.fails_always["autostart on"] = HypervisorError("libvirtd is away")
    await finished(pair.driver())
    pair.moved()
    await until(lambda: "autostart on" in destination.calls)
    del destination.hypervisor.fails_always["autostart on"]
    await destination.restart()
    await settled(destination)
    assert has_autostart(pair) == {"h1": False, "h2": True}


async def test_6_2_a_definition_that_was_left_behind_does_not_start_by_itself(pair: Pair) -> None:
    pair.destination.hypervisor.put(guest(state="shutoff"))
    pair.destination.hypervisor.autostarts.add(UUID)
    pair.wire.all_sent.clear()
    running = asyncio.create_task(finished(pair.driver()))
    await pair.are("performing", "armed")
    assert has_autostart(pair) == {"h1": False, "h2": False}
    pair.wire.all_sent.set()
    await running
    await settled(pair.destination)
    assert has_autostart(pair) == {"h1": False, "h2": False}, "it does not start with its host at the source"


async def test_6_20_what_is_stored_goes_to_the_destination(pair: Pair) -> None:
    await finished(pair.driver())
    pair.moved()
    assert pair.destination.hypervisor.arguments["finish"][-1] == Stored(DOCUMENT)


async def test_6_21_a_guest_that_its_user_paused_on_the_way_is_paused_where_it_arrives(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeOutgoing, "user_pauses", True)
    driver = pair.driver()
    await finished(driver)
    await settled(pair.destination)
    assert pair.states == ("removed", "running")
    assert pair.destination.hypervisor.domains[UUID].state == "paused"
    assert driver.view.source_record is not None
    assert driver.view.source_record.paused_by_user
    assert (await pair.destination.record()).paused_by_user


async def test_6_21_a_guest_that_its_user_paused_on_the_way_is_paused_where_it_stays(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeOutgoing, "user_pauses", True)
    pair.wire.all_sent.clear()
    running = asyncio.create_task(finished(pair.driver()))
    await pair.are("performing", "armed")
    pair.wire.broken.set()
    await running
    assert pair.states == ("kept", "gone")
    await settled(pair.source)
    assert pair.source.hypervisor.domains[UUID].state == "paused"


@pytest.mark.parametrize("moves", [True, False])
async def test_6_21_its_end_is_told_once_it_is_paused(driving: Driving, monkeypatch: pytest.MonkeyPatch, *, moves: bool) -> None:
    """Not as it was for a moment before: the state that is shown at the end never changes."""
    monkeypatch.setattr(FakeOutgoing, "user_pauses", True)
    pair = driving.pair
    pair.wire.all_sent.clear()
    keeper = pair.destination if moves else pair.source
    held = keeper.hypervisor.held["suspend"] = asyncio.Event()
    await driving.migrations.start(ID, migration_pb2.MigrationSpec(domain="web1", destination_host="h2"))
    await pair.are("performing", "armed")
    (pair.wire.all_sent if moves else pair.wire.broken).set()
    await pair.are(*(("removed", "running") if moves else ("kept", "gone")))
    await until(lambda: "suspend" in keeper.calls)
    assert driving.migrations.collection.get(ID).migration.state not in FINAL
    held.set()
    ended = await driving.ended(ID)
    fact = ended.destination_guest if moves else ended.source_guest
    assert (ended.runs_on, fact.state, fact.reason) == ("", pb.GUEST_STATE_PAUSED, "user")


@pytest.mark.parametrize(("of_guest", "state"), [(UUID, "paused"), ("8b2f4f7e-0d5c-4a57-9c55-3c1f5a9e0002", "running")])
async def test_6_21_only_the_record_of_its_source_says_that_its_user_paused_it(pair: Pair, of_guest: str, state: str) -> None:
    pair.source.keep(record(Role.SOURCE, "performed", domain_uuid=of_guest, paused_by_user=True))
    pair.destination.keep(record(Role.DESTINATION, "running", aftercare=True))
    pair.destination.hypervisor.put(guest())
    await pair.destination.restart()
    await settled(pair.destination)
    assert pair.destination.hypervisor.domains[UUID].state == state


async def test_6_29_no_secret_of_a_guest_is_in_a_journal(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[bytes] = []

    def keep(one: AttemptRecord) -> bytes:
        written.append(encode(one))
        return written[-1]

    monkeypatch.setattr("agent.handshake.host.journal.encode", keep)
    await finished(pair.driver())
    pair.moved()
    assert len(written) > 10
    assert not [body for body in written if b"<domain" in body]
    assert not [one for one in map(decode, written) if one.domain_xml or one.cookies or one.stored]
