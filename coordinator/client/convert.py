"""The one conversion from messages to the client's types, by the type of each attribute.

An attribute has the name of its field unless `wire` names another. A duration becomes seconds, a timestamp a time, an enum its
name in lower case, a message the dataclass of the attribute's type. An optional attribute is None if the message lacks the field.
"""

import dataclasses
import functools
import types
from collections.abc import Callable
from datetime import UTC
from typing import Any, Self, cast, get_args, get_origin

from google.protobuf.descriptor import EnumDescriptor, FieldDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

PROTO = "proto"
"""Name of the attribute that has the whole message."""


def wire(*paths: str) -> Any:
    """Declare from which field an attribute comes: a name, or a dotted path; of several, the first whose value is not empty."""
    return dataclasses.field(metadata={"wire": paths})


class FromWire:
    """A frozen dataclass that is made from a message."""

    @classmethod
    def from_proto(cls, message: Any) -> Self:
        """Return the values of a message. A value of a newer server's enum is "unknown_" and its number."""
        return cls(**{name: read(message) for name, read in _readers(cast("Any", cls))})


@functools.cache
def _readers(kind: Any) -> list[tuple[str, Callable[[Message], Any]]]:
    readers: list[tuple[str, Callable[[Message], Any]]] = []
    for field in dataclasses.fields(kind):
        paths = [path.split(".") for path in field.metadata.get("wire", (field.name,))]
        read = (lambda message: message) if field.name == PROTO else functools.partial(_read, field.type, paths)
        readers.append((field.name, read))
    return readers


def _read(hint: Any, paths: list[list[str]], message: Any) -> Any:
    value = None
    for *parents, name in paths:
        holder = functools.reduce(getattr, parents, message)
        value = _inside(hint, holder.DESCRIPTOR.fields_by_name[name], holder, name)
        if value:
            break
    return value


def _inside(hint: Any, field: FieldDescriptor, holder: Any, name: str) -> Any:
    value = getattr(holder, name)
    if isinstance(hint, types.UnionType):
        if not holder.HasField(name):
            return None
        hint = next(kind for kind in get_args(hint) if kind is not types.NoneType)
    if get_origin(hint) is dict:
        values: Any = field.message_type
        return {key: _single(str, values.fields_by_name["value"], each) for key, each in value.items()}
    if get_origin(hint) is tuple:
        return tuple(_single(get_args(hint)[0], field, each) for each in value)
    return _single(hint, field, value)


def _single(hint: Any, field: FieldDescriptor, value: Any) -> Any:
    if field.enum_type is not None:
        return hint(name_of(field.enum_type, value))
    if isinstance(value, Duration):
        return value.ToNanoseconds() / 1e9
    if isinstance(value, Timestamp):
        return value.ToDatetime(tzinfo=UTC)
    return hint.from_proto(value) if isinstance(value, Message) else value


def name_of(enum: EnumDescriptor, number: int) -> str:
    """Return a value's name in lower case without the enum's prefix; for a newer server's, "unknown_99", "unknown_minus_1"."""
    if number not in enum.values_by_number:
        return f"unknown_{number}".replace("-", "minus_")
    prefix = enum.values_by_number[0].name.removesuffix("UNSPECIFIED")
    return str(enum.values_by_number[number].name).removeprefix(prefix).lower()
