"""agent.network.probe, agent.handshake.host.path: the proof of a path, without a lab."""

import asyncio
import contextlib
import hmac
import socket
import struct
import time
import uuid
from collections.abc import AsyncIterator, Iterator

import pytest

from agent.handshake.host.path import open_responder, prove
from agent.migration.progress import describe
from agent.network.connecting import Found
from agent.network.probe import MAX_PAYLOAD, MAX_STRANGERS, Responder
from agent.runtime.address import TcpAddress, parse_address
from agent.runtime.errors import DroverError, Reason
from drover.agent.v1 import handshake_pb2 as pb
from drover.agent.v1 import host_pb2, migration_pb2
from tests.unit.asking import ADDRESSES, PROBE, REF, begin, fails, finished, reserve, until
from tests.unit.fake_hypervisor import UUID
from tests.unit.two_agents import Pair

PORTS = (49230, 49245)


@pytest.fixture(params=["127.92.0.2", "::1"])
async def responder(request: pytest.FixtureRequest) -> AsyncIterator[Responder]:
    opened = await open_responder(request.param, PORTS)
    yield opened
    opened.close()


def where(probe: pb.PathProbe) -> tuple[str, int]:
    address = parse_address(probe.address)
    assert isinstance(address, TcpAddress)
    return str(address.host), address.port


async def refused(probe: pb.PathProbe, found: Found, source: str = "") -> DroverError:
    error = await fails(prove(probe, "h1", "h2", source), Reason.PATH_NOT_PROVED)
    assert error.metadata["found"] == found, error.message
    assert probe.address in error.message
    assert "Nothing was done to the guest, which stays on h1" in error.message
    return error


async def test_8_5_a_path_is_proved_and_measured(responder: Responder) -> None:
    told = responder.add()
    assert PORTS[0] <= where(told)[1] <= PORTS[1]
    proof = await prove(told, "h1", "h2")
    assert proof.address == where(told)[0]
    assert proof.measured is not None
    assert 0 < proof.measured.round_trip < 0.01
    assert 16_000 < proof.measured.mtu <= 65_536, "of loopback"


