"""Line 11: values that only a newer version knows are carried through on every path: wire, driver, log, client, command line."""

import asyncio
from collections.abc import Iterator

import grpc
import grpc.aio
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

import agent.handshake.drive.driver
from agent.handshake.drive.driver import Driver
from agent.handshake.host.records import AttemptRecord, Role, decode, encode
from agent.hypervisor.features import support_of
from agent.hypervisor.options import Support
from agent.migration.migration import FINAL
from agent.migration.whereabouts import whereabouts
from agent.runtime.errors import DroverError, Reason
from agent.runtime.events import Bus
from agent.runtime.failure import Failure
from agent.service.bounds import check_answer
from agent.service.status import error_from_rpc, to_status, trailing_metadata
from coordinator.client import Domain, Host, Migration
from coordinator.client.errors import Refused, client_error
from drover.agent.v1 import handshake_pb2, host_pb2, migration_pb2, options_pb2
from drover.coordinator.v1 import host_pb2 as cluster_pb2
from tests.unit.asking import ID, finished, until
from tests.unit.clocks import QUICK
from tests.unit.fake_directory import Driving
from tests.unit.running_drover import Drover, start
from tests.unit.two_agents import Pair

SPEC = migration_pb2.MigrationSpec(domain="web1", destination_host="h2")
NEW_FIELD = bytes.fromhex("f83f2a")  # field 1023 with the value 42
_FILES = (handshake_pb2, host_pb2, migration_pb2, options_pb2, cluster_pb2)


def messages() -> Iterator[type[Message]]:
    for module in _FILES:
        for descriptor in module.DESCRIPTOR.message_types_by_name.values():
            yield GetMessageClass(descriptor)


def fill(message: Message, depth: int = 5) -> Message:
    """Give every enum a value, every reason a name and every message a field that this version does not know."""
    for field in message.DESCRIPTOR.fields:
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            value = field.message_type.fields_by_name["value"]
            if value.enum_type is not None:
                getattr(message, field.name)["xbzrle"] = 99
        elif field.message_type is not None:
            if depth and field.message_type.file.package.startswith("drover"):
                inner = getattr(message, field.name)
                fill(inner.add() if field.is_repeated else inner, depth - 1)
        elif field.enum_type is not None and not field.is_repeated:
            setattr(message, field.name, 99)
        elif field.type == FieldDescriptor.TYPE_STRING and not field.is_repeated:
            setattr(message, field.name, {"reason": "OF_TOMORROW", "address": "10.91.0.1"}.get(field.name, ID))
    message.MergeFromString(NEW_FIELD)
    return message


@pytest.mark.parametrize("kind", list(messages()), ids=lambda kind: kind.DESCRIPTOR.full_name)
def test_6_11_each_message_with_unknown_values_is_read_kept_and_passed_on(kind: type[Message]) -> None:
    sent = fill(kind())
    read = kind.FromString(sent.SerializeToString())
    check_answer(read)
    assert read == sent
    assert read.SerializeToString().count(NEW_FIELD) == sent.SerializeToString().count(NEW_FIELD) > 0


def test_6_11_the_client_shows_what_it_does_not_know() -> None:
    migration = Migration.from_proto(fill(migration_pb2.Migration()))
    assert (migration.state, migration.state.ended) == ("unknown_99", False)
    assert migration.failure is not None
    assert migration.failure.reason == "OF_TOMORROW"
    assert migration.whereabouts.sentence
    host = Host.from_proto(fill(cluster_pb2.ClusterHost()))
    assert (host.state, host.option_support) == ("unknown_99", {"xbzrle": "unknown_99"})
    assert Domain.from_proto(fill(cluster_pb2.PlacedDomain())).state == "unknown_99"


def test_6_11_where_a_guest_is_in_a_state_that_is_not_known_is_told_as_such() -> None:
    migration = migration_pb2.Migration()
    fill(migration)
    migration.ClearField("statement")
    assert "does not know" in whereabouts(migration).sentence


def test_6_11_an_option_of_which_a_host_says_something_new_is_not_used() -> None:
    features = options_pb2.MigrationFeatures(options={"xbzrle": 99})  # type: ignore[dict-item]
    assert support_of(features, "xbzrle") is Support.UNSUPPORTED


def test_6_11_an_error_of_a_newer_peer_keeps_its_reason_and_its_code() -> None:
    sent = DroverError(Reason("OF_TOMORROW"), "not today", metadata={"host": "h2"}, code=grpc.StatusCode.FAILED_PRECONDITION)
    status = to_status(sent)
    rpc = grpc.aio.AioRpcError(sent.code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailing_metadata(status)), details=status.message)
    got = error_from_rpc(rpc, "h2")
    assert (got.reason, got.message, got.code) == ("OF_TOMORROW", "not today", grpc.StatusCode.FAILED_PRECONDITION)
    told = client_error(got)
    assert isinstance(told, Refused)
    assert (told.reason, told.message) == ("OF_TOMORROW", "not today")


