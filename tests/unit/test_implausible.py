"""Line 11: implausible values in an answer count as not set, and stop no migration, no client and no command line."""

import asyncio
import contextlib
import io
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, cast

import click
import grpc
import grpc.aio
import pytest
from google.protobuf.any_pb2 import Any as Packed
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st

from agent.handshake.drive.view import StateUnknownError, View
from agent.handshake.machines.destination import DestinationState
from agent.handshake.machines.source import SourceState
from agent.migration.progress import describe
from agent.migration.uptime import with_age
from agent.migration.whereabouts import whereabouts
from agent.runtime.errors import DOMAIN
from agent.runtime.events import Bus
from agent.service.bounds import check_answer, check_request, checked_answer
from agent.service.channel import open_channel
from agent.service.host import AgentHost
from agent.service.implausible import drop_implausible
from agent.service.registration import keep_registered
from agent.service.server import start_server
from agent.service.status import error_from_rpc, to_status, trailing_metadata
from coordinator.cli.follow import print_summary
from coordinator.cli.host import _print_host
from coordinator.cli.migration import _print_migration
from coordinator.cli.show import to_json
from coordinator.client import Client, Domain, Host, Migration
from coordinator.client.convert import name_of
from coordinator.hosts.hosts import HostRegistry
from coordinator.store import MemoryStore
from drover.agent.v1 import handshake_pb2, host_pb2, migration_pb2, migration_pb2_grpc, options_pb2
from drover.coordinator.v1 import host_pb2 as cluster_pb2
from drover.coordinator.v1 import host_pb2_grpc as cluster_pb2_grpc
from tests.unit.asking import ID, REF, until
from tests.unit.clocks import FakeClock
from tests.unit.fake_agents import UP, FakeAgent, register
from tests.unit.fake_agents import until as stored
from tests.unit.fake_directory import Driving
from tests.unit.test_progress import BEFORE

SPEC = migration_pb2.MigrationSpec(domain="web1", destination_host="h2")
FAR = 10**12
"""Seconds beyond the year 9999."""
_FILES = (handshake_pb2, host_pb2, migration_pb2, options_pb2, cluster_pb2)
_WELL_KNOWN = (Timestamp.DESCRIPTOR.full_name, Duration.DESCRIPTOR.full_name)
_SIGNED = (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_INT64)

# --- what is dropped --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seconds", "nanos"), [(FAR, 0), (-1, 0), (0, -1), (0, 10**9), (2**63 - 1, 0), (-(2**63), 0)])
def test_6_11_a_time_that_is_none_counts_as_not_told_and_the_rest_counts(seconds: int, nanos: int) -> None:
    record = handshake_pb2.Record(state=handshake_pb2.RECORD_STATE_RUNNING, revision=7)
    for time in (record.update_time, record.guest.see_time, record.timings.add().start_time, record.slot.expire_time):
        time.seconds, time.nanos = seconds, nanos
    record.guest.state = handshake_pb2.GUEST_STATE_RUNNING
    record.create_time.seconds = 1000
    answer = checked_answer(handshake_pb2.GetRecordResponse(record=record), "h2").record
    assert (answer.state, answer.revision, answer.create_time.seconds) == (handshake_pb2.RECORD_STATE_RUNNING, 7, 1000)
    assert answer.guest.state == handshake_pb2.GUEST_STATE_RUNNING
    told = (answer.HasField("update_time"), answer.guest.HasField("see_time"), answer.slot.HasField("expire_time"))
    assert (*told, answer.timings[0].HasField("start_time")) == (False,) * 4


@pytest.mark.parametrize(("seconds", "nanos"), [(FAR, 0), (-1, 0), (0, -1), (0, 10**9), (1, -1)])
def test_6_11_a_duration_that_is_none_counts_as_not_told(seconds: int, nanos: int) -> None:
    response = host_pb2.GetDomainResponse(hypervisor_duration=Duration(seconds=seconds, nanos=nanos))
    check_answer(response)
    assert not response.HasField("hypervisor_duration")


def test_8_6_a_rate_that_no_line_has_counts_as_the_highest_one() -> None:
    network = host_pb2.Network(name="mig", line_bytes_per_second=2**62, rules=host_pb2.NetworkRules(cap_bytes_per_second=2**63 - 1))
    host = host_pb2.Host(name="h1", networks=[network, host_pb2.Network(line_bytes_per_second=-1)])
    check_answer(host)
    assert host.networks[0].line_bytes_per_second == host.networks[0].rules.cap_bytes_per_second == 10**12
    assert host.networks[1].line_bytes_per_second == 0


