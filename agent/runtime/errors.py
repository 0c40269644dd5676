"""Drover's errors: the reasons, and the gRPC status code of each.

A `DroverError` carries a reason, a message for a person (what happened, where the guest runs, what to do next) and metadata.
`agent.service.status` converts it to a `google.rpc.Status` and back, so both sides of a call raise the same error."""

from collections.abc import Mapping
from dataclasses import dataclass

import grpc

from agent.runtime.open_enum import OpenEnum

DOMAIN = "drover"
"""`google.rpc.ErrorInfo.domain` of every error."""


class Reason(OpenEnum):
    """`google.rpc.ErrorInfo.reason`. Newer versions add values."""

    INVALID_FIELD = "INVALID_FIELD"
    FIELD_TOO_LARGE = "FIELD_TOO_LARGE"
    UNSUPPORTED_FIELD = "UNSUPPORTED_FIELD"
    UNKNOWN_OPTION = "UNKNOWN_OPTION"
    REQUEST_ID_REUSED = "REQUEST_ID_REUSED"
    URI_NOT_ALLOWED = "URI_NOT_ALLOWED"
    SAME_HOST = "SAME_HOST"

    DOMAIN_NOT_FOUND = "DOMAIN_NOT_FOUND"
    HOST_NOT_FOUND = "HOST_NOT_FOUND"
    MIGRATION_NOT_FOUND = "MIGRATION_NOT_FOUND"
    RECORD_NOT_FOUND = "RECORD_NOT_FOUND"
    NETWORK_NOT_FOUND = "NETWORK_NOT_FOUND"

    DOMAIN_EXISTS = "DOMAIN_EXISTS"
    MIGRATION_EXISTS = "MIGRATION_EXISTS"
    NETWORK_EXISTS = "NETWORK_EXISTS"
    ROLE_ALREADY_GRANTED = "ROLE_ALREADY_GRANTED"
    HOST_NAME_TAKEN = "HOST_NAME_TAKEN"
    HOST_UUID_TAKEN = "HOST_UUID_TAKEN"

    DOMAIN_AMBIGUOUS = "DOMAIN_AMBIGUOUS"
    DOMAIN_NOT_RUNNING = "DOMAIN_NOT_RUNNING"
    DOMAIN_BUSY = "DOMAIN_BUSY"
    HOST_CLOSED = "HOST_CLOSED"
    HOST_IN_USE = "HOST_IN_USE"
    NO_HOST = "NO_HOST"
    MIGRATION_ENDED = "MIGRATION_ENDED"
    NETWORK_IN_USE = "NETWORK_IN_USE"
    NETWORK_OVERLAPS = "NETWORK_OVERLAPS"
    NETWORK_FORBIDDEN = "NETWORK_FORBIDDEN"
    ROLE_NOT_GRANTED = "ROLE_NOT_GRANTED"
    BANDWIDTH_INSUFFICIENT = "BANDWIDTH_INSUFFICIENT"
    INCOMPATIBLE_GUEST = "INCOMPATIBLE_GUEST"
    OPTION_UNSUPPORTED = "OPTION_UNSUPPORTED"
    BANDWIDTH_UNSUPPORTED = "BANDWIDTH_UNSUPPORTED"
    PROTOCOL_MISMATCH = "PROTOCOL_MISMATCH"
    SPLIT_PHASES_MISSING = "SPLIT_PHASES_MISSING"
    POST_COPY_NOT_ARMED = "POST_COPY_NOT_ARMED"
    WRONG_PHASE = "WRONG_PHASE"
    UNDECIDED = "UNDECIDED"
    PATH_NOT_PROVED = "PATH_NOT_PROVED"

    BUSY = "BUSY"
    WATCH_TOO_SLOW = "WATCH_TOO_SLOW"

    STALE_ATTEMPT = "STALE_ATTEMPT"
    STALE_LEASE = "STALE_LEASE"
    CANCELLED = "CANCELLED"
    TRANSFER_FAILED = "TRANSFER_FAILED"
    LEASE_EXPIRED = "LEASE_EXPIRED"
    RESTARTED = "RESTARTED"
    GIVEN_UP = "GIVEN_UP"
    DRIVER_SILENT = "DRIVER_SILENT"
    GUEST_CRASHED = "GUEST_CRASHED"

    DRAINING = "DRAINING"
    OVERLOADED = "OVERLOADED"
    HOST_UNREACHABLE = "HOST_UNREACHABLE"
    HYPERVISOR_UNAVAILABLE = "HYPERVISOR_UNAVAILABLE"
    JOURNAL_UNAVAILABLE = "JOURNAL_UNAVAILABLE"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"

    NOT_IN_DOUBT = "NOT_IN_DOUBT"
    OUTCOME_UNKNOWN = "OUTCOME_UNKNOWN"
    DECLARED_DEAD = "DECLARED_DEAD"
    HYPERVISOR_FAILED = "HYPERVISOR_FAILED"
    UNIMPLEMENTED = "UNIMPLEMENTED"
    INTERNAL = "INTERNAL"


