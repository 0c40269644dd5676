"""Issue 6, line 25: no list is too long for an answer, and no item hides the others."""

import base64
import json
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from agent.handshake.host.journal import Journal
from agent.handshake.host.records import AttemptRecord, Role
from agent.runtime.errors import DroverError, Reason
from agent.runtime.events import Bus
from agent.runtime.failure import Failure
from agent.runtime.paging import MAX_ITEM_BYTES, PAGE_BYTES, Key, Paging
from agent.service.bounds import MAX_BYTES, MAX_ITEMS, check_request
from agent.service.channel import MAX_MESSAGE_BYTES, all_pages, open_channel
from agent.service.checks import MAX_STRING
from agent.service.handshake_service import handshake_servicer
from agent.service.migration_service import MigrationServicer
from agent.service.server import start_server
from coordinator.client import Client
from coordinator.hosts.host_service import HostServicer
from drover.agent.v1 import bounds_pb2, handshake_pb2, handshake_pb2_grpc, host_pb2, migration_pb2, migration_pb2_grpc
from drover.coordinator.v1 import host_pb2 as cluster_pb2
from drover.coordinator.v1 import host_pb2_grpc as cluster_rpc
from tests.unit.asking import record
from tests.unit.fake_directory import Driving
from tests.unit.two_agents import Agent


def request(token: str = "", size: int = 0, host: str = "") -> cluster_pb2.ListDomainsRequest:
    return cluster_pb2.ListDomainsRequest(host=host, page_size=size, page_token=token)


def row(name: str, size: int = 0) -> tuple[Key, host_pb2.Domain]:
    return (name,), host_pb2.Domain(name=name, reason="x" * size)


@given(st.sets(st.text(max_size=10)), st.integers(1, 5))
def test_6_25_every_item_comes_once(names: set[str], size: int) -> None:
    seen: list[str] = []
    token = ""
    while True:
        page = Paging(request(token, size), str).take(row(name) for name in sorted(names))
        assert len(page.items) <= size
        seen += [item.name for item in page.items]
        token = page.token
        if not token:
            break
    assert seen == sorted(names)


def test_6_25_an_item_that_comes_or_goes_shifts_no_other() -> None:
    first = Paging(request(size=2), str).take(map(row, "bcd"))
    second = Paging(request(first.token, 2), str).take(map(row, "abd"))
    assert [item.name for item in second.items] == ["d"]
    assert second.token == ""


def test_6_25_a_page_is_bounded_in_bytes_and_its_items_too() -> None:
    rows = [row("a", 1000), row("b", MAX_ITEM_BYTES + 1), *(row(f"c{n:03}", 100_000) for n in range(20))]
    with capture_logs() as logs:
        page = Paging(request(), str).take(rows)
    assert [item.name for item in page.items][:2] == ["a", "c000"]
    assert PAGE_BYTES - 101_000 < sum(item.ByteSize() for item in page.items) <= PAGE_BYTES
    assert page.token
    assert [line["item"] for line in logs] == ["('b',)"]


def token_of(*parts: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(parts).encode()).decode()


GOOD = Paging(request(size=1), str).take(map(row, "ab")).token
DIGEST = json.loads(base64.urlsafe_b64decode(GOOD + "=="))[0]


@pytest.mark.parametrize(
    "token",
    [
        *("?", "é", "a", GOOD + "!", "x" * 2048),
        *(token_of(), token_of(DIGEST), token_of(DIGEST, 1), token_of(DIGEST, True)),
        *(token_of(DIGEST, "a", "b"), token_of(DIGEST + 1, "a")),
        *(base64.b64encode(raw).decode() for raw in (b"[" * 1500, b"\xff" * 30)),
    ],
)
def test_6_25_a_token_that_is_none_is_refused(token: str) -> None:
    with pytest.raises(DroverError) as caught:
        Paging(request(token), str)
    assert caught.value.reason is Reason.INVALID_FIELD
    assert caught.value.metadata["field"] == "page_token"


def test_6_25_a_token_belongs_to_its_list_and_fits_its_numbers() -> None:
    with pytest.raises(DroverError, match="other fields"):
        Paging(request(GOOD, host="alpha"), str)
    number = token_of(json.loads(base64.urlsafe_b64decode(Paging(request(size=1), int).take(
        ((n,), host_pb2.Domain()) for n in (1, 2)).token + "=="))[0], 1 << 63)  # fmt: skip
    with pytest.raises(DroverError, match="page_token"):
        Paging(request(number), int)


# ---- everything within the bounds fits into a message