def test_6_11_a_negative_number_counts_as_not_told() -> None:
    progress = handshake_pb2.Progress(total_bytes=-1, remaining_bytes=5, iteration=-(2**31))
    drop_implausible(progress)
    assert progress == handshake_pb2.Progress(remaining_bytes=5)


@pytest.mark.parametrize(("seconds", "kept"), [(-3600, True), (3600, True), (FAR, False), (-FAR, False)])
def test_6_11_a_clock_may_be_behind(seconds: int, kept: bool) -> None:
    host = cluster_pb2.ClusterHost(clock_skew=Duration(seconds=seconds))
    drop_implausible(host)
    assert host.HasField("clock_skew") is kept


def test_6_11_a_record_that_is_relayed_is_read_like_an_answer() -> None:
    request = handshake_pb2.ConfirmRequest(ref=REF, decision=handshake_pb2.DECISION_RUNNING)
    request.ref.migration_id = ID
    request.destination_record.guest.see_time.seconds = FAR
    check_request(request)
    assert request.destination_record.HasField("guest")
    assert not request.destination_record.guest.HasField("see_time")


def _all_fields() -> Iterator[FieldDescriptor]:
    def of(descriptor: Descriptor) -> Iterator[FieldDescriptor]:
        yield from descriptor.fields
        for nested in descriptor.nested_types:
            yield from of(nested)

    for module in _FILES:
        for descriptor in module.DESCRIPTOR.message_types_by_name.values():
            yield from of(descriptor)


def test_no_wire_has_times_or_numbers_in_a_repeated_field_or_a_map() -> None:
    """`drop_implausible` looks at single ones."""
    for field in _all_fields():
        is_entry = field.containing_type is not None and bool(field.containing_type.GetOptions().map_entry)
        is_time = field.message_type is not None and field.message_type.full_name in _WELL_KNOWN
        assert not ((field.is_repeated or is_entry) and (is_time or field.cpp_type in _SIGNED)), field.full_name


# --- errors -----------------------------------------------------------------------------------------------------------


def _error(*details: Message) -> grpc.aio.AioRpcError:
    status = status_pb2.Status(code=grpc.StatusCode.RESOURCE_EXHAUSTED.value[0], message="no slot")
    for detail in details:
        packed = Packed()
        packed.Pack(detail)
        status.details.append(packed)
    metadata = grpc.aio.Metadata(*trailing_metadata(status))
    return grpc.aio.AioRpcError(grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.aio.Metadata(), metadata, details="no slot")


@pytest.mark.parametrize("delay", [Duration(seconds=FAR), Duration(seconds=2**63 - 1), Duration(seconds=-1), Duration(nanos=-1)])
def test_6_11_an_error_whose_delay_is_none_is_told_and_passed_on_without_it(delay: Duration) -> None:
    info = error_details_pb2.ErrorInfo(reason="BUSY", domain=DOMAIN)
    error = error_from_rpc(_error(info, error_details_pb2.RetryInfo(retry_delay=delay)), "h2")
    assert (error.reason, error.message, error.retry_after) == ("BUSY", "no slot", None)
    assert to_status(error).message == "no slot"


def test_6_11_what_an_error_says_is_cut_so_that_it_can_be_passed_on() -> None:
    """Else the record that holds it as a failure is too large for every reader, for ever."""
    info = error_details_pb2.ErrorInfo(reason="BUSY", domain=DOMAIN, metadata={"k" * 300: "v", "host": "h2", "text": "x" * 2000})
    error = error_from_rpc(_error(info), "h2")
    assert error.metadata == {"host": "h2", "text": "x" * 512}


# --- a migration ------------------------------------------------------------------------------------------------------

_CALLS = ("reserve_slot", "begin", "prepare", "perform", "finish", "confirm", "abort", "abandon", "get_record", "watch_record")


def _with_odd_times(answer: Any) -> Any:
    """Return the answer with implausible times, as a proxy before the agent might change it, after our checks."""
    answer.record.update_time.seconds = answer.record.guest.see_time.seconds = FAR
    for timing in answer.record.timings:
        timing.hypervisor_duration.seconds = 300_000_000_000  # 9,500 years each
    return checked_answer(answer, "h2")


@pytest.mark.parametrize("from_call", ["reserve_slot", "finish"])
async def test_6_11_a_migration_ends_and_is_saved_whatever_times_a_host_tells(driving: Driving, from_call: str) -> None:
    for call in _CALLS[_CALLS.index(from_call) :]:
        driving.pair.to_destination.answer[call] = _with_odd_times
    await driving.migrations.start(ID, SPEC)
    ended = await driving.ended(ID)
    assert ended.state == migration_pb2.MIGRATION_STATE_SUCCEEDED
    await until(lambda: ID in driving.log.rows and driving.log.rows[ID][1])
    assert Migration.from_proto(ended).whereabouts.runs_on == "h2"
    driving.pair.moved()


