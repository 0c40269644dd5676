"""agent.service.registration: an agent registers its host, and repeats it."""

import asyncio
from pathlib import Path
from typing import Any, cast

import grpc.aio
import structlog
from google.protobuf.duration_pb2 import Duration

from agent.runtime.errors import DroverError, Reason
from agent.runtime.events import Bus
from agent.service.channel import open_channel
from agent.service.host import AgentHost
from agent.service.registration import keep_registered
from agent.service.server import start_server
from drover.agent.v1 import host_pb2
from drover.coordinator.v1 import host_pb2 as cluster_pb2
from drover.coordinator.v1 import host_pb2_grpc as cluster_pb2_grpc
from tests.unit.asking import until
from tests.unit.clocks import FakeClock


class Host:
    def describe(self) -> host_pb2.Host:
        return host_pb2.Host(name="h1")


class Coordinator(cluster_pb2_grpc.HostServiceServicer):
    """A coordinator that refuses all calls but every fifth and the one after it."""

    def __init__(self) -> None:
        self.calls = 0

    async def RegisterHost(self, request: Any, context: Any) -> cluster_pb2.RegisterHostResponse:  # noqa: N802
        self.calls += 1
        if self.calls % 5 > 1:
            raise DroverError(Reason.HOST_NAME_TAKEN, "another host has that name")
        return cluster_pb2.RegisterHostResponse(heartbeat_interval=Duration(nanos=1_000_000))


async def test_only_a_change_is_logged(tmp_path: Path) -> None:
    coordinator = Coordinator()  # type: ignore[abstract]

    def add(server: grpc.aio.Server) -> None:
        cluster_pb2_grpc.add_HostServiceServicer_to_server(coordinator, server)

    server = await start_server([f"unix:{tmp_path}/s"], add, [], Bus())
    async with open_channel(f"unix:{tmp_path}/s") as channel:
        with structlog.testing.capture_logs() as logs:
            registering = asyncio.create_task(keep_registered(channel, cast(AgentHost, Host()), "unix:/h1", FakeClock()))
            await until(lambda: coordinator.calls > 10)
            registering.cancel()
            await asyncio.wait({registering})
    await server.stop(0)
    levels = [line["log_level"] for line in logs if "coordinator" in line["event"]]
    assert levels[:4] == ["info", "warning", "info", "warning"]
