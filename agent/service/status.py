"""Conversion of a `DroverError` to the wire and back.

On the wire an error is a `google.rpc.Status` in the trailing metadata: exactly one `ErrorInfo` (reason, domain ``drover``,
metadata), and `RetryInfo`, `BadRequest`, `ResourceInfo`, `PreconditionFailure` where they help.

gRPC peers drop a response whose metadata is over 8 KiB, and the message travels twice (as ``grpc-message``, percent encoded, and in
the Status, in base64). So every part is cut: a short error is better than none."""

import asyncio
import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Final, TypeVar
from urllib.parse import quote

import grpc
import grpc.aio
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped, unused-ignore]

from agent.runtime.errors import DOMAIN, DroverError, FieldViolation, Reason, said_by_peer
from agent.runtime.wire import duration
from agent.service.implausible import drop_implausible

MAX_MESSAGE = 1536
"""Bytes of the message, percent encoded as ``grpc-message`` is."""
MAX_METADATA = 1024
"""Bytes of all keys and values of the metadata together."""
MAX_METADATA_KEY = 253
MAX_METADATA_VALUE = 512
MAX_VIOLATIONS = 4
MAX_DESCRIPTION = 200
"""Characters of the description of one violation."""

_M = TypeVar("_M", bound=Message)

STATUS_KEY = "grpc-status-details-bin"

_RESOURCES: Mapping[Reason, tuple[str, str]] = {
    Reason.DOMAIN_NOT_FOUND: ("domain", "domain"),
    Reason.DOMAIN_EXISTS: ("domain", "domain"),
    Reason.HOST_NOT_FOUND: ("host", "host"),
    Reason.HOST_NAME_TAKEN: ("host", "host"),
    Reason.HOST_UUID_TAKEN: ("host", "host"),
    Reason.MIGRATION_NOT_FOUND: ("migration", "migration_id"),
    Reason.MIGRATION_EXISTS: ("migration", "migration_id"),
    Reason.RECORD_NOT_FOUND: ("record", "migration_id"),
}
"""Type of the resource that an error is about, and the key of its name in the metadata."""


def to_status(error: DroverError) -> status_pb2.Status:
    """Return the error as `google.rpc.Status`, cut to the bounds above."""
    message = _cut_message(error.message)
    details = [error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=_cut_metadata(error.metadata))]
    return status_pb2.Status(
        code=error.code.value[0], message=message, details=[_packed(detail) for detail in [*details, *_helpful_details(error)]]
    )


def trailing_metadata(status: status_pb2.Status) -> tuple[tuple[str, bytes], ...]:
    return ((STATUS_KEY, status.SerializeToString()),)


def error_from_rpc(error: grpc.aio.AioRpcError, peer: str) -> DroverError:
    """Return the error that the peer raised, or one for gRPC's own status. `peer`: its name and address, for a person.

    After HOST_UNREACHABLE and DEADLINE_EXCEEDED the call may have taken effect."""
    status = _status_of(error)
    info = _error_info(status) if status is not None else None
    if status is not None and info is not None:
        return _from_status(status, info, error.code())
    return _without_details(error, peer)


