"""agent.hypervisor.options: the table is that of the wire, and a switch, a number and a choice go from the user to the driver."""

import dataclasses
import re
from typing import Any, cast

import msgspec
import pytest
from google.protobuf.descriptor import FieldDescriptor

from agent.handshake.host.records import Role, decode, encode
from agent.hypervisor.features import check_options
from agent.hypervisor.options import OPTIONS, Option, Options, Support, Value, shown
from agent.hypervisor.sim.profiles import PROFILES
from agent.hypervisor.wire import features_to_proto, options_from_proto, options_to_proto
from agent.migration.takeover import taken_over
from agent.runtime.errors import DroverError, Reason
from agent.service.migration_service import MigrationServicer
from drover.agent.v1 import migration_pb2, options_pb2
from tests.transcript import ROOT
from tests.unit.asking import make_plan, record
from tests.unit.fake_directory import Driving
from tests.unit.fake_hypervisor import FEATURES
from tests.unit.two_agents import Pair

KINDS: dict[int, type[Value]] = {
    FieldDescriptor.TYPE_BOOL: bool,
    FieldDescriptor.TYPE_INT32: int,
    FieldDescriptor.TYPE_STRING: str,
}
CHOSEN = Options(live=True, post_copy=False, compression_method="xbzrle", parallel_connections=4)
"""One of each kind, and both values of a switch."""
QEMU = PROFILES["qemu"]
ROW = Option("Number of channels.", default=None, bounds=(2, 8), unit="channels", name="channels", kind=int)


def test_7_the_table_is_that_of_the_wire() -> None:
    fields = options_pb2.Options.DESCRIPTOR.fields
    assert [(field.name, KINDS[field.type]) for field in fields] == [(name, row.kind) for name, row in OPTIONS.items()]
    for field in fields:
        unset = "" if OPTIONS[field.name].kind is str else 0
        assert field.has_presence or OPTIONS[field.name].problem(unset), "what is unset on the wire is no value"


@pytest.mark.parametrize("name", OPTIONS)
def test_7_the_wire_says_what_the_table_says(name: str) -> None:
    proto = (ROOT / "protos/drover/agent/v1/options.proto").read_text()
    comment = re.search(rf"((?:^  //.*\n)+)  (?:optional )?\w+ {name} = \d+;", proto, re.M)
    assert comment is not None
    said = " ".join(comment[1].replace("//", " ").split())
    assert said.startswith(OPTIONS[name].text.partition(". ")[0])
    assert OPTIONS[name].kind is bool or OPTIONS[name].expected in said


def test_7_a_row_knows_its_values() -> None:
    assert (ROW.expected, ROW.typed, ROW.read("8")) == ("2 to 8 channels", ("2", "8"), 8)
    assert [ROW.problem(value) == "" for value in (1, 2, 8, 9, True, "4", None)] == [False, True, True, False, False, False, False]
    method, switch = OPTIONS["compression_method"], OPTIONS["live"]
    assert (method.read("zstd"), switch.read("Yes"), switch.read("off")) == ("zstd", True, False)
    for row, text in ((ROW, "9"), (ROW, "on"), (ROW, ""), (method, "lzo"), (switch, "1"), (switch, "")):
        with pytest.raises(ValueError, match=r"expected|invalid literal"):
            row.read(text)


@pytest.mark.parametrize("option", OPTIONS.values(), ids=OPTIONS.keys())
def test_7_what_a_user_types_is_what_is_shown_and_what_crosses_the_wire(option: Option) -> None:
    for word in option.typed:
        value = option.read(word)
        assert shown(value) == word
        message = options_to_proto(cast(Options, {option.name: value}))
        assert options_from_proto(options_pb2.Options.FromString(message.SerializeToString())) == {option.name: value}


def test_7_a_number_and_a_choice_are_in_the_journal_and_a_take_over_has_them() -> None:
    kept = decode(encode(record(Role.SOURCE, "performing", options=dict(CHOSEN))))
    assert kept.options == CHOSEN
    assert taken_over(kept, "h1").spec.options == options_to_proto(CHOSEN)


def test_7_a_journal_of_the_version_before_is_read() -> None:
    before = msgspec.msgpack.decode(encode(record(Role.SOURCE, "performing")))
    before["options"] = {"live": False, "post_copy": True}
    assert decode(msgspec.msgpack.encode(before)).options == {"live": False, "post_copy": True}


async def test_7_a_number_and_a_choice_reach_both_drivers(pair: Pair) -> None:
    for agent in (pair.source, pair.destination):
        for name in ("compression_method", "parallel_connections"):
            agent.engine.host.features.options[name] = options_pb2.OPTION_SUPPORT_SUPPORTED
    await pair.driver(make_plan(options=options_to_proto(CHOSEN))).run()
    pair.moved()
    for agent, calls in ((pair.source, ("begin", "perform", "remove")), (pair.destination, ("prepare", "finish"))):
        assert [CHOSEN in agent.hypervisor.arguments[call] for call in calls] == [True for _ in calls]


@pytest.mark.parametrize(("name", "value"), [("parallel_connections", 4), ("compression_method", "zstd")])
def test_7_a_value_that_an_end_cannot_honour_is_refused_by_name(name: str, value: Value) -> None:
    chosen = cast(Options, {name: value})
    with pytest.raises(DroverError, match=f"h1 cannot do option {name}={value}: it is unsupported there") as error:
        check_options(options_to_proto(chosen), features_to_proto(FEATURES), "h1")
    assert (error.value.reason, error.value.metadata["option"]) == (Reason.OPTION_UNSUPPORTED, name)
    assert QEMU.refusals(chosen) == [f"option {name} is not supported by sim QEMU"]


def test_7_what_is_undone_is_for_the_user_supported() -> None:
    xen = dataclasses.replace(QEMU, options={**QEMU.options, "persist_destination": Support.UNDONE})
    wire = features_to_proto(xen.features((1, 2), {}))
    off = Options(persist_destination=False)
    assert wire.options["persist_destination"] == options_pb2.OPTION_SUPPORT_SUPPORTED
    check_options(options_to_proto(off), wire, "h1")
    assert xen.refusals(off) == []
    assert [xen.effective(chosen, "persist_destination") for chosen in (off, Options())] == [False, True]


def test_7_what_no_agent_offers_yet_is_offered_by_no_host() -> None:
    blocked = {name for name, option in OPTIONS.items() if option.blocked}
    offered = features_to_proto(QEMU.features((1, 2), {})).options
    assert offered.keys() == OPTIONS.keys() - blocked


async def test_7_a_server_lists_the_options_that_it_knows(driving: Driving) -> None:
    servicer, nobody = MigrationServicer(driving.migrations), cast(Any, None)
    listed = {each.name: each for each in (await servicer.DescribeOptions(migration_pb2.DescribeOptionsRequest(), nobody)).options}
    assert list(listed) == list(OPTIONS)
    assert (list(listed["live"].values), listed["live"].default_value) == (["on", "off"], "on")
    assert "zstd" in listed["compression_method"].values
    assert (listed["parallel_connections"].min, listed["parallel_connections"].max) == (1, 255)
    assert all(each.description for each in listed.values())
