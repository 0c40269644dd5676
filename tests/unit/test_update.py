"""UpdateMigration: what waits and what runs is changed durably, applied and read back (agent.migration.settings, .tuning)."""

import asyncio

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask

import agent.handshake.drive.slots
from agent.admission.values import Direction
from agent.handshake.drive.plan import Limits
from agent.migration.migration import Entry
from agent.migration.settings import check, limits_of, settings_of
from agent.runtime.errors import DroverError, Reason
from agent.runtime.masks import masked
from drover.agent.v1 import admission_pb2, handshake_pb2, host_pb2, options_pb2
from drover.agent.v1 import migration_pb2 as pb
from tests.unit.asking import ID, fails, until
from tests.unit.fake_directory import Driving
from tests.unit.test_migrations import SPEC, flowing
from tests.unit.test_slots_of_records import acquire
from tests.unit.two_agents import JOURNAL_DOWN

MIB = 1 << 20
FEATURES = options_pb2.MigrationFeatures(bandwidth=True, bandwidth_unit=MIB)


async def update(driving: Driving, **fields: object) -> pb.Migration:
    """Change the fields that are given."""
    return await driving.migrations.update(ID, pb.MigrationSettings(**fields), FieldMask(paths=list(fields)))  # type: ignore[arg-type]


def stored(driving: Driving) -> pb.Migration:
    return pb.Migration.FromString(driving.log.rows[ID][0])


def limits(driving: Driving) -> list[int]:
    """The limits that the hypervisor was told of the running transfer."""
    hypervisor = driving.pair.source.hypervisor
    return [value for call, value in hypervisor.told if call == "set_bandwidth"]


# --- the settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "guest", "network", "wanted"),
    [
        ((0, 0), (0, 0), 0, (0, 0)),
        ((0, 0), (2, 9), 0, (2, 9)),
        ((0, 0), (0, 0), 7, (0, 7)),
        ((0, 0), (0, 9), 7, (0, 9)),
        ((3, 8), (2, 9), 7, (3, 8)),
        ((0, 5), (6, 9), 0, (5, 5)),  # the guest's least gives way to the migration's own most
        ((6, 0), (0, 5), 0, (6, 6)),
        ((0, 0), (6, 0), 5, (6, 6)),
    ],
)
def test_8_7_the_migrations_own_word_goes_before_the_guests_and_that_before_the_networks(
    spec: tuple[int, int], guest: tuple[int, int], network: int, wanted: tuple[int, int]
) -> None:
    settings = settings_of(
        pb.MigrationSpec(min_bandwidth_bytes_per_second=spec[0], bandwidth_bytes_per_second=spec[1]),
        host_pb2.DomainSettings(min_bandwidth_bytes_per_second=guest[0], max_bandwidth_bytes_per_second=guest[1]),
        network,
    )
    assert (settings.min_bandwidth_bytes_per_second, settings.bandwidth_bytes_per_second) == wanted
    assert settings.importance == pb.IMPORTANCE_MEDIUM


@pytest.mark.parametrize(
    ("settings", "reason", "text"),
    [
        (
            pb.MigrationSettings(bandwidth_bytes_per_second=MIB, min_bandwidth_bytes_per_second=2 * MIB),
            Reason.INVALID_FIELD,
            "above",
        ),
        (pb.MigrationSettings(bandwidth_bytes_per_second=MIB - 1), Reason.BANDWIDTH_UNSUPPORTED, str(MIB)),
        (pb.MigrationSettings(min_bandwidth_bytes_per_second=1), Reason.BANDWIDTH_UNSUPPORTED, str(MIB)),
        (pb.MigrationSettings(max_downtime=Duration(nanos=999_999)), Reason.INVALID_FIELD, "0.001"),
    ],
)
def test_8_7_settings_that_cannot_be_enforced_are_refused(settings: pb.MigrationSettings, reason: Reason, text: str) -> None:
    with pytest.raises(DroverError, match=text) as caught:
        check(settings, FEATURES, "the source h1")
    assert caught.value.reason is reason