TIME = ("google.protobuf.Timestamp", "google.protobuf.Duration")


def option(field: FieldDescriptor, extension: Any) -> int:
    return int(field.GetOptions().Extensions[extension])


def most_bytes(message: Descriptor) -> int:
    """Return the largest size in bytes that a message may have by its bounds."""
    return sum(_most_bytes_of_field(field) for field in message.fields)


def _most_bytes_of_field(field: FieldDescriptor) -> int:
    bound = option(field, bounds_pb2.max_bytes)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        value = field.message_type.fields_by_name["value"]
        size = MAX_STRING + (bound or MAX_STRING if value.type == FieldDescriptor.TYPE_STRING else _value_bytes(value, 0)) + 8
    else:
        size = _value_bytes(field, bound)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return (size + 8) * (option(field, bounds_pb2.max_items) or MAX_ITEMS)
    return (size + 8) * ((option(field, bounds_pb2.max_items) or MAX_ITEMS) if field.is_repeated else 1)


def _value_bytes(field: FieldDescriptor, bound: int) -> int:
    if field.message_type is not None:
        return bound or (16 if field.message_type.full_name in TIME else most_bytes(field.message_type))
    if field.type == FieldDescriptor.TYPE_STRING:
        return bound or MAX_STRING
    return (bound or MAX_BYTES) if field.type == FieldDescriptor.TYPE_BYTES else 10


MODULES = (handshake_pb2, host_pb2, migration_pb2, cluster_pb2)
MESSAGES = [message for module in MODULES for message in module.DESCRIPTOR.message_types_by_name.values()]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.full_name)
def test_6_25_whatever_the_bounds_allow_fits_into_a_message(message: Descriptor) -> None:
    if message.name.startswith("List") and message.name.endswith("Response"):
        items = [field for field in message.fields if field.is_repeated and field.message_type is not None]
        assert [_value_bytes(field, option(field, bounds_pb2.max_bytes)) <= MAX_ITEM_BYTES for field in items] == [True]
        assert PAGE_BYTES + sum(_most_bytes_of_field(field) for field in message.fields if field not in items) <= MAX_MESSAGE_BYTES
        assert "next_page_token" in message.fields_by_name
    else:
        assert most_bytes(message) <= MAX_MESSAGE_BYTES


def test_6_25_a_heartbeat_is_bounded_whatever_it_holds() -> None:
    heartbeat = cluster_pb2.RegisterHostRequest(host=host_pb2.Host(name="a", host_uuid="u"), agent_address="unix:/a")
    check_request(heartbeat)
    unknown = host_pb2.Host.FromString(b"\xfa\x3f\x80\x80\x3c" + b"x" * 983_040)  # field 1023, of a newer agent
    heartbeat.host.MergeFrom(unknown)
    assert heartbeat.ByteSize() > 980_000
    with pytest.raises(DroverError) as caught:
        check_request(heartbeat)
    assert (caught.value.reason, caught.value.metadata["field"]) == (Reason.FIELD_TOO_LARGE, "host")


# ---- every list, over the wire


async def read_all(method: Any, request: Any) -> list[Any]:
    return [page async for page in all_pages(lambda r: method(r, timeout=5), request)]


class Served:
    """A server with `add` on a socket."""

    def __init__(self, address: str, add: Callable[[grpc.aio.Server], None]) -> None:
        self.address, self._add = address, add

    async def __aenter__(self) -> grpc.aio.Channel:
        self._server = await start_server([self.address], self._add, [], Bus())
        self._channel = open_channel(self.address)
        return self._channel

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close()
        await self._server.stop(0)


class ManyHosts:
    """A `HostRegistry` with 3,000 hosts of 5 guests each; some hosts do not answer."""

    def __init__(self) -> None:
        networks = [host_pb2.Network(name=f"network-{n}", address="10.0.0.1", roles=["migration"]) for n in range(20)]
        names = [f"h{number:04}" for number in range(3000)]
        self.hosts = {name: cluster_pb2.ClusterHost(host=host_pb2.Host(name=name, networks=networks)) for name in names}
        self.asked = 0

    def names(self) -> list[str]:
        return sorted(self.hosts)

    async def list_hosts(self, names: Sequence[str]) -> list[cluster_pb2.ClusterHost]:
        return [self.hosts[name] for name in names]

    async def list_domains(self, host: str, among: Sequence[str]) -> tuple[list[tuple[str, host_pb2.Domain]], list[str]]:
        names = [host] if host else among
        self.asked = max(self.asked, len(names))
        silent = [name for name in names if name.endswith("13")]
        return [(n, host_pb2.Domain(name=f"vm{m}", uuid=n)) for n in names if n not in silent for m in range(5)], silent


