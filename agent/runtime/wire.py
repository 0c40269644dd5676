"""Conversions that every message and service needs: enums, times, bounded text, names of methods."""

import functools
import re
from collections.abc import Mapping
from typing import Any, Final

from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

MOST_RATE: Final = 10**12
"""Most bytes per second in any field whose name ends in ``bytes_per_second``: more than any line carries, and sums of many fit."""


@functools.lru_cache(maxsize=256)
def enum_name(kind: Any, value: int) -> str:
    """Return the name of an enum's value in lower case without the enum's prefix; ``state 99`` for a value of a newer version."""
    values = kind.DESCRIPTOR.values_by_number
    if value not in values:
        return f"state {value}"
    return str(values[value].name).removeprefix(values[0].name.removesuffix("UNSPECIFIED")).lower()


def duration(seconds: float) -> Duration:
    message = Duration()
    message.FromNanoseconds(int(seconds * 1e9))
    return message


def timestamp(seconds: float) -> Timestamp:
    message = Timestamp()
    message.FromNanoseconds(int(seconds * 1e9))
    return message


def cut(text: str, max_bytes: int) -> str:
    """Cut a text to the bound of its field, which a peer enforces and a hypervisor's messages may exceed."""
    return text if len(text) * 4 <= max_bytes else text.encode()[:max_bytes].decode(errors="ignore")


def methods_of(service: ServiceDescriptor) -> Mapping[str, MethodDescriptor]:
    """Return the RPCs of a service by their names in snake case: ``ReserveSlot`` is ``reserve_slot``."""
    return {re.sub(r"(?<!^)(?=[A-Z])", "_", method.name).lower(): method for method in service.methods}
