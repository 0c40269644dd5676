"""The attempts of a migration whose guest is untouched: the next one, or the one that another driver has made."""

import functools

import structlog

from agent.handshake.drive.driver import Driver
from agent.handshake.drive.plan import Plan
from agent.migration.again import begins_again, follow, is_kept, wait_again
from agent.migration.collection import Collection
from agent.migration.migration import Entry
from agent.runtime.backoff import STORE, Clock, Pauses
from agent.runtime.errors import DroverError, Reason
from drover.agent.v1 import migration_pb2 as pb

log = structlog.get_logger()


async def next_attempt(collection: Collection, entry: Entry, plan: Plan | None = None, attempt: int = 0) -> None:
    """Save the migration with its next attempt, or the given one, and with a new plan if there is one; then publish it. What changes
    during a save, such as by a cancel, is kept."""
    attempt = attempt or entry.migration.attempt + 1

    def change(again: pb.Migration) -> None:
        again.attempt = attempt
        if plan is not None:
            put_plan(again, plan)

    collection.publish(entry, await entry.save_changed(change))


async def later_attempt(entry: Entry, driver: Driver, ended: pb.Migration, clock: Clock) -> pb.Migration | None:
    """After the end of the driver's attempt: return the migration as it goes on with the attempt of another driver, else with its
    next one if it may wait again. That is saved, however long it takes, and is to be published at once. None: it has ended."""
    foreign = driver.view.foreign is not None
    if not is_kept(driver.view) and not (foreign and entry.any_host):
        return None
    later = await driver.later("source", elsewhere=foreign) or await driver.later("destination")
    if later is not None:
        change = functools.partial(follow, later=later)
    elif not foreign and begins_again(entry, driver, ended):
        change = functools.partial(wait_again, why=ended.failure.message)
    else:
        return None
    pauses = Pauses(STORE, clock)
    while True:
        try:
            return await entry.save_changed(change)
        except DroverError as error:
            log.error("a migration was not saved", migration=entry.migration.migration_id, error=error.message)
            await pauses.pause()


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
