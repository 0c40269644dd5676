"""agent.service.rights: the table has every method that is served."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType

import pytest
from grpc_health.v1 import health_pb2  # type: ignore[import-untyped]

from agent.runtime.errors import Reason
from agent.runtime.events import Bus
from agent.service import interceptor, rights
from agent.service.channel import open_channel
from agent.service.reflection import METHOD, SERVICE, V1, V1ALPHA
from agent.service.server import start_server
from drover.agent.v1 import host_pb2 as pb
from drover.agent.v1 import host_pb2_grpc as rpc
from tests.unit.test_interceptor import failure

PROTOS = Path(__file__).parents[2] / "protos"


def served() -> Iterator[str]:
    """Return every method of every descriptor that an agent or a coordinator serves."""
    modules = [".".join(path.relative_to(PROTOS).with_suffix("").parts) for path in PROTOS.rglob("*_pb2.py")]
    files = [health_pb2.DESCRIPTOR, *(importlib.import_module(name).DESCRIPTOR for name in modules)]
    for service in (service for file in files for service in file.services_by_name.values()):
        yield from (f"/{service.full_name}/{method}" for method in service.methods_by_name)
    yield from (f"/{package}.{SERVICE}/{METHOD}" for package in (V1, V1ALPHA))


def test_7_every_rpc_has_a_right_and_every_right_an_rpc() -> None:
    methods = set(served())
    assert len(methods) > 30
    assert {"without a right": methods - rights.RIGHTS.keys(), "without an RPC": rights.RIGHTS.keys() - methods} == {
        "without a right": set(),
        "without an RPC": set(),
    }


class Host(rpc.HostServiceServicer):
    async def GetHost(self, request: pb.GetHostRequest, context: object) -> pb.GetHostResponse:  # noqa: N802
        return pb.GetHostResponse(host=pb.Host(name="h1"))


async def test_7_an_rpc_without_a_right_is_not_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = "/drover.agent.v1.HostService/GetHost"
    others = MappingProxyType({name: right for name, right in rights.RIGHTS.items() if name != method})
    monkeypatch.setattr(interceptor, "RIGHTS", others)
    server = await start_server(
        [f"unix:{tmp_path}/s"],
        lambda s: rpc.add_HostServiceServicer_to_server(Host(), s),  # type: ignore[abstract]
        ["drover.agent.v1.HostService"],
        Bus(),
    )
    async with open_channel(server.addresses[0]) as channel:
        call = rpc.HostServiceStub(channel).GetHost
        assert (await failure(call(pb.GetHostRequest()))).reason is Reason.UNIMPLEMENTED
        monkeypatch.undo()
        assert (await call(pb.GetHostRequest())).host.name == "h1"
    await server.stop(0)