@pytest.fixture(name="cluster")
async def _cluster(tmp_path: Path) -> AsyncIterator[tuple[ManyHosts, str]]:
    many = ManyHosts()
    address = f"unix:{tmp_path}/co.sock"
    servicer: Any = HostServicer(many, None)  # type: ignore[arg-type]
    async with Served(address, lambda server: cluster_rpc.add_HostServiceServicer_to_server(servicer, server)):
        yield many, address


async def test_6_25_hosts_and_guests_of_a_large_cluster(cluster: tuple[ManyHosts, str]) -> None:
    many, address = cluster
    assert sum(host.ByteSize() for host in many.hosts.values()) > MAX_MESSAGE_BYTES
    async with Client(address) as client:
        assert [host.name for host in await client.list_hosts()] == many.names()
        found = await client.list_domains()
        assert len(await client.list_domains("h0001")) == 5
    silent = [name for name in many.names() if name.endswith("13")]
    assert list(found.unreachable_hosts) == silent
    assert len(found) == (3000 - len(silent)) * 5
    assert [(guest.name, guest.host) for guest in found] == sorted((guest.name, guest.host) for guest in found)
    assert many.asked < 300, "hosts that are asked at once"


async def test_6_25_small_pages_hold_the_same(cluster: tuple[ManyHosts, str]) -> None:
    many, address = cluster
    for name in many.names()[20:]:
        del many.hosts[name]
    async with open_channel(address) as channel:
        stub = cluster_rpc.HostServiceStub(channel)
        pages = await read_all(stub.ListDomains, cluster_pb2.ListDomainsRequest(page_size=7))
    assert len({(each.host, each.domain.name) for page in pages for each in page.domains}) == 19 * 5
    assert [name for page in pages for name in page.unreachable_hosts] == ["h0013"]
    assert all(len(page.domains) <= 7 for page in pages)


async def test_6_25_records(tmp_path: Path) -> None:
    agent = Agent("h2")
    journal = Journal(tmp_path / "journal.sqlite")
    await journal.open()
    agent.engine._journal = journal
    base = record(Role.DESTINATION, "gone")
    failure = Failure(Reason.TRANSFER_FAILED, "x" * 4000)
    for number in range(400):
        values = {"role": base.role, "state": base.state, "domain_uuid": base.domain_uuid, "failure": failure}
        await journal.put_attempt(AttemptRecord(migration_id=f"{number:036}", attempt=1, **values))  # type: ignore[arg-type]
    servicer = handshake_servicer(agent.engine)
    add = lambda server: handshake_pb2_grpc.add_HandshakeServiceServicer_to_server(servicer, server)  # noqa: E731
    async with Served(f"unix:{tmp_path}/h2.sock", add) as channel:
        stub = handshake_pb2_grpc.HandshakeServiceStub(channel)
        pages = await read_all(stub.ListRecords, handshake_pb2.ListRecordsRequest())
        none = await read_all(stub.ListRecords, handshake_pb2.ListRecordsRequest(active_only=True))
    assert len(pages) > 2
    assert [each.ref.migration_id for page in pages for each in page.records] == [f"{n:036}" for n in range(399, -1, -1)]
    assert [list(page.records) for page in none] == [[]]
    await journal.close()
    await agent.close()


async def test_6_25_migrations(driving: Driving, tmp_path: Path) -> None:
    for number in range(1000):
        migration = migration_pb2.Migration(migration_id=f"{number:036}", state=migration_pb2.MIGRATION_STATE_SUCCEEDED)
        migration.create_time.FromSeconds(number // 3)  # several in one moment
        migration.warnings.append("x" * 1024)
        migration.warnings.append("x" * 1024)
        await driving.log.save(migration.migration_id, migration.SerializeToString(), ended=True)
    await driving.restart()
    servicer: Any = MigrationServicer(driving.migrations)
    add = lambda server: migration_pb2_grpc.add_MigrationServiceServicer_to_server(servicer, server)  # noqa: E731
    address = f"unix:{tmp_path}/h1.sock"
    async with Served(address, add), Client(address) as client:
        listed = await client.list_migrations(limit=1000)
        assert len(await client.list_migrations()) == 100
    assert [migration.id for migration in listed] == [
        migration.migration_id for migration in driving.migrations.collection.list(active_only=False)
    ]
    assert len({migration.id for migration in listed}) == 1000
