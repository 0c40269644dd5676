"""Clears implausible values in an answer: they count as not set, and no reader of the answer can fail on them.

Implausible are a time outside of the years 1970 to 9999, a duration over 10,000 years, and a negative number where none is allowed.
A rate above `MOST_RATE` counts as that.

The answer itself is accepted: a host with a broken clock must still be able to report a decision. Protobuf itself rejects invalid
UTF-8."""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Final

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from agent.runtime.wire import MOST_RATE
from drover.agent.v1 import bounds_pb2

MAX_DURATION_SECONDS: Final = 315_576_000_000
"""10,000 years: the bound of google.protobuf.Duration itself."""
MAX_TIME_SECONDS: Final = 253_402_300_799
"""The end of the year 9999: the bound of google.protobuf.Timestamp itself."""

_SIGNED: Final = (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_INT64)

_Drop = Callable[[Message, Any], None]
"""Clears the value of one field of a message if it is implausible, or implausible values in it."""


def drop_implausible(message: Message) -> None:
    """Clear implausible values in the message, at any depth."""
    drops = _drops(message.DESCRIPTOR)
    for field, value in message.ListFields():
        drop = drops.get(field.number)
        if drop is not None:
            drop(message, value)


def is_time(value: Timestamp) -> bool:
    """Return whether it is between the years 1970 and 9999."""
    return 0 <= value.seconds <= MAX_TIME_SECONDS and 0 <= value.nanos < 1_000_000_000


def is_duration(value: Duration) -> bool:
    """Return whether it is strictly below 10,000 years (it may be rounded up), negative or not."""
    same_sign = value.seconds * value.nanos >= 0
    return abs(value.seconds) < MAX_DURATION_SECONDS and abs(value.nanos) < 1_000_000_000 and same_sign


def _is_length(value: Duration) -> bool:
    return value.seconds >= 0 and value.nanos >= 0 and is_duration(value)


def _is_count(value: int) -> bool:
    return value >= 0


@cache
def _drops(descriptor: Descriptor) -> Mapping[int, _Drop]:
    return {field.number: drop for field in descriptor.fields if (drop := _drop_of(field)) is not None}


def _drop_of(field: FieldDescriptor) -> _Drop | None:
    """Return None if every value of the field is plausible."""
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return _drop_in_values if field.message_type.fields_by_name["value"].message_type is not None else None
    if is_rate(field):
        return _bound_rate(field.name)
    plausible = _plausible(field)
    if plausible is not None:
        return _unless(plausible, field.name)
    if field.message_type is None:
        return None
    return _drop_in_items if field.is_repeated else lambda _, value: drop_implausible(value)


def _plausible(field: FieldDescriptor) -> Callable[[Any], bool] | None:
    """Return the test of the field's value; None if there is none. No message has a repeated time or number."""
    signed = field.GetOptions().Extensions[bounds_pb2.may_be_negative]
    if field.message_type is None:
        return _is_count if field.cpp_type in _SIGNED and not signed else None
    if field.message_type.full_name == Duration.DESCRIPTOR.full_name:
        return is_duration if signed else _is_length
    return is_time if field.message_type.full_name == Timestamp.DESCRIPTOR.full_name else None


def is_rate(field: FieldDescriptor) -> bool:
    """Return whether the field is a number of bytes per second."""
    return field.name.endswith("bytes_per_second")


def _bound_rate(name: str) -> _Drop:
    def bound(message: Message, value: Any) -> None:
        if not 0 <= value <= MOST_RATE:
            setattr(message, name, min(max(value, 0), MOST_RATE))

    return bound


def _unless(plausible: Callable[[Any], bool], name: str) -> _Drop:
    def drop(message: Message, value: Any) -> None:
        if not plausible(value):
            message.ClearField(name)

    return drop


def _drop_in_items(_message: Message, values: Any) -> None:
    for value in values:
        drop_implausible(value)


def _drop_in_values(_message: Message, values: Any) -> None:
    for key in values:
        drop_implausible(values[key])
