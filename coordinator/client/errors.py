"""The errors of the client.

::

    DroverClientError                any error of the server or of the connection to it; `reason` names it in UPPER_SNAKE
     ├── InvalidRequest              the request itself is wrong; nothing was changed
     ├── NotFound                    no such guest, host or migration; nothing was changed
     ├── Refused                     not possible in the present state; the guest was not touched
     │    └── Busy                   no slot is free: try again after `retry_after` seconds
     ├── Unreachable                 the server, or a host that is needed, does not answer
     │    └── DeadlineExceeded       no answer in time; the call may have had its effect
     ├── MigrationFailed             the migration ended without success; `migration.whereabouts` says where the guest is
     │    └── MigrationCancelled     the same, because somebody cancelled it
     ├── OutcomeUnknown              it is unknown where the guest runs; the migration's driver keeps asking the hosts
     └── ServerFailed                the server failed; whether the call had its effect is unknown: ask again

`MigrationFailed` and `OutcomeUnknown` carry the `migration` if it is known.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import grpc

from agent.runtime.errors import DroverError, Reason

if TYPE_CHECKING:
    from coordinator.client.types import Migration


class DroverClientError(Exception):
    """Root of all errors of the client."""

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        retry_after: float | None = None,
        migration: "Migration | None" = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        """What happened, where the guest runs, what to do next."""
        self.reason = reason
        """An `agent.runtime.errors.Reason`, or a newer server's reason, in UPPER_SNAKE."""
        self.metadata: Mapping[str, str] = dict(metadata or {})
        self.retry_after = retry_after
        """Seconds to wait before trying again. None: unknown."""
        self.migration = migration


class InvalidRequest(DroverClientError):  # noqa: N818 - the names state facts
    """The request itself is wrong; nothing was changed."""


class NotFound(DroverClientError):  # noqa: N818
    """No such guest, host or migration; nothing was changed."""


class Refused(DroverClientError):  # noqa: N818
    """Not possible in the present state; the guest was not touched."""


class Busy(Refused):
    """No slot is free: try again after `retry_after` seconds."""


class Unreachable(DroverClientError):  # noqa: N818
    """The server, or a host that is needed, does not answer."""


class DeadlineExceeded(Unreachable):
    """No answer in time. The call may have had its effect."""


class MigrationFailed(DroverClientError):  # noqa: N818
    """The migration ended without success; `migration.whereabouts` says where the guest is."""


class MigrationCancelled(MigrationFailed):
    """The migration ended without success because somebody cancelled it."""


class OutcomeUnknown(DroverClientError):  # noqa: N818
    """It is unknown where the guest runs; the migration's driver keeps asking the hosts."""


class ServerFailed(DroverClientError):  # noqa: N818
    """The server failed; whether the call had its effect is unknown."""


_BY_REASON: Mapping[Reason, type[DroverClientError]] = {
    Reason.BUSY: Busy,
    Reason.DRAINING: Refused,
    Reason.JOURNAL_UNAVAILABLE: Refused,
    Reason.STALE_ATTEMPT: Refused,
    Reason.STALE_LEASE: Refused,
    Reason.CANCELLED: MigrationCancelled,
}

_BY_CODE: Mapping[grpc.StatusCode, type[DroverClientError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: Refused,
    grpc.StatusCode.FAILED_PRECONDITION: Refused,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Refused,
    grpc.StatusCode.UNAVAILABLE: Unreachable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.ABORTED: MigrationFailed,
    grpc.StatusCode.UNKNOWN: OutcomeUnknown,
}


def client_error(error: DroverError) -> DroverClientError:
    """Return the client's error for an error from the wire."""
    kind = _BY_REASON.get(error.reason) or _BY_CODE.get(error.code, ServerFailed)
    return kind(error.message, reason=error.reason, metadata=error.metadata, retry_after=error.retry_after)


def raise_unless_succeeded(migration: "Migration") -> "Migration":
    """Return the migration if it succeeded. Needs one that has ended, or whose outcome is unknown.

    Raises:
        MigrationFailed, MigrationCancelled, OutcomeUnknown: with the migration.
    """
    from coordinator.client.types import MigrationState  # noqa: PLC0415 - keeps the import out of the start of a migration

    if migration.state is MigrationState.SUCCEEDED:
        return migration
    if migration.state is MigrationState.OUTCOME_UNKNOWN:
        raise outcome_unknown(migration)
    kind = MigrationCancelled if migration.state is MigrationState.CANCELLED else MigrationFailed
    raise _of_migration(kind, migration, f"migration {migration.id} {migration.state.value}")


def no_such_host(name: str, host: str, address: str) -> NotFound:
    """Return the error for a question about host `name` to the agent of `host` at `address`."""
    text = f'the agent at {address} knows only its own host "{host}"; ask a coordinator about "{name}"'
    return NotFound(text, reason=Reason.HOST_NOT_FOUND, metadata={"host": name})


def outcome_unknown(migration: "Migration") -> DroverClientError:
    """Return the `OutcomeUnknown` of a migration."""
    text = f"the outcome of migration {migration.id} is not known yet; its driver keeps asking the hosts"
    return _of_migration(OutcomeUnknown, migration, text)


def _of_migration(kind: type[DroverClientError], migration: "Migration", otherwise: str) -> DroverClientError:
    failure = migration.failure
    default = Reason.CANCELLED if kind is MigrationCancelled else Reason.OUTCOME_UNKNOWN
    happened = failure.message if failure and failure.message else otherwise
    return kind(
        f"{happened}; {migration.whereabouts.sentence}",
        reason=failure.reason if failure else default,
        metadata=failure.metadata if failure else {},
        migration=migration,
    )
