from pathlib import Path
from typing import Any
from urllib.parse import quote

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status  # type: ignore[import-untyped]
from hypothesis import given
from hypothesis import strategies as st

from agent.hypervisor.base import DomainNotFound
from agent.hypervisor.reasons import from_hypervisor
from agent.runtime.errors import CODES, DroverError, FieldViolation, Reason
from agent.service.channel import MAX_MESSAGE_BYTES, open_channel
from agent.service.status import STATUS_KEY, error_from_rpc, errors_of, to_status, trailing_metadata
from drover.agent.v1 import host_pb2, host_pb2_grpc


def as_rpc_error(error: DroverError) -> grpc.aio.AioRpcError:
    """Return an error as a client sees it."""
    status = to_status(error)
    return grpc.aio.AioRpcError(
        error.code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailing_metadata(status)), details=status.message
    )


def details(status: status_pb2.Status) -> list[str]:
    return [packed.TypeName().rpartition(".")[2] for packed in status.details]


@pytest.mark.parametrize("reason", list(Reason))
def test_every_reason_crosses_the_wire(reason: Reason) -> None:
    metadata = {"domain": "vm1", "host": "b", "migration_id": "m"}
    sent = DroverError(reason, "what happened", metadata=metadata)
    got = error_from_rpc(as_rpc_error(sent), "b")
    assert (got.reason, got.message, got.metadata, got.code) == (reason, "what happened", metadata, CODES[reason])
    assert details(to_status(sent)).count("ErrorInfo") == 1


def test_helpful_details() -> None:
    busy = DroverError(Reason.BUSY, "full", retry_after=2.5)
    assert details(to_status(busy)) == ["ErrorInfo", "RetryInfo"]
    assert error_from_rpc(as_rpc_error(busy), "b").retry_after == 2.5
    bad = DroverError(Reason.INVALID_FIELD, "bad", violations=(FieldViolation("spec.uri", "is bad"),))
    assert details(to_status(bad)) == ["ErrorInfo", "BadRequest"]
    assert error_from_rpc(as_rpc_error(bad), "b").violations == bad.violations
    assert details(to_status(DroverError(Reason.WRONG_PHASE, "no"))) == ["ErrorInfo", "PreconditionFailure"]
    missing = to_status(DroverError(Reason.DOMAIN_NOT_FOUND, "no", metadata={"domain": "vm1"}))
    resource = error_details_pb2.ResourceInfo()
    assert missing.details[1].Unpack(resource)
    assert (resource.resource_type, resource.resource_name) == ("domain", "vm1")


def test_other_languages_can_read_it_with_the_stock_library() -> None:
    error = as_rpc_error(DroverError(Reason.BUSY, "x" * 9000))
    assert rpc_status.from_call(error) is not None  # raises when grpc-message and the Status differ


@given(st.text(max_size=9000), st.dictionaries(st.text(max_size=99), st.text(max_size=2000), max_size=20))
def test_whatever_is_said_fits_into_the_metadata_of_a_response(message: str, metadata: dict[str, str]) -> None:
    violations = tuple(FieldViolation("f" * 999, message) for _ in range(20))
    status = to_status(DroverError(Reason.OPTION_UNSUPPORTED, message, metadata=metadata, violations=violations))
    assert len(quote(status.message)) + len(status.SerializeToString()) * 4 / 3 < 8000


def test_a_surrogate_does_not_break_the_error() -> None:
    assert to_status(DroverError(Reason.INTERNAL, "file \udcff")).message == "file ?"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (grpc.StatusCode.UNAVAILABLE, Reason.HOST_UNREACHABLE),
        (grpc.StatusCode.DEADLINE_EXCEEDED, Reason.DEADLINE_EXCEEDED),
        (grpc.StatusCode.UNIMPLEMENTED, Reason.UNIMPLEMENTED),
        (grpc.StatusCode.CANCELLED, Reason.HOST_UNREACHABLE),
        (grpc.StatusCode.UNKNOWN, Reason.INTERNAL),
    ],
)
@pytest.mark.parametrize("junk", [(), ((STATUS_KEY, b"\xff\xff"),)])
def test_a_failure_without_our_details_names_the_peer(
    code: grpc.StatusCode, reason: Reason, junk: tuple[tuple[str, bytes], ...]
) -> None:
    error = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*junk), details="a: b: refused")
    got = error_from_rpc(error, "agent b at 10.0.0.1:7400")
    assert got.reason is reason
    assert "agent b at 10.0.0.1:7400" in got.message


@pytest.mark.parametrize(
    ("details", "said"),
    [
        (
            "SERVER: Sent message larger than max (9 vs. 8)",
            "the answer of b is too large: 9 bytes; at most 8",
        ),
        ("Stream removed (CLIENT: Received message larger than max (9 vs. 8))", "the answer of b is too large: 9 bytes"),
        ("CLIENT: Sent message larger than max (9 vs. 8)", "b did not take the message"),
        ("SERVER: Received message larger than max (9 vs. 8)", "b did not take the message"),
    ],
)
def test_6_19_an_answer_that_is_too_large_is_no_request_that_was_not_taken(details: str, said: str) -> None:
    error = grpc.aio.AioRpcError(grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.aio.Metadata(), grpc.aio.Metadata(), details=details)
    got = error_from_rpc(error, "b")
    assert got.reason is Reason.FIELD_TOO_LARGE
    assert said in got.message


class _Large(host_pb2_grpc.HostServiceServicer):
    async def GetHost(self, request: Any, context: Any) -> host_pb2.GetHostResponse:  # noqa: N802
        return host_pb2.GetHostResponse(host=host_pb2.Host(name="x" * MAX_MESSAGE_BYTES))


@pytest.mark.parametrize("bound", [MAX_MESSAGE_BYTES, -1])
async def test_6_19_these_are_the_words_of_grpc_for_an_answer_that_is_too_large(tmp_path: Path, bound: int) -> None:
    """From a server that keeps to the bound, and from one that does not."""
    server = grpc.aio.server(options=[("grpc.max_send_message_length", bound)])
    host_pb2_grpc.add_HostServiceServicer_to_server(_Large(), server)  # type: ignore[abstract]
    server.add_insecure_port(f"unix:{tmp_path}/s")
    await server.start()
    async with open_channel(f"unix:{tmp_path}/s") as channel:
        with pytest.raises(DroverError, match="the answer of b is too large"), errors_of("b"):
            await host_pb2_grpc.HostServiceStub(channel).GetHost(host_pb2.GetHostRequest(), timeout=10)
    await server.stop(0)


def test_6_11_a_reason_and_a_code_of_a_newer_peer_are_kept() -> None:
    status = to_status(DroverError(Reason.INTERNAL, "it is so"))
    status.ClearField("details")
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason="NEW_THING", domain="drover"))
    error = grpc.aio.AioRpcError(
        grpc.StatusCode.ABORTED, grpc.aio.Metadata(), grpc.aio.Metadata(*trailing_metadata(status)), details="it is so"
    )
    got = error_from_rpc(error, "b")
    assert (got.reason, got.message, got.code) == ("NEW_THING", "it is so", grpc.StatusCode.ABORTED)


def test_6_19_a_guest_that_is_not_there_is_named_not_libvirts_error_domain() -> None:
    native = {"code": "42", "error_domain": "10", "message": "Domain not found"}
    status = to_status(from_hypervisor(DomainNotFound("no such guest", native), "h1", "web1"))
    resource = error_details_pb2.ResourceInfo()
    assert any(packed.Unpack(resource) for packed in status.details)
    assert (resource.resource_type, resource.resource_name) == ("domain", "web1")