@pytest.mark.parametrize("paths", [[], ["nonsense"], ["max_downtime.seconds"], ["importance", ""]])
def test_8_7_a_mask_that_names_no_field_changes_nothing(paths: list[str]) -> None:
    before = pb.MigrationSettings(importance=pb.IMPORTANCE_HIGH)
    with pytest.raises(DroverError, match="update_mask") as caught:
        masked(before, pb.MigrationSettings(), FieldMask(paths=paths))
    assert caught.value.reason is Reason.INVALID_FIELD
    assert before == pb.MigrationSettings(importance=pb.IMPORTANCE_HIGH)


def test_8_7_a_mask_changes_and_resets_only_what_it_names() -> None:
    before = pb.MigrationSettings(importance=pb.IMPORTANCE_HIGH, bandwidth_bytes_per_second=5, max_downtime=Duration(seconds=1))
    given = pb.MigrationSettings(importance=pb.IMPORTANCE_LOW, min_bandwidth_bytes_per_second=3)
    after = masked(before, given, FieldMask(paths=["min_bandwidth_bytes_per_second", "max_downtime"]))
    assert after == pb.MigrationSettings(
        importance=pb.IMPORTANCE_HIGH, bandwidth_bytes_per_second=5, min_bandwidth_bytes_per_second=3
    )


def test_8_7_the_smaller_of_its_own_limit_and_its_share_holds() -> None:
    settings = pb.MigrationSettings(bandwidth_bytes_per_second=5, max_downtime=Duration(seconds=2))
    claim = handshake_pb2.BandwidthClaim(max_bytes_per_second=5)
    assert limits_of(pb.Migration(settings=settings)) == Limits(5, 2.0, claim)
    assert limits_of(pb.Migration(settings=settings, allotted_bytes_per_second=3)) == Limits(3, 2.0, claim)
    assert limits_of(pb.Migration(allotted_bytes_per_second=3)) == Limits(3)


# --- a transfer that runs ---------------------------------------------------------------------------------------------


async def test_8_7_a_running_transfer_is_changed_and_read_back_before_the_answer(driving: Driving) -> None:
    await flowing(driving)
    changed = await update(driving, bandwidth_bytes_per_second=7, max_downtime=Duration(seconds=2))
    assert changed.applied_bandwidth_bytes_per_second == 7
    assert changed.applied_max_downtime.seconds == 2
    assert stored(driving).settings == changed.settings
    assert limits(driving) == [7]
    assert (await update(driving, bandwidth_bytes_per_second=0)).applied_bandwidth_bytes_per_second == 0
    assert limits(driving) == [7, 0]
    assert driving.pair.source.durable.bandwidth == 0


async def test_8_7_what_the_hypervisor_reports_is_shown_not_what_was_asked(driving: Driving) -> None:
    driving.pair.source.hypervisor.reports = 6
    await flowing(driving)
    changed = await update(driving, bandwidth_bytes_per_second=7)
    assert (changed.settings.bandwidth_bytes_per_second, changed.applied_bandwidth_bytes_per_second) == (7, 6)


async def test_8_7_the_settings_of_the_start_are_read_back(driving: Driving) -> None:
    driving.pair.wire.all_sent.clear()
    spec = pb.MigrationSpec(domain="web1", destination_host="h2", bandwidth_bytes_per_second=9, max_downtime=Duration(seconds=1))
    await driving.migrations.start(ID, spec)
    await until(lambda: driving.migrations.collection.get(ID).migration.applied_bandwidth_bytes_per_second == 9)
    assert driving.pair.source.hypervisor.arguments["perform"][-2:] == (9, 1.0)


async def test_8_7_a_migration_without_limits_costs_no_further_call(driving: Driving) -> None:
    await driving.migrations.start(ID, SPEC)
    await driving.ended(ID)
    assert driving.pair.to_source.count["set_bandwidth"] == driving.pair.to_source.count["set_max_downtime"] == 0


