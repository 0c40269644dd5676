"""Protection against a second copy: a guest that may have left must not run on its source again. `switchover` says why and how."""

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import libvirt_qemu
import structlog

from agent.hypervisor.base import DomainState, HypervisorUnavailable
from agent.hypervisor.libvirt import domain as domains
from agent.hypervisor.libvirt import switchover, threads
from agent.hypervisor.libvirt.service import service_of

T = TypeVar("T")

log = structlog.get_logger()

CANCELED = "migration canceled"
"""libvirt's reason of the running state after it has resumed a guest that a migration had paused."""

HELD = "unknown"
"""libvirt's reason of a pause by `hold`. A pause by the user never has it, so `Outgoing.resume` may end such a pause."""


SETTLE_SECONDS = 0.02
"""Interval between two calls to QEMU."""

_UNDER_WAY = switchover.CANCELLABLE | {"device", "cancelling"}


class Guard:
    """Protection of one guest that leaves. All methods are harmless where there is nothing to do."""

    def __init__(self, uri: str, uuid: str) -> None:
        self.service = service_of(uri)
        self._uuid = uuid
        self._name = ""

    def watch(self, name: str) -> None:
        """Mark the guest, so that its status file is mended if libvirtd dies. Must be called before Perform. Blocks."""
        self._name = name
        self._try(lambda run: switchover.mark(run, self._uuid, name))

    async def mend(self) -> None:
        """Mend the status file after the connection to libvirtd was lost in Perform. If libvirtd is dead, this keeps its next start
        from resuming a guest that has left."""
        found = await self._do(lambda run: switchover.mend_after_death(run, self._uuid, self._name))
        outcome = found.value if found else "unknown"
        log.warning(f"the connection to {self.service.name} was lost during Perform", domain=self._name, outcome=outcome)

    async def forget(self) -> None:
        """Remove the guest's mark, once the migration has ended on this side."""
        await self._do(lambda run: switchover.unmark(run, self._uuid))

    async def forget_definition(self, remove: Callable[[Path], None]) -> None:
        """Call `remove` (`stored.remove_leftovers`) in a thread, where libvirt's run folder is known. Raises what that raises."""
        run = self.service.run
        if run is not None:
            await asyncio.shield(asyncio.wrap_future(threads.submit(lambda: remove(run))))

    async def _do(self, function: Callable[[Path], T]) -> T | None:
        """Run `_try` in a thread. A failure to start one is logged like the errors there."""
        try:
            return await asyncio.shield(asyncio.wrap_future(threads.submit(lambda: self._try(function))))
        except HypervisorUnavailable as error:
            self._failed(error)
            return None

    def _try(self, function: Callable[[Path], T]) -> T | None:
        """Call `function` with libvirt's run folder. An OSError is only logged: `settle` can still repair the guest's state."""
        run = self.service.run
        if run is None:
            return None
        try:
            return function(run)
        except OSError as error:
            self._failed(error)
            return None

    def _failed(self, error: Exception) -> None:
        log.warning("could not update the files that protect against a second copy", domain=self._name, error=str(error))


def settle(domain: Any) -> None:
    """Repair the state of a guest after a restart of libvirtd, once no job of libvirtd holds the guest. Blocks.

    This is the last safeguard, for when `switchover` did not run or could not tell. Only QEMU knows whether the state has left;
    a call to its monitor taints the domain ("custom-monitor"), so this is for recovery only. Afterwards the domain's state is
    right and does not change by itself:

    - a transfer that continues without libvirtd is cancelled: its guest would stop for a switch-over that never comes;
    - a guest whose whole state had left, and which libvirtd has resumed, is paused.

    A ``completed`` of an earlier migration of the same QEMU, whose guest was kept, looks like the second case: such a guest is
    paused without need until its destination has reported that its copy is gone.
    """
    deadline = time.monotonic() + switchover.DEVICE_SECONDS
    while (state := _migration(domain)) in _UNDER_WAY and time.monotonic() < deadline:
        if state in switchover.CANCELLABLE:
            _ask(domain, "migrate_cancel")
        time.sleep(SETTLE_SECONDS)  # polled, because libvirt passes on no event of QEMU's migration here
    if state == "completed" and _is(domain, DomainState.RUNNING, CANCELED):
        hold(domain)


def hold(domain: Any) -> None:
    """Pause a guest that libvirt resumed when its transfer failed after the stop for the switch-over: the destination, armed early,
    may have the whole state and run the guest. Blocks.
    """
    if _is_running(domain):
        _ask(domain, "stop")  # suspend() would look like a pause by the user


def is_switching(domain: Any) -> bool:
    """Return whether the guest is stopped for the switch-over (or for a transfer that is not live)."""
    return _is(domain, DomainState.PAUSED, domains.MIGRATION)


def stopped_by_user(domain: Any) -> bool:
    """Return whether a stop command paused QEMU, rather than the switch-over or an error. Blocks. Taints the domain."""
    return _ask(domain, "query-status").get("status") == "paused"


def is_held(domain: Any) -> bool:
    """Return whether `hold` paused the guest."""
    return _is(domain, DomainState.PAUSED, HELD)


def _is_running(domain: Any) -> bool:
    return domains.state_of(domain.state()[0]) is DomainState.RUNNING


def _is(domain: Any, state: DomainState, reason: str) -> bool:
    code, why = domain.state()
    return domains.state_of(code) is state and domains.reason_name(code, why) == reason


def _migration(domain: Any) -> str:
    return str(_ask(domain, "query-migrate").get("status", "")) if domain.isActive() else ""


def _ask(domain: Any, command: str) -> dict[str, Any]:
    answer = json.loads(libvirt_qemu.qemuMonitorCommand(domain, json.dumps({"execute": command}), 0))
    return dict(answer.get("return", {}))
