import re
from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from agent.runtime.errors import DroverError, Reason
from agent.service.bounds import check_answer, check_request
from drover.agent.v1 import bounds_pb2, handshake_pb2, host_pb2, migration_pb2
from drover.coordinator.v1 import host_pb2 as cluster_pb2

UUID = "0b6f3c1e-8f0a-4c57-9a53-1f5d2f0c9a11"


def start(**spec: Any) -> migration_pb2.StartMigrationRequest:
    values = {"domain": "vm1", "destination_host": "b"} | spec
    return migration_pb2.StartMigrationRequest(migration_id=UUID, spec=migration_pb2.MigrationSpec(**values))


def make(kind: type[Message], **fields: Any) -> Message:
    """A message whose inner messages are given as dicts, which the stubs do not know."""
    return kind(**fields)


def refusal(message: Message) -> DroverError:
    with pytest.raises(DroverError) as caught:
        check_request(message)
    return caught.value


def test_a_good_request_passes() -> None:
    options = {"live": False, "post_copy": True, "compression_method": "xbzrle", "parallel_connections": 4}
    spec = {"options": options, "bandwidth_bytes_per_second": 1, "uri": "tcp://10.0.0.1"}
    check_request(start(**spec))
    xml = "<domain>\n\t<name>vm1</name>\n</domain>"
    ref = handshake_pb2.AttemptRef(migration_id=UUID, attempt=1)
    check_request(make(handshake_pb2.PrepareRequest, ref=ref, domain_xml=xml, cookie_in=b"\0" * 65536))


@pytest.mark.parametrize(
    ("request_", "reason", "field"),
    [
        (start(domain="x" * 254), Reason.FIELD_TOO_LARGE, "spec.domain"),
        (start(domain="é" * 127), Reason.FIELD_TOO_LARGE, "spec.domain"),
        (start(uri="x" * 1025), Reason.FIELD_TOO_LARGE, "spec.uri"),
        (start(domain=""), Reason.INVALID_FIELD, "spec.domain"),
        (start(domain="a\nb"), Reason.INVALID_FIELD, "spec.domain"),
        (start(destination_name="a\0"), Reason.INVALID_FIELD, "spec.destination_name"),
        (start(uri="tcp://\u2028"), Reason.INVALID_FIELD, "spec.uri"),
        (start(bandwidth_bytes_per_second=-1), Reason.INVALID_FIELD, "spec.bandwidth_bytes_per_second"),
        (start(bandwidth_bytes_per_second=10**12 + 1), Reason.INVALID_FIELD, "spec.bandwidth_bytes_per_second"),
        (start(min_bandwidth_bytes_per_second=2**62), Reason.INVALID_FIELD, "spec.min_bandwidth_bytes_per_second"),
        (
            make(migration_pb2.UpdateMigrationRequest, migration_id=UUID, settings={"bandwidth_bytes_per_second": 2**63 - 1}),
            Reason.INVALID_FIELD,
            "settings.bandwidth_bytes_per_second",
        ),
        (
            make(host_pb2.UpdateDomainRequest, domain="vm1", settings={"max_bandwidth_bytes_per_second": 2**62}),
            Reason.INVALID_FIELD,
            "settings.max_bandwidth_bytes_per_second",
        ),
        (start(timeout={"seconds": 1}), Reason.UNSUPPORTED_FIELD, "spec.timeout"),
        (start(options={"compression_method": "lzo"}), Reason.INVALID_FIELD, "spec.options.compression_method"),
        (start(options={"parallel_connections": 256}), Reason.INVALID_FIELD, "spec.options.parallel_connections"),
        (start(options={"parallel_connections": -1}), Reason.INVALID_FIELD, "spec.options.parallel_connections"),
        (migration_pb2.StartMigrationRequest(migration_id=UUID), Reason.INVALID_FIELD, "spec"),
        (migration_pb2.GetMigrationRequest(), Reason.INVALID_FIELD, "migration_id"),
        (migration_pb2.GetMigrationRequest(migration_id="12"), Reason.INVALID_FIELD, "migration_id"),
        (migration_pb2.GetMigrationRequest(migration_id=UUID.upper()), Reason.INVALID_FIELD, "migration_id"),
        (migration_pb2.GetMigrationRequest(migration_id=UUID + "\n"), Reason.FIELD_TOO_LARGE, "migration_id"),
        (migration_pb2.ListMigrationsRequest(page_size=-1), Reason.INVALID_FIELD, "page_size"),
        (
            make(handshake_pb2.PrepareRequest, ref={"migration_id": UUID}, domain_xml="x", cookie_in=b"x" * 65537),
            Reason.FIELD_TOO_LARGE,
            "cookie_in",
        ),
        (
            make(handshake_pb2.PrepareRequest, ref={"migration_id": UUID}, domain_xml="x" * 524289),
            Reason.FIELD_TOO_LARGE,
            "domain_xml",
        ),
        (
            make(handshake_pb2.PrepareRequest, ref={"migration_id": UUID}, domain_xml="<a>\0</a>"),
            Reason.INVALID_FIELD,
            "domain_xml",
        ),
        (
            make(handshake_pb2.PerformRequest, ref={"migration_id": UUID}, uri="tcp:x", wait={"seconds": -1}),
            Reason.INVALID_FIELD,
            "wait",
        ),
        (make(handshake_pb2.ConfirmRequest, ref={"migration_id": UUID}, decision=9), Reason.INVALID_FIELD, "decision"),
        (
            make(cluster_pb2.RegisterHostRequest, host={"networks": [{"name": "m", "address": ""}]}, agent_address="unix:/x"),
            Reason.INVALID_FIELD,
            "host.networks[0].address",
        ),
        (
            make(cluster_pb2.RegisterHostRequest, host={"networks": [{"name": "m", "address": "a"}] * 65}, agent_address="unix:/x"),
            Reason.FIELD_TOO_LARGE,
            "host.networks",
        ),
    ],
)
def test_each_bad_request_names_its_field(request_: Message, reason: Reason, field: str) -> None:
    error = refusal(request_)
    assert (error.reason, error.violations[0].field, error.metadata["field"]) == (reason, field, field)