async def test_8_5_it_is_proved_from_the_address_of_that_network() -> None:
    came_from: list[str] = []

    async def served(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        came_from.append(writer.get_extra_info("peername")[0])
        writer.write(b"n" * 32)
        writer.close()

    async with await asyncio.start_server(served, ADDRESSES["h2"], 0) as server:
        told = pb.PathProbe(address=f"{ADDRESSES['h2']}:{server.sockets[0].getsockname()[1]}", nonce=b"n" * 32)
        await prove(told, "h1", "h2", ADDRESSES["h1"])
        assert came_from == [ADDRESSES["h1"]]
        error = await refused(told, Found.UNUSABLE, "192.0.2.1")
        assert "h1 cannot send from 192.0.2.1" in error.message
        await refused(told, Found.UNUSABLE, "fd00::1")
    await fails(prove(told, "h1", "h2", "h1"), Reason.INVALID_FIELD)


# --- older peers ---


async def test_8_5_an_older_source_gets_the_nonce() -> None:
    responder = await open_responder(ADDRESSES["h2"], PORTS)
    told = responder.add()
    reader, writer = await asyncio.open_connection(*where(told))
    async with asyncio.timeout(2):
        assert await reader.read() == told.nonce
    writer.close()
    responder.close()


async def test_8_5_an_older_destination_is_proved_by_its_nonce() -> None:
    proof = await prove(PROBE, "h1", "h2")
    assert proof.address == ADDRESSES["h2"]
    assert proof.measured is not None
    assert (proof.measured.round_trip > 0, proof.measured.mtu) == (True, 0)


# --- one port for all ---


async def test_the_probes_at_one_address_share_a_port_and_no_key(responder: Responder) -> None:
    first, second = responder.add(), responder.add()
    assert first.address == second.address
    assert first.key != second.key
    responder.remove(first)
    assert (await prove(second, "h1", "h2")).measured is not None
    await refused(first, Found.OTHER)


async def test_the_port_is_open_while_a_slot_is_reserved_that_nobody_has_used(pair: Pair) -> None:
    engine, refs = pair.destination.engine, [REF, pb.AttemptRef(migration_id=str(uuid.uuid4()), attempt=1)]
    names = {"web1": UUID, "web2": str(uuid.uuid4())}
    asked = [
        reserve(ref=ref, requirements=host_pb2.GuestRequirements(name=name, uuid=names[name]))
        for ref, name in zip(refs, names, strict=True)
    ]
    first, second = [(await engine.reserve_slot(request)).probe for request in asked]
    assert first.address == second.address
    await engine.abandon(pb.AbandonRequest(ref=refs[0]))
    await refused(first, Found.OTHER)
    assert (await prove(second, "h1", "h2")).measured is not None
    await engine.abandon(pb.AbandonRequest(ref=refs[1]))
    await refused(second, Found.REFUSED)


# --- strangers ---


async def test_8_5_who_does_not_know_the_key_gets_no_byte_and_learns_nothing_that_proves(responder: Responder) -> None:
    told = responder.add()
    assert told.key != told.nonce
    for said in (told.nonce, b"GET / HTTP/1.1\r\nHost: hypervisor-2.example\r\n\r\n", hmac.digest(b"", b"source", "sha256")):
        reader, writer = await asyncio.open_connection(*where(told))
        writer.write(said)
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
        writer.close()
    impostor = pb.PathProbe()
    impostor.CopyFrom(told)
    impostor.key = told.nonce
    await refused(impostor, Found.OTHER)


async def test_8_5_strangers_that_stay_do_not_keep_the_source_out(responder: Responder) -> None:
    told = responder.add()
    strangers = [await asyncio.open_connection(*where(told)) for _ in range(MAX_STRANGERS + 32)]
    try:
        assert (await prove(told, "h1", "h2")).measured is not None
        await until(lambda: len(responder.strangers) <= MAX_STRANGERS)
    finally:
        for _, writer in strangers:
            writer.close()
    await until(lambda: not responder.strangers)


# --- what is found ---


@contextlib.contextmanager
def listening(backlog: int = 8) -> Iterator[tuple[socket.socket, pb.PathProbe]]:
    with socket.create_server((ADDRESSES["h2"], 0), backlog=backlog) as server:
        server.setblocking(False)
        port = server.getsockname()[1]
        yield server, pb.PathProbe(address=f"{ADDRESSES['h2']}:{port}", nonce=bytes(32), key=bytes(32), payload_bytes=1000)


async def test_8_5_packets_that_are_dropped_are_found_within_a_second() -> None:
    with listening(backlog=0) as (server, told):
        filler = [socket.create_connection(server.getsockname())]  # a full queue drops what comes next
        began = time.monotonic()
        error = await refused(told, Found.DROPPED)
        assert 0.5 < time.monotonic() - began < 1.3
        assert "packets are dropped on the way" in error.message
        assert "firewalls" in error.message
        filler[0].close()


async def test_8_5_a_lost_packet_costs_a_third_of_a_second_and_not_the_proof() -> None:
    with listening(backlog=0) as (server, told):
        filler = socket.create_connection(server.getsockname())
        proving = asyncio.create_task(prove(told, "h1", "h2"))
        await asyncio.sleep(0.1)  # the first packet is dropped meanwhile
        server.accept()[0].close()
        peer, _ = await asyncio.wait_for(asyncio.get_running_loop().sock_accept(server), 0.9)
        peer.close()
        await fails(proving, Reason.PATH_NOT_PROVED)
        filler.close()


async def test_8_5_an_agent_that_hangs_is_no_lost_packet() -> None:
    with listening() as (_, told):
        began = time.monotonic()
        error = await refused(told, Found.SLOW)
        assert 2.5 < time.monotonic() - began < 4
        assert "nothing is answered" in error.message


async def test_8_5_an_agent_that_hangs_for_two_seconds_is_waited_for() -> None:
    with listening() as (server, told):
        proving = asyncio.create_task(prove(told, "h1", "h2"))
        await asyncio.sleep(2)  # the length of the hang
        peer, _ = await asyncio.get_running_loop().sock_accept(server)
        with peer:
            assert peer.recv(32) == hmac.digest(told.key, b"source", "sha256")
            mtu = (1500).to_bytes(4, "big")
            peer.sendall(hmac.digest(told.key, b"destination" + mtu, "sha256") + mtu + bytes(told.payload_bytes))
            assert (await proving).address == ADDRESSES["h2"]


async def test_8_5_a_firewall_that_resets_what_is_established() -> None:
    async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()

    async with await asyncio.start_server(reset, ADDRESSES["h2"], 0) as server:
        port = server.sockets[0].getsockname()[1]
        told = pb.PathProbe(address=f"{ADDRESSES['h2']}:{port}", nonce=bytes(32), key=bytes(32), payload_bytes=1000)
        error = await refused(told, Found.REFUSED)
        assert "connection reset by peer" in error.message


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("probe.key", {"key": b"short"}),
        ("probe.key", {"key": bytes(65)}),
        ("probe.nonce", {"nonce": b""}),
        ("probe.payload_bytes", {"payload_bytes": -1}),
        ("probe.payload_bytes", {"payload_bytes": MAX_PAYLOAD + 1}),
    ],
)
async def test_8_5_a_probe_that_is_none_is_refused(field: str, changes: dict[str, object]) -> None:
    values = {"address": PROBE.address, "nonce": bytes(32), "key": bytes(32), "payload_bytes": 1000, **changes}
    error = await fails(prove(pb.PathProbe(**values), "h1", "h2"), Reason.INVALID_FIELD)  # type: ignore[arg-type]
    assert error.metadata["field"] == field


# --- in a migration ---


async def test_8_5_begin_and_the_migration_tell_what_was_measured(pair: Pair) -> None:
    driver = pair.driver()
    await driver.reserve()
    await finished(driver)
    pair.moved()
    shown = describe(migration_pb2.Migration(), driver.view, 1.0, ended=True).network_choice
    assert 0 < shown.round_trip.ToMicroseconds() < 10_000
    assert shown.mtu > 16_000


async def test_8_5_begin_binds_the_source_address(pair: Pair) -> None:
    probe = (await pair.destination.engine.reserve_slot(reserve())).probe
    error = await fails(pair.source.engine.begin(begin(probe=probe, source_address="192.0.2.1")), Reason.PATH_NOT_PROVED)
    assert "h1 cannot send from 192.0.2.1" in error.message
    assert pair.source.calls == []
    answer = await pair.source.engine.begin(begin(probe=probe, source_address=ADDRESSES["h1"]))
    assert answer.round_trip.ToMicroseconds() > 0
    assert answer.mtu > 16_000


async def test_8_5_packets_that_are_dropped_are_not_tried_twice(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    with listening(backlog=0) as (server, nowhere):
        filler = socket.create_connection(server.getsockname())
        monkeypatch.setattr(Responder, "add", lambda _: nowhere)
        began = time.monotonic()
        await finished(driver := pair.driver())
        assert time.monotonic() - began < 1.5
        assert pair.to_source.count["begin"] == 1
        assert driver.view.failure is not None
        assert driver.view.failure.reason == Reason.PATH_NOT_PROVED
        assert pair.source.calls == ["journal kept"], "the hypervisor was asked to change nothing"
        filler.close()
