"""agent.service.identity."""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent.runtime.events import Bus
from agent.service.channel import open_channel
from agent.service.identity import Caller, caller_of, current_caller
from agent.service.server import start_server
from drover.agent.v1 import host_pb2 as pb
from drover.agent.v1 import host_pb2_grpc as rpc

SERVICE = "drover.agent.v1.HostService"


@pytest.mark.parametrize(
    ("uri", "caller", "text"),
    [
        ("unix:", Caller("unix", "", os.geteuid()), f"unix:uid={os.geteuid()}"),
        ("unix:/run/s", Caller("unix", "", os.geteuid()), f"unix:uid={os.geteuid()}"),
        ("ipv4:10.91.0.2:55010", Caller("tcp", "10.91.0.2:55010", None), "10.91.0.2:55010"),
        ("ipv6:%5Bfd92::1%5D:55010", Caller("tcp", "[fd92::1]:55010", None), "[fd92::1]:55010"),
    ],
)
def test_7_a_caller_is_where_the_call_came_from(uri: str, caller: Caller, text: str) -> None:
    assert (caller_of(uri), str(caller_of(uri))) == (caller, text)


class Host(rpc.HostServiceServicer):
    """Records its callers."""

    def __init__(self) -> None:
        self.callers: list[Caller | None] = []

    async def _from_a_task(self) -> None:
        self.callers.append(current_caller())

    async def GetHost(self, request: pb.GetHostRequest, context: object) -> pb.GetHostResponse:  # noqa: N802
        await asyncio.create_task(self._from_a_task())
        return pb.GetHostResponse()

    async def WatchHost(self, request: pb.WatchHostRequest, context: object) -> AsyncIterator[pb.WatchHostResponse]:  # noqa: N802
        self.callers.append(current_caller())
        yield pb.WatchHostResponse()
        self.callers.append(current_caller())


async def test_7_a_handler_and_its_tasks_see_the_caller(tmp_path: Path) -> None:
    host = Host()  # type: ignore[abstract]
    server = await start_server(
        [f"unix:{tmp_path}/s", "127.0.0.1:0", "[::1]:0"], lambda s: rpc.add_HostServiceServicer_to_server(host, s), [SERVICE], Bus()
    )
    for address in server.addresses:
        async with open_channel(address) as channel:
            stub = rpc.HostServiceStub(channel)
            await stub.GetHost(pb.GetHostRequest())
            assert [response async for response in stub.WatchHost(pb.WatchHostRequest())]
    await server.stop(0)
    local, v4, v6 = host.callers[::3]
    assert host.callers == [local] * 3 + [v4] * 3 + [v6] * 3
    assert local == Caller("unix", "", os.geteuid())
    assert [(c.transport, c.address.rpartition(":")[0], c.uid) for c in (v4, v6) if c] == [
        ("tcp", "127.0.0.1", None),
        ("tcp", "[::1]", None),
    ]
    assert current_caller() is None
