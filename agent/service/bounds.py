"""Checks every request against the bounds in the protos before it is used, and the sizes of every answer.

It enforces `bounds.proto` (max_bytes, max_items, required, reserved_for_later, guest_name) and the rules of all messages:

- no integer and no duration is negative, and no rate above `MOST_RATE`;
- ``migration_id`` and the UUID of a guest are in their canonical form (lower case), so that one thing has one name;
- a string of at most `MAX_LINE` bytes is one line without control characters (names go into logs, terminals and XML); only longer
  ones, such as XML, may have several lines;
- a time lies between 1970 and 9999, and a network's address is an IP address (in an answer, too);
- implausible values in an answer are cleared (`agent.service.implausible`);
- an order contains nothing unknown: `Options` and `MigrationSpec` no unknown field, they and the requests themselves no unknown enum
  value. Reports (a `Host`) may: a newer agent may report more;
- a record that a driver relays is checked like an answer of the host that made it: a call must not be refused for what that host's
  hypervisor has reported.

The rules are compiled once for each type of message. A check visits only the fields that are set, which takes a few microseconds."""

from collections.abc import Awaitable
from dataclasses import dataclass
from enum import Enum, auto
from functools import cache
from typing import Any, TypeVar

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from google.protobuf.unknown_fields import UnknownFieldSet

from agent.hypervisor.options import OPTIONS
from agent.runtime.errors import DroverError, Reason, invalid_field
from agent.service.checks import (
    MAX_STRING,
    Check,
    bytes_check,
    check_count,
    check_size,
    duration_check,
    enum_check,
    guest_name,
    ip_address,
    not_negative,
    option_check,
    rate,
    size,
    string_check,
    timestamp,
    unsupported,
    uuid,
)
from agent.service.implausible import drop_implausible, is_rate
from agent.service.status import errors_of
from drover.agent.v1 import bounds_pb2, handshake_pb2, host_pb2, migration_pb2, options_pb2

MAX_BYTES = 65536
"""Bytes of a bytes field that has no max_bytes of its own."""
MAX_ITEMS = 64
"""Items of a repeated field or map that has no max_items of its own."""


_UUID_FIELDS = {"migration_id", "uuid", "domain_uuid"}

_OPTION_FIELDS = {field.full_name for field in options_pb2.Options.DESCRIPTOR.fields}

_NETWORK_ADDRESS = host_pb2.Network.DESCRIPTOR.fields_by_name["address"].full_name

# Orders: anything unknown in them is refused, not skipped.
_CLOSED = {options_pb2.Options.DESCRIPTOR.full_name, migration_pb2.MigrationSpec.DESCRIPTOR.full_name}

_M = TypeVar("_M", bound=Message)


def check_request(message: Message) -> None:
    """Check a request before anything is changed. Raises INVALID_FIELD, FIELD_TOO_LARGE, UNSUPPORTED_FIELD or UNKNOWN_OPTION for the
    first invalid field, with its path, such as ``spec.options.live``."""
    _walk(message, "")


async def answer_of(call: Awaitable[_M], peer: str) -> _M:
    """Return the answer to a call, checked. Raises its error as the peer's, and FIELD_TOO_LARGE."""
    with errors_of(peer):
        return checked_answer(await call, peer)


def checked_answer(answer: _M, peer: str) -> _M:
    """Return a peer's answer without implausible values. Raises FIELD_TOO_LARGE: it goes to the hypervisor or the store."""
    try:
        check_answer(answer)
    except DroverError as error:
        text = f"the answer of {peer} is refused: {error.message}"
        raise DroverError(error.reason, text, metadata={**error.metadata, "peer": peer}) from None
    return answer


def check_answer(message: Message) -> None:
    """Clear implausible values in a peer's answer, and raise FIELD_TOO_LARGE for its first field that is too large.

    Nothing else is a reason to refuse an answer: a faulty record must still be read, as only it tells where the guest runs."""
    drop_implausible(message)
    _walk(message, "", answer=True)


class _Kind(Enum):
    """How strictly a message is checked."""

    ORDER = auto()
    """Unknown values are refused."""
    REPORT = auto()
    """Unknown values are allowed: part of a request that reports, such as a `Host`, whose sender may be newer."""
    ANSWER = auto()
    """Only sizes are checked."""


@dataclass(frozen=True)
class _Rules:
    """The checks of messages of one type."""

    checks: dict[int, Check]
    """By field number."""
    required: tuple[tuple[str, bool], ...]
    """Names of required fields, and whether presence is checked (messages) or the value."""
    closed: bool


def _walk(message: Message, prefix: str, *, answer: bool = False) -> None:
    rules = _rules(message.DESCRIPTOR, answer)
    if rules.closed:
        _refuse_unknown_fields(message, prefix)
    for field, value in message.ListFields():
        check = rules.checks.get(field.number)
        if check is not None:
            check(value, prefix + field.name)
    for name, by_presence in rules.required:
        if not (message.HasField(name) if by_presence else getattr(message, name)):
            raise invalid_field(prefix + name, "is required and was empty")


