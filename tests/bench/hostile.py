"""Random well-formed requests, as a hostile or faulty caller can send them."""

import random
from collections.abc import Sequence
from typing import Any, Final

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from drover.agent.v1 import bounds_pb2

NUMBERS: Final = (0, 1, 1, 1, 2, 3, 100, 1 << 20, 100 << 20, (1 << 31) - 1)
LARGE: Final = ((1 << 40) + 1, (1 << 63) - 1)
DURATIONS: Final = ((0, 0), (0, 1), (0, 20_000_000), (0, 50_000_000), (5, 0), (315_576_000_000, 0))
XML: Final = (
    "<domain/>",
    "<domain",
    "&",
    "<domain type='sim'><name>x</name></domain>",
    "<!DOCTYPE a [<!ENTITY b 'b'>]><domain>&b;</domain>",
    "<a>" * 2000,
    "x" * 500_000,
    '{"name": "x"}',
)
COOKIES: Final = (b"", b"{}", b"null", b"[]", b"junk", b"\xff\x00\xfe", b"<qemu-migration/>", b'{"uuid": 1}', b"x" * 60_000)
URIS: Final = (
    "",
    "banana",
    "tcp:",
    "tcp://",
    "tcp://127.0.0.1:49152",
    "tcp://127.0.0.1:49153",
    "tcp://localhost:49160",
    "tcp://[::1]:49152",
    "tcp://10.92.0.2:49152?x=y",
    "tcp://127.0.0.1:99999",
    "unix:/etc/passwd",
    "rdma://10.92.0.1:1",
    "exec:reboot",
    "x" * 1000,
)
ADDRESSES: Final = ("", "banana", "127.0.0.1:1", "10.0.0.9:7400", "[::1]:1", "unix:/nowhere.sock", "0.0.0.0:0")
TEXTS: Final = ("", "x", "banana", "../../victim", "a/b", ".", "é" * 100, "\u202egnp", "💥", "x" * 253, "%s%n", "' OR 1=1 --", "-1")


class Hostile:
    """A source of random messages; the same `rng` gives the same ones. The other parameters are what a caller can learn by
    listing.
    """

    def __init__(
        self, rng: random.Random, *, ids: Sequence[str], guests: Sequence[str], hosts: Sequence[str], agents: Sequence[str]
    ) -> None:
        self.rng = rng
        self._texts: dict[str, Sequence[str]] = {
            "migration_id": ids,
            "request_id": ("", "r1", "r2"),
            "domain": (*guests, "nobody"),
            "domain_name": guests,
            "destination_name": ("", "", *guests, *TEXTS),
            "source_host": hosts,
            "destination_host": (*hosts, *agents),
            "dead_host": hosts,
            "host": (*hosts, ""),
            "source_agent": (*agents, *ADDRESSES),
            "destination_agent": (*agents, *ADDRESSES),
            "agent_address": (*agents, *ADDRESSES),
            "address": ADDRESSES,
            "uri": URIS,
            "uri_in": URIS,
            "network": ("", "", "mig1", "mig2", "banana"),
            "domain_xml": XML,
            "compression_method": ("", "", "xbzrle", "lzo"),
        }

    def make(self, kind: type[Message]) -> Any:
        """Return a random message of that type."""
        message = kind()
        self._fill(message)
        return message

    def _fill(self, message: Message) -> None:
        for field in message.DESCRIPTOR.fields:
            options = field.GetOptions().Extensions
            left_out = 0.99 if options[bounds_pb2.reserved_for_later] else 0.02 if options[bounds_pb2.required] else 0.4
            if self.rng.random() >= left_out:
                self._set(message, field)

    def _set(self, message: Message, field: Any) -> None:
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            return
        if field.is_repeated:
            for _ in range(self.rng.choice((0, 1, 3))):
                if field.message_type is not None:
                    self._fill(getattr(message, field.name).add())
                else:
                    getattr(message, field.name).append(self._value(field))
        elif field.message_type is not None:
            inner = getattr(message, field.name)
            inner.SetInParent()
            if isinstance(inner, Duration):
                inner.seconds, inner.nanos = self.rng.choice(DURATIONS)
            else:
                self._fill(inner)
        else:
            setattr(message, field.name, self._value(field))

    def _value(self, field: FieldDescriptor) -> Any:
        rng = self.rng
        if field.enum_type is not None:
            return rng.choice(sorted(field.enum_type.values_by_number))
        if field.type == FieldDescriptor.TYPE_STRING:
            return rng.choice(self._texts.get(field.name, TEXTS))
        if field.type == FieldDescriptor.TYPE_BYTES:
            return rng.choice(COOKIES)
        if field.type == FieldDescriptor.TYPE_BOOL:
            return rng.random() < 0.5
        wide = field.cpp_type == FieldDescriptor.CPPTYPE_INT64
        return rng.choice((*NUMBERS, *LARGE) if wide else NUMBERS)
