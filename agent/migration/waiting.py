"""Rules of the wait for slots."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar

from agent.handshake.drive.driver import Driver
from agent.migration.migration import Entry
from agent.migration.waits import out_of_time
from agent.network.rules import check_tenant
from agent.runtime.alongside import alongside, unless
from agent.runtime.bell import first_of
from agent.runtime.errors import DroverError, Reason, invalid_field
from agent.runtime.failure import Failure
from drover.agent.v1 import admission_pb2
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

PASSING: Final = {"network": pb.WAIT_REASON_NETWORK, "bandwidth": pb.WAIT_REASON_BANDWIDTH}
"""What is waited for after an error that may pass by itself, by its metadata ``wait``."""


def is_waited_for(error: DroverError) -> bool:
    """Return whether a migration that may wait for its slot tries again after this error."""
    return error.reason in WAITED_FOR or error.metadata.get("wait") in PASSING


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
