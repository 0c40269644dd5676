"""Rules of the wait for slots."""

import asyncio
from collections.abc import Callable, Coroutine
from copy import deepcopy
from typing import Any, Final, TypeVar

from agent.handshake.drive.driver import Driver
from agent.handshake.drive.ends import Directory
from agent.handshake.drive.view import View
from agent.handshake.machines.destination import DestinationState
from agent.hypervisor.guest_fact import fact_of_description
from agent.migration.migration import Entry
from agent.migration.planning import same_guest
from agent.migration.waits import out_of_time
from agent.migration.whereabouts import BY_MIGRATION, MOVED
from agent.network.rules import check_tenant
from agent.runtime.alongside import alongside, unless
from agent.runtime.bell import first_of
from agent.runtime.errors import DroverError, Reason, invalid_field
from agent.runtime.failure import Failure
from agent.runtime.wire import cut
from drover.agent.v1 import admission_pb2, handshake_pb2, host_pb2
from drover.agent.v1 import migration_pb2 as pb

T = TypeVar("T")

LATEST_START: Final = 60.0
"""Age in seconds above which a later life does not start a fail-fast migration: its caller saw an error, and may act on it."""

PLAN_SECONDS: Final = 60.0
"""Age above which a plan is not used for another try: hosts and guest may have changed."""

AWAY: Final = frozenset(
    {
        Reason.HOST_UNREACHABLE,
        Reason.DEADLINE_EXCEEDED,
        Reason.DRAINING,
        Reason.OVERLOADED,
        Reason.HYPERVISOR_UNAVAILABLE,
        Reason.JOURNAL_UNAVAILABLE,
    }
)
"""Errors of a host that cannot take part now."""

WAITED_FOR: Final = AWAY | {Reason.BUSY, Reason.DOMAIN_BUSY}
"""Errors after which a migration that may wait for its slot tries again."""

PASSING: Final = {
    "network": pb.WAIT_REASON_NETWORK,
    "bandwidth": pb.WAIT_REASON_BANDWIDTH,
    "any_host": pb.WAIT_REASON_ANY_HOST,
}
"""What is waited for after an error that may pass by itself, by its metadata ``wait``."""


def is_waited_for(error: DroverError) -> bool:
    """Return whether a migration that may wait for its slot tries again after this error."""
    return error.reason in WAITED_FOR or error.metadata.get("wait") in PASSING


def check_not_cordoned(entry: Entry, driver: Driver, directory: Directory) -> None:
    """Raise HOST_CLOSED if a migration to any host waits at one that was cordoned meanwhile."""
    host = directory.known(entry.migration.destination_host) if entry.any_host else None
    if host is None or not host.settings.cordoned:
        return
    driver.slots.at = "destination"
    by = f" by {host.cordon_change.changed_by}" if host.cordon_change.changed_by else ""
    text = f"{host.name} was cordoned{by}, and no other host can take the guest: `drover host uncordon {host.name}` opens it again"
    raise DroverError(Reason.HOST_CLOSED, text, metadata={"host": host.name, "wait": "any_host"})


_WAITS: Final = frozenset({pb.WAIT_MODE_WAIT, pb.WAIT_MODE_HYBRID})


def check_asked(spec: pb.MigrationSpec, slot_wait: float) -> None:
    """Raise INVALID_FIELD for a wait mode that does not go with `slot_wait`, or is not known, or a tenant that no guest has."""
    mode = spec.wait_mode
    check_tenant(spec.tenant, "spec.tenant")
    if mode not in pb.WaitMode.values():
        raise invalid_field("spec.wait_mode", f"{mode} is no wait mode; nothing was done")
    if mode in _WAITS and slot_wait <= 0:
        raise invalid_field("slot_wait", f"{pb.WaitMode.Name(mode)} needs how long to wait; nothing was done")
    if mode == pb.WAIT_MODE_FAIL_FAST and slot_wait:
        raise invalid_field("slot_wait", "WAIT_MODE_FAIL_FAST does not wait: leave it unset; nothing was done")


async def unless_cancelled(entry: Entry, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Return what `work` returns. Raises CANCELLED, and ends `work`, as soon as the migration is cancelled."""
    return await unless(entry.cancel_asked, DroverError(Reason.CANCELLED, "cancelled on request"), work)


async def while_it_may_wait(entry: Entry, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Return what `work` returns. Raises TimeoutError, and ends `work`, once a migration that may wait has waited for as long as it
    may, by its settings of that moment."""
    async with alongside(work()) as task:
        while not task.done():
            left = entry.slot_wait_left if entry.slot_wait else None
            if left is not None and left <= 0:
                raise TimeoutError
            async with alongside(entry.settings_changed.next.wait()) as changed:
                await asyncio.wait({task, changed}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        return task.result()


async def tell_changes(entry: Entry, driver: Driver, kind: admission_pb2.SlotKind.ValueType) -> None:
    """Tell each change of the settings to the hosts at which the migration waits for slots of this kind, for ever."""
    changed = entry.settings_changed.next
    while True:
        await changed.wait()
        changed = entry.settings_changed.next
        await driver.slots.ask_again(kind)


async def end_prepared_wait(entry: Entry, driver: Driver) -> None:
    """Give up a migration that is prepared and waits for the right to transfer, once it has waited for as long as it may. Ends once
    the transfer was asked for."""
    while entry.slot_wait and not driver.calls.transfer_asked:
        changed, left = entry.changed.next, entry.slot_wait_left
        if left <= 0 and driver.view.wait is not None:
            driver.view.cancel(Failure.of(out_of_time(driver.view.wait)))
            return
        await first_of(changed, timeout=left if left > 0 else None)


def fact_of_untouched(domain: host_pb2.Domain | None) -> handshake_pb2.GuestFact:
    """Return the fact in an agent's description of a guest that its migration has not touched. None: the host does not have it."""
    fact = fact_of_description(domain if domain is not None else host_pb2.Domain())
    if domain is None:
        fact.state, fact.reason = handshake_pb2.GUEST_STATE_ABSENT, MOVED
    elif fact.state == handshake_pb2.GUEST_STATE_PAUSED and fact.reason in BY_MIGRATION:
        fact.reason = MOVED
    return fact


async def look_at_guest(entry: Entry, view: View, directory: Directory) -> None:
    """Before the end of a migration that has waited and not touched its guest: note how the guest is now. Its plan may have seen
    it long ago, and another migration may have moved it since."""
    touched = view.source_record is not None and view.source_record.HasField("guest")
    if touched or not entry.slot_wait or view.destination_state is DestinationState.RUNNING:
        return
    fact = deepcopy(entry.migration.source_guest)
    try:
        fact = fact_of_untouched((await directory.guest(same_guest(entry.migration))).domain)
    except DroverError as error:
        if error.reason is Reason.DOMAIN_NOT_FOUND:
            fact = fact_of_untouched(None)
        else:
            fact.silence = cut(error.message, 120)
    seen = entry.changed_to()
    seen.source_guest.CopyFrom(fact)
    entry.migration = seen