def test_6_11_a_record_of_a_newer_version_is_read_from_the_journal() -> None:
    record = AttemptRecord(migration_id=ID, attempt=1, role=Role.SOURCE, state="kept", failure=Failure(Reason("OF_TOMORROW"), "x"))
    read = decode(encode(record))
    assert read.failure == record.failure


@pytest.mark.parametrize("word", ["", "no such thing", "9LIVES", "A" * 64, "UMLÄUT"])
def test_6_11_what_can_be_no_reason_is_none(word: str) -> None:
    with pytest.raises(ValueError, match="not a valid Reason"):
        Reason(word)


async def test_6_11_a_failure_for_a_reason_of_tomorrow_ends_the_migration_and_is_saved(
    driving: Driving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent.handshake.drive.driver, "FOLLOW_AFTER", 1000.0)  # a watch would tell the reason of today
    driving.pair.wire.all_sent.clear()

    def newer(answer: handshake_pb2.PerformResponse) -> handshake_pb2.PerformResponse:
        if answer.record.HasField("failure"):
            answer.record.failure.reason = "OF_TOMORROW"
        return answer

    for call in ("perform", "get_record", "confirm", "abort"):
        driving.pair.to_source.answer[call] = newer
    await driving.migrations.start(ID, SPEC)
    await driving.pair.are("performing", "armed")
    driving.pair.wire.broken.set()
    ended = await driving.ended(ID)
    assert (ended.state, ended.failure.reason) == (migration_pb2.MIGRATION_STATE_FAILED, "OF_TOMORROW")
    await until(lambda: driving.log.rows[ID][1])
    body, _ = driving.log.rows[ID]
    assert migration_pb2.Migration.FromString(body).failure.reason == "OF_TOMORROW"
    await driving.restart()
    assert driving.migrations.collection.get(ID).migration.state in FINAL


async def test_6_11_a_state_of_tomorrow_decides_nothing_and_is_asked_again(pair: Pair) -> None:
    """It neither ends the transfer nor counts as silence; once the host reports a known state, the migration goes on."""
    unknown = asyncio.Event()
    told: list[str] = []

    def newer(answer: handshake_pb2.FinishResponse) -> handshake_pb2.FinishResponse:
        if len(told) < 5:
            answer.record.state = 99  # type: ignore[assignment]
        else:
            unknown.set()
        return answer

    def noticed() -> None:
        if driver.view.waiting_for:
            told.append(driver.view.waiting_for)

    for call in ("finish", "get_record", "watch_record"):
        pair.to_destination.answer[call] = newer
    driver = pair.driver(on_change=noticed)
    await finished(driver)
    assert unknown.is_set()
    assert not driver.view.cancelling
    assert "state 99" in told[0]
    pair.moved()


async def test_6_11_a_driver_that_takes_up_waits_for_a_state_that_it_knows(pair: Pair) -> None:
    pair.wire.all_sent.clear()
    first = pair.driver()
    running = asyncio.create_task(first.run())
    await pair.are("performing", "armed")
    running.cancel()
    await asyncio.wait({running})
    asked = 0

    def newer(answer: handshake_pb2.GetRecordResponse) -> handshake_pb2.GetRecordResponse:
        nonlocal asked
        asked += 1
        answer.record.state = 99 if asked < 3 else answer.record.state  # type: ignore[assignment]
        return answer

    pair.to_destination.answer["get_record"] = newer
    second = Driver(first.view.ref, pair.to_source, pair.to_destination, None, lambda: None, Bus(), QUICK)
    await second.resume()
    assert asked >= 3
    assert not second.view.silent_since
    pair.wire.all_sent.set()
    await finished(second)
    pair.moved()


def test_6_11_the_command_line_shows_and_ends(drover: Drover) -> None:
    migration_id = start(drover, "tomorrow")
    text = drover("migration", "watch", migration_id, code=5).output  # where the guest is cannot be said
    assert "what only a newer agent knows" in text
    assert "OF_TOMORROW" in drover("migration", "show", migration_id).output
    assert migration_id[:8] in drover("migration", "list").output


def test_6_11_a_refusal_for_a_reason_of_tomorrow_is_a_refusal(drover: Drover) -> None:
    error = drover("migrate", "newer", "--to", "b", code=4).stderr
    assert "a newer server's refusal" in error