def test_too_large_says_bound_and_size() -> None:
    error = refusal(start(domain="x" * 300))
    assert (error.metadata["bound"], error.metadata["size"]) == ("253", "300")
    assert "300 bytes; at most 253" in error.message


@pytest.mark.parametrize("at", ["spec", "spec.options"])
def test_an_order_that_is_not_understood_is_refused(at: str) -> None:
    message = start(options={})
    target: Any = message.spec if at == "spec" else message.spec.options
    target.MergeFromString(b"\xa8\x0f\x01")  # field 245, a varint
    error = refusal(message)
    assert (error.reason, error.metadata) == (Reason.UNKNOWN_OPTION, {"field": at, "number": "245"})


def test_a_report_of_a_newer_agent_is_taken() -> None:
    host = make(host_pb2.Host, name="a", migration_features={"options": {"warp": 77}})
    host.MergeFromString(b"\xa8\x0f\x01")
    check_request(make(cluster_pb2.RegisterHostRequest, host=host, agent_address="unix:/x"))


def test_maps_are_bounded_in_number_and_size() -> None:
    many = {f"o{n}": 1 for n in range(65)}
    for features, field in (({"options": many}, ""), ({"options": {"x" * 254: 1}}, " (a key)")):
        host = make(host_pb2.Host, migration_features=features)
        error = refusal(make(cluster_pb2.RegisterHostRequest, host=host, agent_address="unix:/x"))
        assert error.metadata["field"] == "host.migration_features.options" + field


@pytest.mark.parametrize(
    ("answer", "field"),
    [
        (make(handshake_pb2.PrepareResponse, cookie_out=b"x" * 65537), "cookie_out"),
        (make(handshake_pb2.PrepareResponse, uri_out="x" * 1025), "uri_out"),
        (make(handshake_pb2.BeginResponse, domain_xml="x" * 524289), "domain_xml"),
        (make(handshake_pb2.GetRecordResponse, record={"domain_name": "é" * 127}), "record.domain_name"),
        (make(handshake_pb2.GetRecordResponse, record={"failure": {"message": "x" * 4097}}), "record.failure.message"),
        (make(handshake_pb2.GetRecordResponse, record={"failure": {"metadata": {"k": "x" * 1025}}}), "record.failure.metadata[k]"),
        (make(handshake_pb2.GetRecordResponse, record={"timings": [{}] * 65}), "record.timings"),
        (make(handshake_pb2.GetRecordResponse, record={"timings": [{"phase": "x" * 254}]}), "record.timings[0].phase"),
    ],
)
def test_an_answer_that_is_too_large_names_its_field(answer: Message, field: str) -> None:
    with pytest.raises(DroverError) as caught:
        check_answer(answer)
    assert (caught.value.reason, caught.value.metadata["field"]) == (Reason.FIELD_TOO_LARGE, field)


