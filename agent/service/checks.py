"""Checks of single values against the bounds of their fields. Each takes a value and its field's path, and raises `DroverError`."""

import ipaddress
import re
from collections.abc import Callable
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from agent.hypervisor.names import name_problem
from agent.hypervisor.options import Option
from agent.runtime.errors import DroverError, Reason, invalid_field
from agent.runtime.wire import MOST_RATE
from agent.service.implausible import is_duration, is_time

MAX_STRING = 253
"""Bytes of a string that has no max_bytes of its own."""
MAX_LINE = 1024
"""A string whose bound is no higher than this is a single line."""

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")

Check = Callable[[Any, str], None]


def check_count(count: int, max_items: int, path: str) -> None:
    if count > max_items:
        raise too_large(path, f"has {count} items; at most {max_items} are allowed", max_items, count)


def string_check(max_bytes: int) -> Check:
    one_line = max_bytes <= MAX_LINE

    def check(value: str, path: str) -> None:
        check_size(size(value), max_bytes, path)
        if one_line and (found := _CONTROL.search(value)):
            raise invalid_field(path, f"has the control character U+{ord(found.group()):04X}; this field is a single line")
        if "\0" in value:
            raise invalid_field(path, "has a NUL character")

    return check


def size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def bytes_check(max_bytes: int) -> Check:
    def check(value: bytes, path: str) -> None:
        check_size(len(value), max_bytes, path)

    return check


def check_size(size: int, max_bytes: int, path: str) -> None:
    if size > max_bytes:
        raise too_large(path, f"has {size} bytes; at most {max_bytes} are allowed", max_bytes, size)


def too_large(path: str, description: str, bound: int, size: int) -> DroverError:
    error = invalid_field(path, description, Reason.FIELD_TOO_LARGE)
    metadata = {"field": path, "bound": str(bound), "size": str(size)}
    return DroverError(error.reason, error.message, metadata=metadata, violations=error.violations)


def enum_check(numbers: frozenset[int]) -> Check:
    def check(value: int, path: str) -> None:
        if value not in numbers:
            raise invalid_field(path, f"{value} is not a known value")

    return check


def option_check(option: Option) -> Check:
    def check(value: Any, path: str) -> None:
        if problem := option.problem(value):
            raise invalid_field(path, problem)

    return check


def uuid(value: str, path: str) -> None:
    check_size(len(value), 36, path)
    if _UUID.fullmatch(value) is None:
        raise invalid_field(path, "is not a UUID such as 0b6f3c1e-8f0a-4c57-9a53-1f5d2f0c9a11 (lower case, with dashes)")


def guest_name(value: str, path: str) -> None:
    check_size(size(value), MAX_STRING, path)
    if problem := name_problem(value):
        raise invalid_field(path, f"{problem}; no host accepts a guest of that name")


def not_negative(value: int, path: str) -> None:
    if value < 0:
        raise invalid_field(path, f"is {value}; it cannot be negative")


def rate(value: int, path: str) -> None:
    not_negative(value, path)
    if value > MOST_RATE:
        raise invalid_field(path, f"is {value}; at most {MOST_RATE} bytes per second are allowed, and 0 is no limit")


def ip_address(value: str, path: str) -> None:
    try:
        if value:  # `required` refuses an empty one
            ipaddress.ip_address(value)
    except ValueError:
        raise invalid_field(path, "is not an IP address") from None


def timestamp(value: Timestamp, path: str) -> None:
    if not is_time(value):
        raise invalid_field(path, "is not a time between the years 1970 and 9999")


def duration_check(max_seconds: int | None) -> Check:
    def check(value: Duration, path: str) -> None:
        if value.seconds < 0 or value.nanos < 0:
            raise invalid_field(path, "is negative; a duration cannot be negative")
        if not is_duration(value):
            raise invalid_field(path, "is not a valid duration")
        if max_seconds is not None and (value.seconds, value.nanos) > (max_seconds, 0):
            raise invalid_field(path, f"is longer than {max_seconds} s")

    return check


def unsupported(_value: Any, path: str) -> None:
    raise invalid_field(path, "is not supported by this version; leave it out", Reason.UNSUPPORTED_FIELD)