@cache
def _rules(descriptor: Descriptor, answer: bool) -> _Rules:
    if answer:
        return _Rules(_checks(descriptor, _Kind.ANSWER), (), closed=False)
    closed = descriptor.full_name in _CLOSED
    kind = _Kind.ORDER if closed or descriptor.name.endswith("Request") else _Kind.REPORT
    required = tuple(
        (field.name, field.message_type is not None and not field.is_repeated)
        for field in descriptor.fields
        if _option(field, bounds_pb2.required)
    )
    return _Rules(_checks(descriptor, kind), required, closed)


def _checks(descriptor: Descriptor, kind: _Kind) -> dict[int, Check]:
    return {field.number: check for field in descriptor.fields if (check := _field_check(field, kind)) is not None}


def _option(field: FieldDescriptor, extension: Any) -> Any:
    """Return the value of one of our field options, or None if the field lacks it."""
    options = field.GetOptions()
    return options.Extensions[extension] if options.HasExtension(extension) else None


def _field_check(field: FieldDescriptor, kind: _Kind) -> Check | None:
    if kind is not _Kind.ANSWER and _option(field, bounds_pb2.reserved_for_later):
        return unsupported
    if _is_map(field):
        return _map_check(field, kind)
    item = _value_check(field, kind, _option(field, bounds_pb2.max_bytes))
    if field.is_repeated:
        return _items_check(_option(field, bounds_pb2.max_items) or MAX_ITEMS, item)
    return item


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and bool(field.message_type.GetOptions().map_entry)


def _value_check(field: FieldDescriptor, kind: _Kind, max_bytes: int | None) -> Check | None:
    """Return the check of a single value; None if every value is valid."""
    if kind is _Kind.ANSWER:
        return _size_check(field, max_bytes)
    if field.full_name in _OPTION_FIELDS:
        return option_check(OPTIONS[field.name])
    if field.message_type is not None:
        if field.message_type.full_name == Duration.DESCRIPTOR.full_name:
            return duration_check(_option(field, bounds_pb2.max_seconds))
        if field.message_type.full_name == Timestamp.DESCRIPTOR.full_name:
            return timestamp
        if field.message_type.full_name == handshake_pb2.Record.DESCRIPTOR.full_name:
            return _relayed
        return _message if max_bytes is None else _message_check(max_bytes, _message)
    if field.enum_type is not None:
        return enum_check(frozenset(field.enum_type.values_by_number)) if kind is _Kind.ORDER else None
    if field.type == FieldDescriptor.TYPE_STRING:
        if _option(field, bounds_pb2.guest_name):
            return guest_name
        if field.full_name == _NETWORK_ADDRESS:
            return ip_address
        return uuid if field.name in _UUID_FIELDS else string_check(max_bytes or MAX_STRING)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return bytes_check(max_bytes or MAX_BYTES)
    if field.cpp_type in (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_INT64):
        return rate if is_rate(field) else not_negative
    return None


def _size_check(field: FieldDescriptor, max_bytes: int | None) -> Check | None:
    if field.message_type is not None:
        return _answer if max_bytes is None else _message_check(max_bytes, _answer)
    if field.full_name == _NETWORK_ADDRESS:
        return ip_address
    if field.type == FieldDescriptor.TYPE_STRING:
        return lambda value, path: check_size(size(value), max_bytes or MAX_STRING, path)
    return bytes_check(max_bytes or MAX_BYTES) if field.type == FieldDescriptor.TYPE_BYTES else None


def _items_check(max_items: int, item: Check | None) -> Check:
    def check(values: Any, path: str) -> None:
        check_count(len(values), max_items, path)
        if item is not None:
            for index, value in enumerate(values):
                item(value, f"{path}[{index}]")

    return check


def _map_check(field: FieldDescriptor, kind: _Kind) -> Check:
    assert field.message_type is not None
    entry = field.message_type.fields_by_name
    key_check = _value_check(entry["key"], kind, None)
    value_check = _value_check(entry["value"], kind, _option(field, bounds_pb2.max_bytes))
    max_items = _option(field, bounds_pb2.max_items) or MAX_ITEMS

    def check(values: Any, path: str) -> None:
        check_count(len(values), max_items, path)
        for key in values:
            if key_check is not None:
                key_check(key, f"{path} (a key)")
            if value_check is not None:
                value_check(values[key], f"{path}[{key}]")

    return check


def _message(value: Message, path: str) -> None:
    _walk(value, path + ".")


def _answer(value: Message, path: str) -> None:
    _walk(value, path + ".", answer=True)


def _relayed(value: Message, path: str) -> None:
    drop_implausible(value)
    _answer(value, path)


def _message_check(max_bytes: int, check_fields: Check) -> Check:
    def check(value: Message, path: str) -> None:
        check_size(value.ByteSize(), max_bytes, path)
        check_fields(value, path)

    return check


def _refuse_unknown_fields(message: Message, prefix: str) -> None:
    numbers = [unknown.field_number for unknown in UnknownFieldSet(message)]  # type: ignore[attr-defined]
    if numbers:
        where = prefix.removesuffix(".") or message.DESCRIPTOR.name
        text = f"{where}: field number {numbers[0]} is not known here; the sender is newer or wrong. Nothing was done"
        raise DroverError(Reason.UNKNOWN_OPTION, text, metadata={"field": where, "number": str(numbers[0])})
