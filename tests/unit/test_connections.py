"""Issue 6, line 26: no peer shuts out another one, or the local socket."""

import asyncio
import os
import resource
import signal
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from agent.runtime.errors import DroverError, Reason
from agent.runtime.events import Bus
from agent.service.channel import open_channel
from agent.service.connections import (
    KEPT_FILES,
    MAX_CONNECTIONS_OF_PEER,
    Calls,
    Connections,
    most_connections,
    peer_of_uri,
    too_many,
)
from agent.service.host_service import SERVICE
from agent.service.interceptor import ErrorInterceptor
from agent.service.server import start_server
from agent.service.status import error_from_rpc
from drover.agent.v1 import host_pb2 as pb
from drover.agent.v1 import host_pb2_grpc as rpc
from tests.transcript import ROOT
from tests.unit.test_log import PREFACE, SETTINGS

FLOODER = "127.0.0.7"


def idle(address: str, number: int, stack: ExitStack) -> list[socket.socket]:
    """Return connections of one peer that send only HTTP/2's preface and SETTINGS."""
    host, _, port = address.rpartition(":")
    made = []
    for _ in range(number):
        one = stack.enter_context(socket.create_connection((host, int(port)), timeout=5, source_address=(FLOODER, 0)))
        one.sendall(PREFACE + SETTINGS)
        made.append(one)
    return made


async def ask(address: str) -> str:
    """Return the name of the host that answers there."""
    async with open_channel(address) as channel:
        return (await rpc.HostServiceStub(channel).GetHost(pb.GetHostRequest(), timeout=10)).host.name


async def test_6_26_idle_connections_of_one_peer_shut_out_nobody(tmp_path: Path) -> None:
    config = tmp_path / "agent.toml"
    config.write_text(
        f'name = "h1"\nlisten = ["unix:{tmp_path}/a.sock", "127.0.0.1:0"]\nstate_dir = "{tmp_path}/state"\nhypervisor = "sim"\n'
        'allow_insecure_tcp = true\n[[networks]]\nname = "m"\naddress = "127.0.0.1"\n'
    )
    agent = await asyncio.create_subprocess_exec(
        *("bash", "-c", f"ulimit -Sn 1024; exec {ROOT}/.venv/bin/drover agent --config {config}"), stderr=subprocess.PIPE
    )
    try:
        assert agent.stderr is not None
        serving = b""
        while b'"serving"' not in serving:
            serving = await agent.stderr.readline()
            assert serving
        address = serving.decode().split('"')[serving.decode().split('"').index("addresses") + 4]
        assert address.startswith("127.0.0.1:")
        with ExitStack() as stack:
            await asyncio.to_thread(idle, address, 1100, stack)
            assert await ask(f"unix:{tmp_path}/a.sock") == "h1"
            assert await ask(address) == "h1"
            soft, hard = _file_limits(agent.pid)
            assert soft == hard
            async with asyncio.timeout(10):
                while _sockets(agent.pid) > MAX_CONNECTIONS_OF_PEER + 20:  # noqa: ASYNC110 - its sweep tells nobody
                    await asyncio.sleep(0.2)
            assert await ask(address) == "h1"
    finally:
        agent.send_signal(signal.SIGTERM)
        await asyncio.wait_for(agent.communicate(), 20)


def _file_limits(pid: int) -> tuple[int, int]:
    (line,) = [line for line in Path(f"/proc/{pid}/limits").read_text().splitlines() if line.startswith("Max open files")]
    return int(line.split()[3]), int(line.split()[4])


def _sockets(pid: int) -> int:
    number = 0
    for descriptor in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):  # closed since it was listed
            number += os.readlink(f"/proc/{pid}/fd/{descriptor}").startswith("socket:")
    return number