@contextlib.contextmanager
def errors_of(peer: str) -> Iterator[None]:
    """Convert what a call in this block raises to a `DroverError`. `peer` as in `error_from_rpc`.

    gRPC raises CancelledError in the calls of a channel that is being closed, though nobody cancelled their tasks, and UsageError in
    later calls. A channel is closed when its agent has left the address: HOST_UNREACHABLE."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise error_from_rpc(error, peer) from None
    except grpc.aio.UsageError:
        raise _channel_closed(peer) from None
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise _channel_closed(peer) from None


def _channel_closed(peer: str) -> DroverError:
    text = f"{peer} cannot be reached: the channel to it was closed, as its agent has left the address"
    return DroverError(Reason.HOST_UNREACHABLE, text, metadata={"peer": peer})


def _packed(detail: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed


def _helpful_details(error: DroverError) -> list[Message]:
    details: list[Message] = []
    if error.retry_after is not None:
        details.append(error_details_pb2.RetryInfo(retry_delay=duration(max(0.0, error.retry_after))))
    if error.violations:
        details.append(_bad_request(error.violations))
    if error.reason in _RESOURCES:
        kind, key = _RESOURCES[error.reason]
        name = _cut(error.metadata.get(key, ""), MAX_DESCRIPTION)
        details.append(error_details_pb2.ResourceInfo(resource_type=kind, resource_name=name))
    elif error.code is grpc.StatusCode.FAILED_PRECONDITION:
        failure = error_details_pb2.PreconditionFailure()
        failure.violations.add(type=error.reason, description=_cut(error.message, MAX_DESCRIPTION))
        details.append(failure)
    return details


def _bad_request(violations: tuple[FieldViolation, ...]) -> error_details_pb2.BadRequest:
    request = error_details_pb2.BadRequest()
    for violation in violations[:MAX_VIOLATIONS]:
        request.field_violations.add(
            field=_cut(violation.field, MAX_DESCRIPTION), description=_cut(violation.description, MAX_DESCRIPTION)
        )
    return request


def _cut(text: str, limit: int) -> str:
    # Surrogates (from undecodable file names) cannot be put into a protobuf string.
    text = text.encode("utf-8", "replace").decode()
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _cut_message(message: str) -> str:
    """Cut to `MAX_MESSAGE` bytes as encoded on the wire, where each byte that is not printable ASCII takes three."""
    text = _cut(message, MAX_MESSAGE)
    size = 0
    for index, character in enumerate(text):
        size += 1 if " " <= character <= "~" and character != "%" else len(quote(character, safe=""))
        if size > MAX_MESSAGE - 9:  # room for the percent encoded ellipsis
            return text[:index] + "…"
    return text


def _cut_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    kept: dict[str, str] = {}
    room = MAX_METADATA
    for key, value in metadata.items():
        if len(key.encode()) > MAX_METADATA_KEY:
            continue
        value = value.encode("utf-8", "replace")[:MAX_METADATA_VALUE].decode("utf-8", "ignore")
        room -= len(key.encode()) + len(value.encode())
        if room < 0:
            break
        kept[key] = value
    return kept


def _status_of(error: grpc.aio.AioRpcError) -> status_pb2.Status | None:
    for key, value in error.trailing_metadata() or ():
        if key == STATUS_KEY and isinstance(value, bytes):
            try:
                return status_pb2.Status.FromString(value)
            except DecodeError:
                return None
    return None


def _detail(status: status_pb2.Status, kind: type[_M]) -> _M | None:
    """Return the first detail of that kind; None if there is none, or it cannot be read."""
    for packed in status.details:
        detail = kind()
        if packed.Is(kind.DESCRIPTOR):
            try:
                packed.Unpack(detail)
            except DecodeError:
                return None
            drop_implausible(detail)
            return detail
    return None


def _error_info(status: status_pb2.Status) -> error_details_pb2.ErrorInfo | None:
    info = _detail(status, error_details_pb2.ErrorInfo)
    return info if info is not None and info.domain == DOMAIN else None


def _from_status(status: status_pb2.Status, info: error_details_pb2.ErrorInfo, code: grpc.StatusCode) -> DroverError:
    retry = _detail(status, error_details_pb2.RetryInfo)
    bad = _detail(status, error_details_pb2.BadRequest)
    return said_by_peer(
        info.reason,
        status.message,
        _cut_metadata(info.metadata),
        retry_after=retry.retry_delay.ToNanoseconds() / 1e9 if retry is not None and retry.HasField("retry_delay") else None,
        violations=tuple(FieldViolation(v.field, v.description) for v in bad.field_violations) if bad is not None else (),
        code=code,
    )


_BARE: Mapping[grpc.StatusCode, tuple[Reason, str]] = {
    grpc.StatusCode.UNAVAILABLE: (Reason.HOST_UNREACHABLE, "{peer} cannot be reached: {details}"),
    grpc.StatusCode.DEADLINE_EXCEEDED: (Reason.DEADLINE_EXCEEDED, "{peer} did not answer in time; the call may have taken effect"),
    # From a server that stops.
    grpc.StatusCode.CANCELLED: (Reason.HOST_UNREACHABLE, "{peer} broke off the call: {details}"),
    # From gRPC itself for a message over 1 MiB.
    grpc.StatusCode.RESOURCE_EXHAUSTED: (Reason.FIELD_TOO_LARGE, "{peer} did not take the message: {details}"),
    grpc.StatusCode.UNIMPLEMENTED: (Reason.UNIMPLEMENTED, "{peer} does not know this call: {details}"),
}
"""Errors for status codes that come without Drover's details."""

_ANSWER_TOO_LARGE: Final = re.compile(r"(?:SERVER: Sent|CLIENT: Received) message larger than max \((\d+) vs\. (\d+)\)")
"""gRPC's text for an answer over the bound, from either side; for a request, Sent and Received are swapped."""


def _without_details(error: grpc.aio.AioRpcError, peer: str) -> DroverError:
    if sizes := _ANSWER_TOO_LARGE.search(error.details() or ""):
        text = f"the answer of {peer} is too large: {sizes[1]} bytes; at most {sizes[2]} are allowed"
        return DroverError(Reason.FIELD_TOO_LARGE, text, metadata={"peer": peer, "size": sizes[1], "bound": sizes[2]})
    # gRPC's details end with the cause: "failed to connect to all addresses; last error: ...: Connection refused".
    code, details = error.code(), (error.details() or "no details").rpartition(": ")[2]
    reason, text = _BARE.get(code, (Reason.INTERNAL, "{peer} failed with {code}: {details}"))
    return DroverError(
        reason,
        text.format(peer=peer, code=code.name, details=_cut(details, MAX_DESCRIPTION)),
        metadata={"peer": peer, "grpc_code": code.name},
    )