_C = grpc.StatusCode

CODES: Mapping[Reason, grpc.StatusCode] = {
    Reason.INVALID_FIELD: _C.INVALID_ARGUMENT,
    Reason.FIELD_TOO_LARGE: _C.INVALID_ARGUMENT,
    Reason.UNSUPPORTED_FIELD: _C.INVALID_ARGUMENT,
    Reason.UNKNOWN_OPTION: _C.INVALID_ARGUMENT,
    Reason.REQUEST_ID_REUSED: _C.INVALID_ARGUMENT,
    Reason.URI_NOT_ALLOWED: _C.INVALID_ARGUMENT,
    Reason.SAME_HOST: _C.INVALID_ARGUMENT,
    Reason.DOMAIN_NOT_FOUND: _C.NOT_FOUND,
    Reason.HOST_NOT_FOUND: _C.NOT_FOUND,
    Reason.MIGRATION_NOT_FOUND: _C.NOT_FOUND,
    Reason.RECORD_NOT_FOUND: _C.NOT_FOUND,
    Reason.NETWORK_NOT_FOUND: _C.FAILED_PRECONDITION,
    Reason.DOMAIN_EXISTS: _C.ALREADY_EXISTS,
    Reason.MIGRATION_EXISTS: _C.ALREADY_EXISTS,
    Reason.NETWORK_EXISTS: _C.ALREADY_EXISTS,
    Reason.ROLE_ALREADY_GRANTED: _C.ALREADY_EXISTS,
    Reason.HOST_NAME_TAKEN: _C.ALREADY_EXISTS,
    Reason.HOST_UUID_TAKEN: _C.ALREADY_EXISTS,
    Reason.DOMAIN_AMBIGUOUS: _C.FAILED_PRECONDITION,
    Reason.DOMAIN_NOT_RUNNING: _C.FAILED_PRECONDITION,
    Reason.DOMAIN_BUSY: _C.FAILED_PRECONDITION,
    Reason.HOST_CLOSED: _C.FAILED_PRECONDITION,
    Reason.HOST_IN_USE: _C.FAILED_PRECONDITION,
    Reason.NO_HOST: _C.FAILED_PRECONDITION,
    Reason.MIGRATION_ENDED: _C.FAILED_PRECONDITION,
    Reason.NETWORK_IN_USE: _C.FAILED_PRECONDITION,
    Reason.NETWORK_OVERLAPS: _C.FAILED_PRECONDITION,
    Reason.NETWORK_FORBIDDEN: _C.FAILED_PRECONDITION,
    Reason.ROLE_NOT_GRANTED: _C.FAILED_PRECONDITION,
    Reason.BANDWIDTH_INSUFFICIENT: _C.FAILED_PRECONDITION,
    Reason.INCOMPATIBLE_GUEST: _C.FAILED_PRECONDITION,
    Reason.OPTION_UNSUPPORTED: _C.FAILED_PRECONDITION,
    Reason.BANDWIDTH_UNSUPPORTED: _C.FAILED_PRECONDITION,
    Reason.PROTOCOL_MISMATCH: _C.FAILED_PRECONDITION,
    Reason.SPLIT_PHASES_MISSING: _C.FAILED_PRECONDITION,
    Reason.POST_COPY_NOT_ARMED: _C.FAILED_PRECONDITION,
    Reason.WRONG_PHASE: _C.FAILED_PRECONDITION,
    Reason.UNDECIDED: _C.FAILED_PRECONDITION,
    Reason.PATH_NOT_PROVED: _C.FAILED_PRECONDITION,
    Reason.BUSY: _C.RESOURCE_EXHAUSTED,
    Reason.WATCH_TOO_SLOW: _C.RESOURCE_EXHAUSTED,
    Reason.STALE_ATTEMPT: _C.ABORTED,
    Reason.STALE_LEASE: _C.ABORTED,
    Reason.CANCELLED: _C.ABORTED,
    Reason.TRANSFER_FAILED: _C.ABORTED,
    Reason.LEASE_EXPIRED: _C.ABORTED,
    Reason.RESTARTED: _C.ABORTED,
    Reason.GIVEN_UP: _C.ABORTED,
    Reason.DRIVER_SILENT: _C.ABORTED,
    Reason.GUEST_CRASHED: _C.ABORTED,
    Reason.DRAINING: _C.UNAVAILABLE,
    Reason.OVERLOADED: _C.UNAVAILABLE,
    Reason.HOST_UNREACHABLE: _C.UNAVAILABLE,
    Reason.HYPERVISOR_UNAVAILABLE: _C.UNAVAILABLE,
    Reason.JOURNAL_UNAVAILABLE: _C.UNAVAILABLE,
    Reason.DEADLINE_EXCEEDED: _C.DEADLINE_EXCEEDED,
    Reason.NOT_IN_DOUBT: _C.FAILED_PRECONDITION,
    Reason.OUTCOME_UNKNOWN: _C.UNKNOWN,
    Reason.DECLARED_DEAD: _C.ABORTED,
    Reason.HYPERVISOR_FAILED: _C.INTERNAL,
    Reason.UNIMPLEMENTED: _C.UNIMPLEMENTED,
    Reason.INTERNAL: _C.INTERNAL,
}


