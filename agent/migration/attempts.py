"""The attempts of a migration whose guest is untouched: the next one, or the one that another driver has made."""

from agent.handshake.drive.plan import Plan
from agent.migration.collection import Collection
from agent.migration.migration import Entry
from agent.runtime.errors import DroverError, Reason
from drover.agent.v1 import migration_pb2 as pb


async def next_attempt(collection: Collection, entry: Entry, plan: Plan | None = None, attempt: int = 0) -> None:
    """Save the migration with its next attempt, or the given one, and with a new plan if there is one; then publish it. What changes
    during a save, such as by a cancel, is kept."""
    attempt = attempt or entry.migration.attempt + 1

    def change(again: pb.Migration) -> None:
        again.attempt = attempt
        if plan is not None:
            put_plan(again, plan)

    collection.publish(entry, await entry.save_changed(change))


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
