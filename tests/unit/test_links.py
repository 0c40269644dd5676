"""agent.migration.links: who waits is planned again when links change, and may start while there is none (issue 8, point 5)."""

import time

import pytest

from agent.admission.values import Direction
from agent.migration.links import look
from agent.migration.takeover import waiting_taken_over
from agent.runtime.errors import Reason
from drover.agent.v1 import host_pb2
from drover.agent.v1 import migration_pb2 as pb
from tests.unit.asking import ADDRESSES, ID, fails, until
from tests.unit.fake_directory import Driving
from tests.unit.test_entry_first import waiting
from tests.unit.test_migrations import SPEC
from tests.unit.test_takeover import place_of


def set_link(driving: Driving, *, up: bool) -> None:
    """Take the only network of the destination down or up, and report that."""
    local = driving.pair.destination.engine.host
    for network in local.networks:
        network.down = not up
    driving.directory.changed.ring()


def shown(driving: Driving) -> pb.Migration:
    return driving.migrations.collection.get(ID).migration


async def test_8_5_a_start_that_may_wait_waits_for_its_only_network(driving: Driving) -> None:
    await driving.migrations.recover()
    set_link(driving, up=False)
    started = await driving.migrations.start(ID, SPEC, 60.0)
    assert (started.network, started.wait_reason) == ("", pb.WAIT_REASON_NETWORK)
    assert "it is down on h2" in started.waiting_for
    await until(lambda: shown(driving).wait.reason == pb.WAIT_REASON_NETWORK)
    assert driving.pair.to_source.count["acquire_slot"] == 0, "it takes no place while it cannot go"
    set_link(driving, up=True)
    ended = await driving.ended(ID)
    assert (ended.state, ended.network) == (pb.MIGRATION_STATE_SUCCEEDED, "mig")
    driving.pair.moved()


async def test_8_5_a_start_that_does_not_wait_is_refused_while_its_network_is_down(driving: Driving) -> None:
    set_link(driving, up=False)
    refused = await fails(driving.migrations.start(ID, SPEC), Reason.NETWORK_NOT_FOUND)
    assert refused.metadata["wait"] == "network"
    assert driving.log.rows == {}


async def test_8_5_a_start_that_waits_for_its_network_goes_on_after_a_restart(driving: Driving) -> None:
    set_link(driving, up=False)
    await driving.migrations.start(ID, SPEC, 60.0)
    await driving.restart()
    await until(lambda: "(retrying)" in shown(driving).waiting_for)
    assert shown(driving).wait_reason == pb.WAIT_REASON_NETWORK
    set_link(driving, up=True)
    assert (await driving.ended(ID)).state == pb.MIGRATION_STATE_SUCCEEDED


async def test_8_5_a_wait_for_a_network_ends_with_its_time(driving: Driving) -> None:
    set_link(driving, up=False)
    await driving.migrations.start(ID, SPEC, 0.3)
    ended = await driving.ended(ID)
    assert (ended.state, ended.runs_on) == (pb.MIGRATION_STATE_FAILED, "h1")
    assert "it is down on h2" in ended.failure.message


async def test_8_5_a_link_that_goes_down_and_up_is_seen_at_once_by_one_that_waits(
    driving: Driving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.handshake.drive.slots.poll_seconds", lambda _: 30.0)
    await driving.migrations.recover()
    await waiting(driving)
    book = driving.pair.destination.engine.desk.queues[Direction.INCOMING].book
    set_link(driving, up=False)
    await until(lambda: shown(driving).wait_reason == pb.WAIT_REASON_NETWORK, within=3)
    claim = book.find(ID)
    assert claim is not None
    assert (claim.slot, book.is_waiting(claim), claim.calls) == (None, True, 0), "it keeps its place, and holds up nobody"
    driving.pair.destination.room(1)
    set_link(driving, up=True)
    assert (await driving.ended(ID, within=10)).state == pb.MIGRATION_STATE_SUCCEEDED


async def test_8_5_what_else_a_host_reports_plans_nothing_again(driving: Driving) -> None:
    await waiting(driving)
    entry = driving.migrations.collection.get(ID)
    rung = entry.links_changed.next
    look(driving.migrations.collection, driving.directory)
    assert not rung.is_set()
    set_link(driving, up=False)
    for expected in (True, False):
        rung = entry.links_changed.next
        look(driving.migrations.collection, driving.directory)
        assert rung.is_set() is expected


async def test_8_2_one_that_was_taken_over_on_a_network_of_the_cluster_is_not_planned_again_for_ever(driving: Driving) -> None:
    """Its agent knows that network by the migration only."""
    driving.pair.destination.room(0)
    for agent in (driving.pair.source, driving.pair.destination):
        interface = host_pb2.Interface(name="eth1", addresses=[f"{ADDRESSES[agent.name]}/24"], up=True)
        agent.engine.host.interfaces = (interface,)
    stored = pb.Migration.FromString(place_of().pending)
    stored.network = stored.network_choice.network = "cluster"
    stored.network_choice.rules.cidrs.append("127.92.0.0/24")
    place = place_of(pending=stored.SerializeToString(), since=time.time())
    driving.migrations.take_over(waiting_taken_over(place, "h1"))
    await until(lambda: "are taken" in shown(driving).waiting_for)
    assert shown(driving).network == "cluster"
    rung = driving.migrations.collection.get(ID).links_changed.next
    look(driving.migrations.collection, driving.directory)
    assert not rung.is_set()