@dataclass(frozen=True)
class FieldViolation:
    """One invalid field of a request; `google.rpc.BadRequest`."""

    field: str
    description: str


class DroverError(Exception):
    """An error with a reason. `retry_after`: seconds before a retry makes sense. `code`: for a reason that `CODES` does not have."""

    def __init__(
        self,
        reason: Reason,
        message: str,
        *,
        metadata: Mapping[str, str] | None = None,
        retry_after: float | None = None,
        violations: tuple[FieldViolation, ...] = (),
        code: grpc.StatusCode = grpc.StatusCode.INTERNAL,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.metadata: Mapping[str, str] = dict(metadata or {})
        self.retry_after = retry_after
        self.violations = violations
        self.code = CODES.get(reason, code)


def said_by_peer(
    name: str,
    message: str,
    metadata: Mapping[str, str],
    *,
    retry_after: float | None = None,
    violations: tuple[FieldViolation, ...] = (),
    code: grpc.StatusCode = grpc.StatusCode.INTERNAL,
) -> DroverError:
    """Return the error that a peer reported. The reason and code of a newer version are kept."""
    try:
        reason = Reason(name)
    except ValueError:  # not a valid reason in any version
        reason = Reason.INTERNAL
    return DroverError(reason, message, metadata=metadata, retry_after=retry_after, violations=violations, code=code)


def invalid_field(field: str, description: str, reason: Reason = Reason.INVALID_FIELD) -> DroverError:
    """Return the error for an invalid field of a request, before anything was changed."""
    violations = (FieldViolation(field, description),)
    return DroverError(reason, f"{field}: {description}", metadata={"field": field}, violations=violations)
