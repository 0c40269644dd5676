"""Server reflection, ``grpc.reflection.v1`` and ``v1alpha``, so that grpcurl, buf and the like need no `.proto` files.

The servicer is grpcio's. It lacks three things, which are added here:

- ``json_name``: protoc leaves it out of Python's descriptors, and grpcurl then prints ``memory_bytes`` for ``memoryBytes``;
- methods as symbols: ``grpcurl describe drover.agent.v1.HostService.GetHost``;
- version v1, whose messages are those of v1alpha under another package name."""

from collections.abc import Sequence
from typing import Any

import grpc.aio
from google.protobuf import descriptor_pb2, descriptor_pool
from google.protobuf.descriptor import FileDescriptor
from grpc_reflection.v1alpha import reflection, reflection_pb2  # type: ignore[import-untyped]

V1ALPHA = "grpc.reflection.v1alpha"
V1 = "grpc.reflection.v1"
SERVICE = "ServerReflection"
METHOD = "ServerReflectionInfo"


def add_reflection(server: grpc.aio.Server, service_names: Sequence[str]) -> None:
    """Describe these services, and reflection itself."""
    names = (*service_names, f"{V1}.{SERVICE}", f"{V1ALPHA}.{SERVICE}")
    servicer = reflection.aio.ReflectionServicer(names, pool=_Pool())
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers(
        tuple(grpc.method_handlers_generic_handler(f"{package}.{SERVICE}", {METHOD: handler}) for package in (V1, V1ALPHA))
    )


class _File:
    """A `FileDescriptor` whose copy has every ``json_name``."""

    def __init__(self, descriptor: FileDescriptor) -> None:
        self._descriptor = descriptor
        self.name = descriptor.name

    @property
    def dependencies(self) -> "list[_File]":
        return [_File(descriptor) for descriptor in self._descriptor.dependencies]

    def CopyToProto(self, proto: descriptor_pb2.FileDescriptorProto) -> None:  # noqa: N802 - protobuf's name
        self._descriptor.CopyToProto(proto)
        for message in proto.message_type:
            _name_in_json(message)


def _name_in_json(message: descriptor_pb2.DescriptorProto) -> None:
    for field in message.field:
        field.json_name = field.json_name or _json_name(field.name)
    for nested in message.nested_type:
        _name_in_json(nested)


def _json_name(name: str) -> str:
    """Apply protoc's rule: each underscore is removed, and the letter after it capitalized."""
    first, *others = name.split("_")
    return first + "".join(word[:1].upper() + word[1:] for word in others)


class _Pool:
    """The part of a descriptor pool that `ReflectionServicer` uses. Raises `KeyError` for unknown names."""

    def __init__(self) -> None:
        self._pools = (descriptor_pool.Default(), _pool_of_v1())

    def FindFileByName(self, name: str) -> _File:  # noqa: N802 - protobuf's names
        return _File(self._first("FindFileByName", name))

    def FindFileContainingSymbol(self, symbol: str) -> _File:  # noqa: N802
        try:
            return _File(self._first("FindFileContainingSymbol", symbol))
        except KeyError:
            service, _, method = symbol.rpartition(".")
            found = self._first("FindServiceByName", service)
            if method not in found.methods_by_name:
                raise
            return _File(found.file)

    def FindMessageTypeByName(self, name: str) -> Any:  # noqa: N802
        return self._pools[0].FindMessageTypeByName(name)

    def FindExtensionByNumber(self, message: Any, number: int) -> Any:  # noqa: N802
        return self._pools[0].FindExtensionByNumber(message, number)

    def FindAllExtensions(self, message: Any) -> Any:  # noqa: N802
        return self._pools[0].FindAllExtensions(message)

    def _first(self, find: str, name: str) -> Any:
        for pool in self._pools[:-1]:
            try:
                return getattr(pool, find)(name)
            except KeyError:
                continue
        return getattr(self._pools[-1], find)(name)


def _pool_of_v1() -> descriptor_pool.DescriptorPool:
    """Return a pool of its own for v1, so that it cannot clash with a library that brings v1 some day."""
    file = descriptor_pb2.FileDescriptorProto.FromString(reflection_pb2.DESCRIPTOR.serialized_pb)
    file.name, file.package = "grpc/reflection/v1/reflection.proto", V1
    for message in file.message_type:
        for field in message.field:
            if field.type_name:
                field.type_name = field.type_name.replace(f".{V1ALPHA}.", f".{V1}.")
    for method in file.service[0].method:
        method.input_type = method.input_type.replace(f".{V1ALPHA}.", f".{V1}.")
        method.output_type = method.output_type.replace(f".{V1ALPHA}.", f".{V1}.")
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return pool
