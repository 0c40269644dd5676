"""Requirement H10: the reflection by which grpcurl and similar clients query a server."""

from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc.aio
import pytest
from google.protobuf import descriptor_pb2
from google.protobuf.json_format import MessageToDict
from grpc_reflection.v1alpha import reflection_pb2 as pb  # type: ignore[import-untyped]

from agent.runtime.events import Bus
from agent.service import handshake_service, host_service, migration_service
from agent.service.channel import open_channel
from agent.service.server import start_server
from coordinator.hosts import host_service as cluster_host_service
from drover.agent.v1 import handshake_pb2, host_pb2, migration_pb2

SERVICES = [each.SERVICE for each in (handshake_service, host_service, migration_service, cluster_host_service)]
VERSIONS = ("v1", "v1alpha")


@pytest.fixture(name="channel")
async def _channel() -> AsyncIterator[grpc.aio.Channel]:
    server = await start_server(["127.0.0.1:0"], lambda _: None, SERVICES, Bus())
    async with open_channel(server.addresses[0]) as channel:
        yield channel
    await server.stop(0)


async def ask(channel: grpc.aio.Channel, request: Any, version: str = "v1") -> Any:
    method: Any = channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        request_serializer=pb.ServerReflectionRequest.SerializeToString,
        response_deserializer=pb.ServerReflectionResponse.FromString,
    )
    call = method(iter([request]), timeout=5)
    answer = await call.read()
    call.cancel()
    return answer


async def files(channel: grpc.aio.Channel, symbol: str) -> list[descriptor_pb2.FileDescriptorProto]:
    answer = await ask(channel, pb.ServerReflectionRequest(file_containing_symbol=symbol))
    return [descriptor_pb2.FileDescriptorProto.FromString(raw) for raw in answer.file_descriptor_response.file_descriptor_proto]


def messages(file: Any) -> Iterator[Any]:
    for message in file.message_type:
        yield message
        yield from message.nested_type


@pytest.mark.parametrize("version", VERSIONS)
async def test_6_28_both_versions_list_every_service(channel: grpc.aio.Channel, version: str) -> None:
    answer = await ask(channel, pb.ServerReflectionRequest(list_services="*"), version)
    reflection = [f"grpc.reflection.{each}.ServerReflection" for each in VERSIONS]
    assert [each.name for each in answer.list_services_response.service] == sorted([*SERVICES, "grpc.health.v1.Health", *reflection])


@pytest.mark.parametrize("service", SERVICES)
async def test_6_28_every_field_has_the_json_name_of_protobuf(channel: grpc.aio.Channel, service: str) -> None:
    found = await files(channel, service)
    fields = {f"{m.name}.{f.name}": f.json_name for file in found for m in messages(file) for f in m.field}
    assert fields
    assert "" not in fields.values()
    for module in (handshake_pb2, host_pb2, migration_pb2):
        for message in module.DESCRIPTOR.message_types_by_name.values():
            for field in message.fields:
                assert fields.get(f"{message.name}.{field.name}", field.json_name) == field.json_name


async def test_6_28_a_method_is_a_symbol(channel: grpc.aio.Channel) -> None:
    found = await files(channel, f"{handshake_service.SERVICE}.Begin")
    assert "drover/agent/v1/handshake.proto" in {file.name for file in found}


@pytest.mark.parametrize("version", VERSIONS)
async def test_6_28_each_version_describes_itself(channel: grpc.aio.Channel, version: str) -> None:
    (file,) = await files(channel, f"grpc.reflection.{version}.ServerReflection.ServerReflectionInfo")
    assert file.package == f"grpc.reflection.{version}"
    others = {each for each in VERSIONS if each != version}
    assert not any(f"grpc.reflection.{other}." in str(MessageToDict(file)) for other in others)


@pytest.mark.parametrize("symbol", ["", ".", "drover.agent.v1.HandshakeService.Nope", "drover.agent.v1.Nope", "x" * 10_000])
async def test_6_28_what_is_not_there_is_not_found(channel: grpc.aio.Channel, symbol: str) -> None:
    answer = await ask(channel, pb.ServerReflectionRequest(file_containing_symbol=symbol))
    assert answer.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]
