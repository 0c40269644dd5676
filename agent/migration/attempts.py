"""The attempts of a migration: the next one of one that may wait, or the one that another driver has made."""

import contextlib
import functools
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import structlog

from agent.handshake.drive.driver import Driver
from agent.handshake.drive.plan import Plan
from agent.handshake.drive.view import View
from agent.handshake.machines.destination import DestinationState
from agent.handshake.machines.source import SourceState
from agent.migration.collection import Collection
from agent.migration.migration import Entry
from agent.migration.waiting import WAITED_FOR
from agent.runtime.backoff import OTHER_HOST, Clock, Pauses
from agent.runtime.errors import DroverError, Reason
from agent.runtime.wire import cut
from drover.agent.v1 import handshake_pb2
from drover.agent.v1 import migration_pb2 as pb

log = structlog.get_logger()

T = TypeVar("T")

GIVEN_UP: Final = frozenset({Reason.RESTARTED, Reason.DRIVER_SILENT, Reason.LEASE_EXPIRED, Reason.STALE_LEASE})
"""Failures of an attempt whose agents or driver have come back since."""

MOST_WARNINGS: Final = 15
"""Warnings that a next attempt keeps."""


def is_kept(view: View) -> bool:
    """Return whether an attempt of this very migration has ended with the guest at its source, by both hosts and no statement."""
    ended = view.states == (SourceState.KEPT, DestinationState.GONE)
    return ended and view.foreign is None and not view.statements and not view.by_statement


def _begins_again(entry: Entry, driver: Driver, ended: pb.Migration) -> bool:
    """Return whether a migration that may wait goes on after this end of its attempt, which `is_kept`: an agent or the driver was
    away, or a host was busy. `ended` describes that end; its failure may be a mere consequence, so what both records say counts,
    too."""
    records = (driver.view.source_record, driver.view.destination_record)
    reasons = {ended.failure.reason, *(record.failure.reason for record in records if record is not None)}
    was_away = bool(reasons & GIVEN_UP) or (ended.failure.reason in WAITED_FOR and not driver.calls.transfer_asked)
    may_wait = entry.slot_wait > 0 and entry.slot_wait_left > 0 and not entry.cancel_asked.is_set()
    return may_wait and was_away and ended.state == pb.MIGRATION_STATE_FAILED


async def next_attempt(collection: Collection, entry: Entry, plan: Plan | None = None, attempt: int = 0) -> None:
    """Save the migration with its next attempt, or the given one, and with a new plan if there is one; then publish it. What changes
    during a save, such as by a cancel, is kept."""
    attempt = attempt or entry.migration.attempt + 1

    def change(again: pb.Migration) -> None:
        again.attempt = attempt
        again.ClearField("slot_duration")  # that was of an older attempt, which cannot touch the guest any more
        if plan is not None:
            put_plan(again, plan)

    collection.publish(entry, await entry.save_changed(change))


async def later_attempt(entry: Entry, driver: Driver, ended: pb.Migration, clock: Clock) -> pb.Migration | None:
    """After the end of the driver's attempt: return the migration as it goes on with the attempt of another driver, else with its
    next one if it may wait again. That is saved, however long it takes, and is to be published at once. None: it has ended."""
    foreign = driver.view.foreign is not None
    if not is_kept(driver.view) and not (foreign and entry.any_host):
        return None
    later = await until_answered(functools.partial(driver.later, "source", elsewhere=foreign), clock)
    with contextlib.suppress(DroverError):
        later = later or await driver.later("destination")
    if later is None and not foreign and _begins_again(entry, driver, ended):
        change = functools.partial(_wait_again, why=ended.failure.message)
    else:
        if later is None and not foreign:
            why = ended.failure.message if ended.state == pb.MIGRATION_STATE_FAILED else ""
            later = await until_answered(functools.partial(_given_up, driver, why), clock)
        if later is None:
            return None
        change = functools.partial(follow, record=later)
    return await entry.until_saved(functools.partial(entry.save_changed, change), clock)


async def until_answered(ask: Callable[[], Awaitable[T]], clock: Clock) -> T:
    """Return what `ask` returns, which is tried again as long as a host that may know better does not answer."""
    pauses = Pauses(OTHER_HOST, clock)
    while True:
        try:
            return await ask()
        except DroverError as error:
            log.info("the end of a migration waits for a host", error=error.message)
        await pauses.pause()


async def begun_or_given_up(driver: Driver, why: str, *, both: bool) -> handshake_pb2.Record | None:
    """Return the record of an attempt that another driver has begun. None: no driver can begin any from now on, as the source has
    given the migration up (or was declared dead). `both`: see `Reader.begun_elsewhere`; `why`: see
    `BothSlots.give_up`. Raises the error of a host that may know better."""
    record = await driver.begun_elsewhere(both=both)
    if record is None:
        await _give_up(driver, why)
        record = await driver.newest("source")
    return record


async def _given_up(driver: Driver, why: str) -> handshake_pb2.Record | None:
    """Give the migration up after an attempt that has ended. Return the record of a later one that has begun before."""
    await _give_up(driver, why)
    return await driver.later("source")


async def _give_up(driver: Driver, why: str) -> None:
    try:
        await driver.slots.give_up(why)
    except DroverError as error:
        driver.view.call_failed("source", error)
        if not driver.view.is_dead("source"):
            raise


async def joins(collection: Collection, entry: Entry, error: DroverError) -> bool:
    """Join the later attempt that another driver has made, by the destination's record, after an error of an older one. Return
    whether there is one that has not begun at the source: else it is past the slots."""
    if error.reason is not Reason.STALE_ATTEMPT or not entry.unbegun or entry.driver is None:
        return False
    later = await entry.driver.later("destination")
    if later is None or await entry.driver.later("source") is not None:
        return False
    await next_attempt(collection, entry, attempt=later.ref.attempt)
    return True


def put_plan(migration: pb.Migration, plan: Plan) -> None:
    """Note a new plan in the migration."""
    if not (migration.network or migration.settings.bandwidth_bytes_per_second):  # it has had no network, whose default may count
        migration.settings.bandwidth_bytes_per_second = plan.settings.bandwidth_bytes_per_second
    migration.destination_host, migration.network = plan.destination_host, plan.network
    migration.network_choice.CopyFrom(plan.network_choice)
    migration.options.CopyFrom(plan.options)


def follow(migration: pb.Migration, record: handshake_pb2.Record) -> None:
    """Change the migration to the attempt that another driver has begun."""
    _renew(migration, record.ref.attempt)
    if record.host == migration.source_host:
        migration.destination_host = record.peer_host


def _renew(migration: pb.Migration, attempt: int) -> None:
    migration.attempt, migration.uri = attempt, ""
    plans = [timing for timing in migration.timings if timing.phase == "plan"]
    del migration.timings[:]
    migration.timings.extend(plans)


def _wait_again(migration: pb.Migration, why: str) -> None:
    """Change the migration to its next attempt, which waits for its slots: no host knows it, and the guest is untouched."""
    _renew(migration, migration.attempt + 1)
    migration.ClearField("slot_duration")
    migration.warnings[:] = [*migration.warnings[-MOST_WARNINGS:], cut(f"it waited for its slots again, as {why}", 1000)]
    if not migration.HasField("cancel_time"):
        migration.state = pb.MIGRATION_STATE_PENDING
