"""The next attempt of a migration that may wait: whether there is one, and how the migration looks then. Pure."""

from typing import Final

from agent.handshake.drive.driver import Driver
from agent.handshake.drive.view import View
from agent.handshake.machines.destination import DestinationState
from agent.handshake.machines.source import SourceState
from agent.migration.migration import Entry
from agent.migration.waiting import AWAY
from agent.runtime.errors import Reason
from agent.runtime.wire import cut
from drover.agent.v1 import handshake_pb2
from drover.agent.v1 import migration_pb2 as pb

GIVEN_UP: Final = frozenset({Reason.RESTARTED, Reason.DRIVER_SILENT, Reason.LEASE_EXPIRED, Reason.STALE_LEASE})
"""Failures of an attempt whose agents or driver have come back since."""

MOST_WARNINGS: Final = 15
"""Warnings that a next attempt keeps."""


def is_kept(view: View) -> bool:
    """Return whether an attempt of this very migration has ended with the guest at its source, by both hosts and no statement."""
    ended = view.states == (SourceState.KEPT, DestinationState.GONE)
    return ended and view.foreign is None and not view.statements and not view.by_statement


def begins_again(entry: Entry, driver: Driver, ended: pb.Migration) -> bool:
    """Return whether a migration that may wait goes on after this end of its attempt, which `is_kept`: an agent or the driver was
    away. `ended` describes that end; its failure may be a mere consequence, so what both records say counts, too."""
    records = (driver.view.source_record, driver.view.destination_record)
    reasons = {ended.failure.reason, *(record.failure.reason for record in records if record is not None)}
    was_away = bool(reasons & GIVEN_UP) or (ended.failure.reason in AWAY and not driver.calls.transfer_asked)
    may_wait = entry.slot_wait > 0 and entry.slot_wait_left > 0 and not entry.cancel_asked.is_set()
    return may_wait and was_away and ended.state == pb.MIGRATION_STATE_FAILED


def follow(migration: pb.Migration, later: handshake_pb2.Record) -> None:
    """Change the migration to the later attempt of another driver."""
    _renew(migration, later.ref.attempt)
    if later.host == migration.source_host:
        migration.destination_host = later.peer_host


def _renew(migration: pb.Migration, attempt: int) -> None:
    migration.attempt, migration.uri = attempt, ""
    plans = [timing for timing in migration.timings if timing.phase == "plan"]
    del migration.timings[:]
    migration.timings.extend(plans)


def wait_again(migration: pb.Migration, why: str) -> None:
    """Change the migration to its next attempt, which waits for its slots: no host knows it, and the guest is untouched."""
    _renew(migration, migration.attempt + 1)
    migration.ClearField("slot_duration")
    migration.warnings[:] = [*migration.warnings[-MOST_WARNINGS:], cut(f"it waited for its slots again, as {why}", 1000)]
    if not migration.HasField("cancel_time"):
        migration.state = pb.MIGRATION_STATE_PENDING