def test_6_11_a_time_that_is_not_told_is_neither_midnight_nor_a_skew() -> None:
    migration = migration_pb2.Migration(domain_name="web1", source_host="h1", destination_host="h2", silent_hosts=["h1"])
    migration.source_guest.state = handshake_pb2.GUEST_STATE_RUNNING
    assert "at an unknown time" in whereabouts(migration).sentence
    view = View(REF, None, lambda: None, Bus())
    view.read_clock("source", handshake_pb2.Record(revision=1, update_time=Timestamp(seconds=1000)))
    view.read_clock("destination", handshake_pb2.Record(revision=1))
    assert view.clock_skew == 0


class Unclocked(FakeAgent):
    async def WatchHost(self, request: Any, context: Any) -> AsyncIterator[host_pb2.WatchHostResponse]:  # noqa: N802
        async for response in super().WatchHost(request, context):
            response.send_time.seconds = FAR
            yield response


async def test_6_11_a_host_whose_clock_is_broken_is_up(registry: HostRegistry, store: MemoryStore, tmp_path: Path) -> None:
    agent = Unclocked(tmp_path, "alpha")
    await agent.start()
    await register(registry, agent)
    agent.change(draining=True)
    known = await stored(store, "alpha", lambda known: known.host.draining)
    assert (known.state, known.HasField("clock_skew")) == (UP, False)
    await agent.stop()


class Coordinator(cluster_pb2_grpc.HostServiceServicer):
    def __init__(self, interval: Duration) -> None:
        self.interval = interval
        self.calls = 0

    async def RegisterHost(self, request: Any, context: Any) -> cluster_pb2.RegisterHostResponse:  # noqa: N802
        self.calls += 1
        return cluster_pb2.RegisterHostResponse(heartbeat_interval=self.interval)


class Described:
    def describe(self) -> host_pb2.Host:
        return host_pb2.Host(name="h1")


@pytest.mark.parametrize(
    ("interval", "pause"),
    [(Duration(seconds=FAR), 1.0), (Duration(), 1.0), (Duration(seconds=-5), 1.0), (Duration(seconds=10**9), 60)],
)
async def test_6_11_a_host_registers_again_whatever_heartbeat_is_asked_for(tmp_path: Path, interval: Duration, pause: float) -> None:
    clock = FakeClock()
    coordinator = Coordinator(interval)  # type: ignore[abstract]

    def add(server: grpc.aio.Server) -> None:
        cluster_pb2_grpc.add_HostServiceServicer_to_server(coordinator, server)

    server = await start_server([f"unix:{tmp_path}/s"], add, [], Bus())
    async with open_channel(f"unix:{tmp_path}/s") as channel:
        registering = asyncio.create_task(keep_registered(channel, cast(AgentHost, Described()), "unix:/h1", clock))
        await until(lambda: len(clock.slept) > 1)
        registering.cancel()
        await asyncio.wait({registering})
    await server.stop(0)
    assert set(clock.slept) == {pause}


# --- a client ---------------------------------------------------------------------------------------------------------


class Odd(migration_pb2_grpc.MigrationServiceServicer):
    async def GetMigration(self, request: Any, context: Any) -> migration_pb2.GetMigrationResponse:  # noqa: N802
        response = migration_pb2.GetMigrationResponse()
        response.migration.migration_id = request.migration_id
        response.migration.end_time.seconds = response.migration.destination_guest.see_time.seconds = FAR
        return response


async def test_6_11_the_client_takes_the_rest_of_a_server_s_word(tmp_path: Path) -> None:
    servicer = Odd()  # type: ignore[abstract]
    server = await start_server(
        [f"unix:{tmp_path}/s"], lambda s: migration_pb2_grpc.add_MigrationServiceServicer_to_server(servicer, s), [], Bus()
    )
    async with Client(f"unix:{tmp_path}/s") as client:
        migration = await client.get_migration(ID)
        assert (migration.id, migration.ended) == (ID, None)
        assert migration.whereabouts.sentence
        assert to_json(migration.proto)["migration_id"] == ID
    await server.stop(0)


def test_6_11_an_enum_value_below_zero_has_a_word() -> None:
    assert name_of(cluster_pb2.HostState.DESCRIPTOR, -5) == "unknown_minus_5"
    assert Host.from_proto(cluster_pb2.ClusterHost(state=-5)).state == "unknown_minus_5"  # type: ignore[arg-type]


# --- any answer -------------------------------------------------------------------------------------------------------