def test_of_an_answer_only_the_sizes_count() -> None:
    """A malformed record, or one of a newer agent, is read all the same."""
    record = {"ref": {"migration_id": "?"}, "state": 99, "waiting_for": "two\nlines", "statement": {}, "revision": -1}
    answer = make(handshake_pb2.GetRecordResponse, record=record)
    answer.MergeFromString(b"\xa8\x0f\x01")  # field 245, a varint
    check_answer(answer)


def test_6_14_a_record_that_is_relayed_is_taken_with_whatever_its_hypervisor_has_said() -> None:
    """Else a Confirm is refused because of QEMU's text, and the guest stays stopped."""
    record: dict[str, Any] = {"failure": {"metadata": {"message": "operation failed: qemu-system-x86_64: load\nerror"}}}
    relayed = make(handshake_pb2.ConfirmRequest, ref={"migration_id": UUID}, decision=2, destination_record=record)
    check_request(relayed)
    record["failure"]["metadata"]["message"] = "x" * 1025
    too_large = make(handshake_pb2.AbandonRequest, ref={"migration_id": UUID}, source_kept=True, source_record=record)
    assert refusal(too_large).reason is Reason.FIELD_TOO_LARGE


REQUESTS = [
    message
    for file in (migration_pb2, handshake_pb2, host_pb2, cluster_pb2)
    for name, message in vars(file).items()
    if name.endswith("Request")
]


def strings(message: type[Message]) -> list[Any]:
    return [f for f in message.DESCRIPTOR.fields if f.type == FieldDescriptor.TYPE_STRING and not f.is_repeated]


@given(st.data())
def test_no_string_of_any_request_is_longer_than_its_bound_or_has_control_characters(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from([kind for kind in REQUESTS if strings(kind)]))
    field = data.draw(st.sampled_from(strings(kind)))
    bound = field.GetOptions().Extensions[bounds_pb2.max_bytes] or 253
    value = data.draw(st.text(min_size=1, max_size=300))
    message = kind(**{field.name: value})
    try:
        check_request(message)
    except DroverError as error:
        if error.metadata["field"] != field.name:
            return  # another field is required; this one was fine or comes later
        bad = len(value.encode()) > bound or re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", value)
        assert bad or field.name in ("migration_id", "uuid", "domain_uuid")
    else:
        assert len(value.encode()) <= bound
        assert bound > 1024 or "\n" not in value


@pytest.mark.parametrize(("seconds", "nanos", "is_right"), [(604_800, 0, True), (604_800, 1, False), (0, 0, True), (-1, 0, False)])
def test_7_a_duration_keeps_its_bound(seconds: int, nanos: int, is_right: bool) -> None:
    request = start()
    request.slot_wait.seconds, request.slot_wait.nanos = seconds, nanos
    if is_right:
        check_request(request)
    else:
        assert refusal(request).metadata["field"] == "slot_wait"


@pytest.mark.parametrize("address", ["banana", "10.0.0", "10.0.0.1/24", "::1::", " "])
def test_6_29_a_network_has_an_ip_address(address: str) -> None:
    network = host_pb2.Network(name="mig", address=address)
    error = refusal(cluster_pb2.RegisterHostRequest(host=host_pb2.Host(networks=[network]), agent_address="unix:/a"))
    assert (error.reason, error.metadata["field"]) == (Reason.INVALID_FIELD, "host.networks[0].address")
    with pytest.raises(DroverError, match="not an IP address"):
        check_answer(host_pb2.GetHostResponse(host=host_pb2.Host(networks=[network])))


@pytest.mark.parametrize(("seconds", "nanos"), [(-1, 0), (253_402_300_800, 0), ((1 << 63) - 1, 0), (0, -1), (0, 1_000_000_000)])
def test_6_29_a_time_is_one_that_a_calendar_has(seconds: int, nanos: int) -> None:
    word = handshake_pb2.Statement(dead_host="h2", reason="r", said_by="me")
    word.say_time.seconds, word.say_time.nanos = seconds, nanos
    error = refusal(migration_pb2.ResolveMigrationRequest(migration_id=UUID, statement=word))
    assert (error.reason, error.metadata["field"]) == (Reason.INVALID_FIELD, "statement.say_time")