async def test_8_7_a_source_that_does_not_answer_gets_the_change_once_it_does(driving: Driving) -> None:
    await flowing(driving)
    driving.pair.to_source.lose["set_bandwidth"] = 1
    refused = await fails(update(driving, bandwidth_bytes_per_second=7), Reason.HOST_UNREACHABLE)
    assert "saved" in refused.message
    assert stored(driving).settings.bandwidth_bytes_per_second == 7
    await until(lambda: driving.migrations.collection.get(ID).migration.applied_bandwidth_bytes_per_second == 7)


async def test_8_7_the_settings_hold_over_a_restart_and_are_applied_again(driving: Driving) -> None:
    await flowing(driving)
    await update(driving, bandwidth_bytes_per_second=7, importance=pb.IMPORTANCE_HIGH)
    await driving.restart()
    await until(lambda: limits(driving) == [7, 7])
    migration = driving.migrations.collection.get(ID).migration
    assert migration.settings.importance == pb.IMPORTANCE_HIGH
    driving.pair.wire.all_sent.set()
    assert (await driving.ended(ID)).settings.bandwidth_bytes_per_second == 7


async def test_8_7_a_change_that_cannot_be_saved_is_not_made(driving: Driving) -> None:
    await flowing(driving)
    driving.log.fails = [JOURNAL_DOWN]
    await fails(update(driving, bandwidth_bytes_per_second=7), Reason.JOURNAL_UNAVAILABLE)
    assert driving.migrations.collection.get(ID).migration.settings.bandwidth_bytes_per_second == 0
    assert limits(driving) == []


async def test_8_7_two_changes_at_once_both_hold(driving: Driving) -> None:
    await flowing(driving)
    await asyncio.gather(update(driving, bandwidth_bytes_per_second=7), update(driving, importance=pb.IMPORTANCE_LOW))
    settings = stored(driving).settings
    assert (settings.bandwidth_bytes_per_second, settings.importance) == (7, pb.IMPORTANCE_LOW)


async def test_8_7_a_cancel_during_the_change_is_kept(driving: Driving) -> None:
    await flowing(driving)
    driving.log.held = asyncio.Event()
    changing = asyncio.create_task(update(driving, importance=pb.IMPORTANCE_LOW))
    await driving.log.waiting.wait()
    cancelling = asyncio.create_task(driving.migrations.cancel(ID))
    await asyncio.sleep(0)
    driving.log.held.set()
    await asyncio.gather(changing, cancelling)
    assert (await driving.ended(ID)).state == pb.MIGRATION_STATE_CANCELLED
    assert driving.migrations.collection.get(ID).migration.settings.importance == pb.IMPORTANCE_LOW


async def test_8_7_one_that_has_ended_is_refused(driving: Driving) -> None:
    await driving.migrations.start(ID, SPEC)
    await driving.ended(ID)
    await fails(update(driving, bandwidth_bytes_per_second=7), Reason.MIGRATION_ENDED)


async def test_8_7_a_pause_cannot_be_reset_while_the_transfer_runs(driving: Driving) -> None:
    await flowing(driving)
    await update(driving, max_downtime=Duration(seconds=1))
    reset = driving.migrations.update(ID, pb.MigrationSettings(), FieldMask(paths=["max_downtime"]))
    await fails(reset, Reason.INVALID_FIELD)
    assert stored(driving).settings.max_downtime.seconds == 1


# --- one that waits ---------------------------------------------------------------------------------------------------


async def test_8_7_one_that_waits_begins_with_what_was_changed_meanwhile(driving: Driving) -> None:
    driving.pair.wire.all_sent.clear()
    driving.pair.destination.room(0)
    await driving.migrations.start(ID, SPEC, slot_wait=600.0)
    await update(driving, bandwidth_bytes_per_second=7, importance=pb.IMPORTANCE_HIGH)
    assert stored(driving).settings.importance == pb.IMPORTANCE_HIGH
    driving.pair.destination.room(2)
    await driving.pair.are("performing", "armed")
    assert driving.pair.source.hypervisor.arguments["perform"][-2:] == (7, 0.0)


# --- the calls of a host ----------------------------------------------------------------------------------------------


