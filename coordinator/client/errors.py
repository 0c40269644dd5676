"""The errors of the client.

::

    DroverClientError                what the server, or the way to it, said; `reason` is its UPPER_SNAKE word
     ├── InvalidRequest              the request is wrong in itself; nothing was changed
     ├── NotFound                    no such guest, host or migration; nothing was changed
     ├── Refused                     cannot be done as things are; the guest was not touched
     │    └── Busy                   no slot is free now: try again after `retry_after` seconds
     ├── Unreachable                 the server, or a host that is needed, does not answer
     │    └── DeadlineExceeded       it answers too late; the call may have had its effect
     ├── MigrationFailed             it was under way, and ended; `migration.whereabouts` says where the guest is
     │    └── MigrationCancelled     because somebody asked for that
     ├── OutcomeUnknown              it cannot be said now where the guest runs; the hosts go on asking
     └── ServerFailed                the server failed in a way that says nothing of what was done: ask again

`MigrationFailed` and `OutcomeUnknown` carry the `migration` where one is known.
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
        """UPPER_SNAKE word of `agent.runtime.errors.Reason`, or a newer server's."""
        self.metadata: Mapping[str, str] = dict(metadata or {})
        self.retry_after = retry_after
        """Seconds after which trying again makes sense. None: not said."""
        self.migration = migration


class InvalidRequest(DroverClientError):  # noqa: N818 - these read as the facts that they state
    """The request is wrong in itself; nothing was changed."""


class NotFound(DroverClientError):  # noqa: N818
    """No such guest, host or migration; nothing was changed."""


class Refused(DroverClientError):  # noqa: N818
    """It cannot be done as things are; the guest was not touched."""


class Busy(Refused):
    """No slot is free now."""


class Unreachable(DroverClientError):  # noqa: N818
    """The server, or a host that is needed, does not answer."""


class DeadlineExceeded(Unreachable):
    """It answers too late. The call may have had its effect."""


class MigrationFailed(DroverClientError):  # noqa: N818
    """The migration ended without success; `migration.whereabouts` says where the guest is."""


class MigrationCancelled(MigrationFailed):
    """As `MigrationFailed`, because somebody asked for that."""


class OutcomeUnknown(DroverClientError):  # noqa: N818
    """It cannot be said now where the guest runs."""


class ServerFailed(DroverClientError):  # noqa: N818
    """The server failed in a way that says nothing of what was done."""


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
    """The client's word for an error of the wire."""
    kind = _BY_REASON.get(error.reason) or _BY_CODE.get(error.code, ServerFailed)
    return kind(error.message, reason=error.reason, metadata=error.metadata, retry_after=error.retry_after)


def raise_unless_succeeded(migration: "Migration") -> "Migration":
    """The migration, if it succeeded; the error that says how it stands otherwise. For one that has ended (or is unknown)."""
    from coordinator.client.types import MigrationState  # noqa: PLC0415 - a migration's start need not wait for the import

    if migration.state is MigrationState.SUCCEEDED:
        return migration
    if migration.state is MigrationState.OUTCOME_UNKNOWN:
        raise outcome_unknown(migration)
    kind = MigrationCancelled if migration.state is MigrationState.CANCELLED else MigrationFailed
    raise _of_migration(kind, migration, f"migration {migration.id} {migration.state.value}")


def no_such_host(name: str, host: str, address: str) -> NotFound:
    """An agent, of that host and at that address, was asked for another host."""
    text = f'the agent at {address} is host "{host}" and knows no other; ask a coordinator for "{name}"'
    return NotFound(text, reason=Reason.HOST_NOT_FOUND, metadata={"host": name})


def outcome_unknown(migration: "Migration") -> DroverClientError:
    """The `OutcomeUnknown` of a migration."""
    text = f"the outcome of migration {migration.id} is not known yet; it goes on asking"
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