def test_6_26_the_oldest_connections_of_a_peer_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = [("10.0.0.1", 1), ("10.0.0.2", 5), ("10.0.0.1", 2), ("10.0.0.1", 3), ("fd00::1", 1), ("fd00::2", 1), ("fd00::3", 1)]
    assert too_many(ends, 2) == [("10.0.0.1", 3), ("fd00::3", 1)]
    monkeypatch.setattr("agent.service.connections.FEW_FILES", 0)
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=32))
        bounded = Connections([listener.getsockname()[1]], most_of_peer=3)
        clients, served = [], []
        for number in range(6):
            clients.append(stack.enter_context(socket.create_connection(listener.getsockname())))
            served.append(stack.enter_context(listener.accept()[0]))
            if number == 2:
                bounded.sweep()
        bounded.sweep()
        for client in clients:
            client.settimeout(0.05)
        assert [_open(client) for client in clients] == [True] * 3 + [False] * 3
        assert all(one.fileno() > 0 for one in served), "whose they are closes them"


def _open(client: socket.socket) -> bool:
    try:
        return client.recv(1) != b""
    except TimeoutError:
        return True


def test_6_26_files_are_kept_for_what_is_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, most in ((1024, 384), (20_000, 14_616), (1 << 20, 16_384), (256, 64)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limit=limit: (limit, limit))
        assert most_connections() == most
        assert limit < 600 or most + KEPT_FILES < limit


@pytest.mark.parametrize(
    ("uri", "peer"),
    [
        ("ipv4:10.0.0.1:55000", "10.0.0.1"),
        ("ipv6:[fd92::17]:55000", "fd92::/64"),
        ("ipv6:%5Bfd92::17%5D:55000", "fd92::/64"),
        ("ipv6:[::ffff:10.0.0.1]:1", "10.0.0.1"),
        ("unix:", "unix"),
        ("unix:/run/x.sock", "unix"),
        ("ipv4:what", ""),
    ],
)
def test_6_26_peers_by_address(uri: str, peer: str) -> None:
    assert peer_of_uri(uri) == peer


def test_6_26_calls_are_counted_for_all_and_for_each_peer() -> None:
    calls = Calls(most=3, most_of_peer=2)
    with ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(calls.one("ipv4:10.0.0.1:1"))
        with pytest.raises(DroverError, match=r"2 of them from 10\.0\.0\.1") as caught:
            stack.enter_context(calls.one("ipv4:10.0.0.1:2"))
        assert (caught.value.reason, caught.value.retry_after) == (Reason.OVERLOADED, 1.0)
        stack.enter_context(calls.one("ipv4:10.0.0.2:1"))
        with pytest.raises(DroverError, match="3 calls are under way"):
            stack.enter_context(calls.one("ipv4:10.0.0.3:1"))
    for _ in range(10):
        with calls.one("ipv4:10.0.0.1:1"):
            pass
    assert not calls._of_peer
    assert not calls._total