async def test_8_7_a_hosts_own_calls_are_refused_without_a_transfer(driving: Driving) -> None:
    await driving.migrations.start(ID, SPEC)
    await driving.ended(ID)
    ref = handshake_pb2.AttemptRef(migration_id=ID, attempt=1)
    engine = driving.pair.source.engine
    await fails(engine.set_bandwidth(handshake_pb2.SetBandwidthRequest(ref=ref)), Reason.WRONG_PHASE)
    longest = handshake_pb2.SetMaxDowntimeRequest(ref=ref, max_downtime=Duration(seconds=1))
    await fails(engine.set_max_downtime(longest), Reason.WRONG_PHASE)


async def test_8_7_a_host_refuses_a_pause_below_a_millisecond(driving: Driving) -> None:
    await flowing(driving)
    ref = handshake_pb2.AttemptRef(migration_id=ID, attempt=1)
    short = handshake_pb2.SetMaxDowntimeRequest(ref=ref, max_downtime=Duration(nanos=1))
    await fails(driving.pair.source.engine.set_max_downtime(short), Reason.INVALID_FIELD)
    answer = await driving.pair.source.engine.set_max_downtime(
        handshake_pb2.SetMaxDowntimeRequest(ref=ref, max_downtime=Duration(seconds=1))
    )
    assert answer.applied_max_downtime.seconds == 1
    assert driving.pair.source.durable.max_downtime == 1.0


# --- what waits for its slots -----------------------------------------------------------------------------------------


async def order(driving: Driving) -> list[tuple[str, int]]:
    """The queue of the destination, with importance."""
    slots = (await driving.pair.destination.engine.list_slots(admission_pb2.ListSlotsRequest())).slots
    waiters = sorted((slot for slot in slots if slot.waiting), key=lambda slot: slot.position)
    return [(slot.migration_id, slot.importance) for slot in waiters]


@pytest.mark.parametrize("prepared", [0, 1])
async def test_8_2_a_new_importance_is_in_the_queue_while_the_call_that_waits_goes_on(
    driving: Driving, monkeypatch: pytest.MonkeyPatch, prepared: int
) -> None:
    monkeypatch.setattr(agent.handshake.drive.slots, "poll_seconds", lambda _: 30.0)
    for host in (driving.pair.source, driving.pair.destination):
        host.prepared = prepared
        await host.restart()
    await waiting_in_queue(driving)
    await driving.pair.destination.engine.acquire_slot(acquire("other", wait=0.01, importance=pb.IMPORTANCE_HIGH))
    assert await order(driving) == [("other", 3), (ID, 2)]
    await update(driving, importance=pb.IMPORTANCE_HIGH)
    claim = driving.pair.destination.engine.desk.queues[Direction.INCOMING].book.find(ID)
    assert claim is not None
    await until(lambda: claim.ask.importance == pb.IMPORTANCE_HIGH and claim.calls == 1, within=1)
    assert sorted(await order(driving)) == [(ID, 3), ("other", 3)]


async def waiting_in_queue(driving: Driving) -> None:
    """A migration that waits at the destination: for a first slot, or prepared for the right to transfer."""
    driving.pair.destination.room(0)
    await driving.migrations.start(ID, SPEC, 60.0)
    book = driving.pair.destination.engine.desk.queues[Direction.INCOMING].book
    await until(lambda: (claim := book.find(ID)) is not None and claim.calls and book.is_waiting(claim))
    await until(lambda: driving.migrations.collection.get(ID).migration.HasField("wait"))


async def test_8_2_a_host_that_closes_ends_the_wait_and_nothing_says_that_it_is_tried_again(
    driving: Driving, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    real = driving.migrations.collection.publish

    def publish(entry: Entry, migration: pb.Migration) -> None:
        told.append(migration.waiting_for)
        real(entry, migration)

    monkeypatch.setattr(driving.migrations.collection, "publish", publish)
    closing = host_pb2.UpdateHostRequest(settings=host_pb2.HostSettings(incoming_limit=0))
    closing.update_mask.paths[:] = ["incoming_limit"]
    await driving.pair.destination.engine.desk.update(closing)
    await driving.migrations.start(ID, SPEC, slot_wait=60)
    assert (await driving.ended(ID)).failure.reason == "HOST_CLOSED"
    assert told
    assert not [text for text in told if "(retrying)" in text]