_INTS = st.sampled_from([0, 1, -1, 99, 10**9, 10**12, 315_576_000_000, 253_402_300_799]) | st.integers(-(2**63), 2**63 - 1)
_SMALL_INTS = st.sampled_from([0, 1, -1, 99]) | st.integers(-(2**31), 2**31 - 1)
_WORDS = st.sampled_from(["", "h1", "h2", "plan", "perform", "user", "post-copy failed", "CANCELLED"]) | st.text(max_size=9)


def _value(field: FieldDescriptor, depth: int) -> st.SearchStrategy[Any]:
    if field.message_type is not None:
        return _message(field.message_type, depth - 1)
    if field.enum_type is not None:
        known = [value.number for value in field.enum_type.values]
        return st.sampled_from(known) | _SMALL_INTS
    by_type: dict[int, st.SearchStrategy[Any]] = {
        FieldDescriptor.TYPE_STRING: _WORDS,
        FieldDescriptor.TYPE_BYTES: st.binary(max_size=8),
        FieldDescriptor.TYPE_BOOL: st.booleans(),
        FieldDescriptor.TYPE_INT32: _SMALL_INTS,
        FieldDescriptor.TYPE_INT64: _INTS,
        FieldDescriptor.TYPE_UINT32: st.integers(0, 2**32 - 1),
    }
    return by_type[field.type]


def _field(field: FieldDescriptor, depth: int) -> st.SearchStrategy[Any]:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        entry = field.message_type.fields_by_name
        return st.dictionaries(_value(entry["key"], depth), _value(entry["value"], depth), max_size=2)
    one = _value(field, depth)
    return st.lists(one, max_size=2) if field.is_repeated else one


def _message(descriptor: Descriptor, depth: int = 5) -> st.SearchStrategy[dict[str, Any]]:
    """Return keyword arguments of a message: any fields with any values."""
    return st.fixed_dictionaries({}, optional={field.name: _field(field, depth) for field in descriptor.fields})


def any_of(kind: type[Message]) -> st.SearchStrategy[Message]:
    """Return the message as it comes from the wire."""
    return st.deferred(
        lambda: _message(cast(Descriptor, kind.DESCRIPTOR)).map(lambda fields: kind.FromString(kind(**fields).SerializeToString()))
    )


def answered(message: Message, check: Callable[[Message], None]) -> Any:
    check(message)
    return message


@given(
    source=any_of(handshake_pb2.Record),
    destination=any_of(handshake_pb2.Record),
    states=st.none() | st.tuples(st.sampled_from(list(SourceState)), st.sampled_from(list(DestinationState))),
    ended=st.booleans(),
    silent=st.sets(st.sampled_from(["source", "destination"])),
)
def test_6_11_whatever_two_hosts_answer_is_described_and_shown(
    source: Any, destination: Any, states: tuple[str, str] | None, ended: bool, silent: set[str]
) -> None:
    view = View(REF, None, lambda: None, Bus())
    for saw, record, state in zip((view.saw_source, view.saw_destination), (source, destination), states or ("", ""), strict=True):
        if state:  # else whatever it says
            record.state = handshake_pb2.RecordState.Value(f"RECORD_STATE_{state.upper()}")
        try:
            saw(answered(record, check_answer))
        except StateUnknownError:
            pass
        else:
            view.read_clock("source", record)
    view.silent_since = dict.fromkeys(silent, 1.0)
    migration = describe(BEFORE, view, 10.0, ended=ended)
    shown(with_age(describe(migration, view, 11.0, ended=True, wall=2000.0)))
    shown(migration)


@given(any_of(migration_pb2.Migration))
def test_6_11_whatever_a_server_says_of_a_migration_is_shown(message: Any) -> None:
    shown(answered(message, drop_implausible))


@given(any_of(cluster_pb2.ClusterHost), any_of(cluster_pb2.PlacedDomain))
def test_6_11_whatever_a_server_says_of_its_hosts_is_shown(host: Any, domain: Any) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        _print_host(Host.from_proto(answered(host, drop_implausible)))
    assert to_json(host) is not None
    assert to_json(Domain.from_proto(answered(domain, drop_implausible)).proto) is not None


def shown(message: migration_pb2.Migration) -> None:
    """Use all of the command line's output functions on it."""
    migration = Migration.from_proto(migration_pb2.Migration.FromString(message.SerializeToString()))
    assert migration.whereabouts.sentence
    assert to_json(message) is not None
    with click.Context(click.Command("drover")), contextlib.redirect_stdout(io.StringIO()) as output:
        print_summary(migration)
        _print_migration(migration)
    assert output.getvalue()