class Slow(rpc.HostServiceServicer):
    """Answers once the test lets it."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()
        self.was_asked = asyncio.Event()

    async def GetHost(self, request: Any, context: Any) -> pb.GetHostResponse:  # noqa: N802
        self.was_asked.set()
        await self.go_on.wait()
        return pb.GetHostResponse(host=pb.Host(name="h1"))

    async def WatchHost(self, request: Any, context: Any) -> AsyncIterator[pb.WatchHostResponse]:  # noqa: N802
        yield pb.WatchHostResponse()
        await self.go_on.wait()


async def test_6_26_a_call_too_many_is_told_so_and_made_again() -> None:
    slow = Slow()  # type: ignore[abstract]
    server = grpc.aio.server(interceptors=[ErrorInterceptor(Calls(most_of_peer=2), Bus())])
    rpc.add_HostServiceServicer_to_server(slow, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.enable_retries", 0)]) as plain:
            stub = rpc.HostServiceStub(plain)
            watch = stub.WatchHost(pb.WatchHostRequest())
            await watch.read()
            waiting = asyncio.ensure_future(stub.GetHost(pb.GetHostRequest(), timeout=10))
            await asyncio.wait_for(slow.was_asked.wait(), 5)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.GetHost(pb.GetHostRequest(), timeout=5)
            error = error_from_rpc(caught.value, "h1")
            assert (caught.value.code(), error.reason) == (grpc.StatusCode.UNAVAILABLE, Reason.OVERLOADED)
            assert error.retry_after == 1.0
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.WatchHost(pb.WatchHostRequest(), timeout=5).read()
            assert error_from_rpc(caught.value, "h1").reason is Reason.OVERLOADED
            async with open_channel(f"127.0.0.1:{port}") as channel:
                again = asyncio.ensure_future(rpc.HostServiceStub(channel).GetHost(pb.GetHostRequest(), timeout=10))
                await asyncio.sleep(0.3)  # it has been refused at least once by then, or has not been made: right both times
                watch.cancel()
                slow.go_on.set()
                assert (await again).host.name == "h1"
            assert (await waiting).host.name == "h1"
    finally:
        await server.stop(0)


async def test_6_26_a_flood_from_the_network_gets_no_bare_cancelled(tmp_path: Path) -> None:
    """2,000 calls at once over a few connections: gRPC's core cancelled those that waited beyond 1,000."""
    quick = Slow()  # type: ignore[abstract]
    quick.go_on.set()
    server = await start_server(
        ["127.0.0.1:0", f"unix:{tmp_path}/x.sock"], lambda s: rpc.add_HostServiceServicer_to_server(quick, s), [SERVICE], Bus()
    )
    try:
        options = [("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1)]
        async with ExitStackOfChannels(server.addresses[0], 8, options) as channels:

            async def call(number: int) -> str:
                try:
                    await rpc.HostServiceStub(channels[number % 8]).GetHost(pb.GetHostRequest(), timeout=50)
                except grpc.aio.AioRpcError as error:
                    return error.code().name
                return "ok"

            codes, local = await asyncio.gather(asyncio.gather(*map(call, range(2000))), ask(server.addresses[1]))
        assert set(codes) <= {"ok", "UNAVAILABLE"}
        assert local == "h1"
    finally:
        await server.stop(0)


async def test_8_2_two_thousand_calls_that_wait_hold_up_no_other_call_of_the_same_connection() -> None:
    slow, asked = Slow(), asyncio.Semaphore(0)  # type: ignore[abstract]

    async def wait(request: Any, context: Any) -> pb.GetHostResponse:
        asked.release()
        await slow.go_on.wait()
        return pb.GetHostResponse()

    slow.GetHost = wait  # type: ignore[method-assign]
    server = await start_server(["127.0.0.1:0"], lambda s: rpc.add_HostServiceServicer_to_server(slow, s), [SERVICE], Bus())
    try:
        async with open_channel(server.addresses[0]) as channel:
            stub = rpc.HostServiceStub(channel)
            waiting = [asyncio.ensure_future(stub.GetHost(pb.GetHostRequest(), timeout=50)) for _ in range(2000)]
            for _ in waiting:
                await asyncio.wait_for(asked.acquire(), 30)
            watch = stub.WatchHost(pb.WatchHostRequest(), timeout=10)
            assert isinstance(await watch.read(), pb.WatchHostResponse)
            slow.go_on.set()
            await asyncio.gather(*waiting)
    finally:
        await server.stop(0)


class ExitStackOfChannels:
    def __init__(self, address: str, number: int, options: list[tuple[str, int]]) -> None:
        self._channels = [grpc.aio.insecure_channel(address, options=options) for _ in range(number)]

    async def __aenter__(self) -> list[grpc.aio.Channel]:
        return self._channels

    async def __aexit__(self, *_: object) -> None:
        for channel in self._channels:
            await channel.close()


async def test_6_26_a_sweep_that_gets_no_file_is_not_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    swept = asyncio.Event()
    errors = [OSError(24, "Too many open files")]

    def sweep(_: Connections) -> None:
        if errors:
            raise errors.pop()
        swept.set()

    monkeypatch.setattr("agent.service.connections.SWEEP_SECONDS", 0.01)
    monkeypatch.setattr(Connections, "sweep", sweep)
    bounding = asyncio.create_task(Connections([7400]).keep_bounded())
    await asyncio.wait_for(swept.wait(), 5)
    bounding.cancel()
