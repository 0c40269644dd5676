"""Keeps a guest that may have left from running on its source again. See `switchover` for why and how."""

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
"""libvirt's reason for running, when it has resumed a guest that a migration had paused."""

HELD = "unknown"
"""libvirt's reason for the pause that `hold` makes. No user's pause has it, so that `Outgoing.resume` may end it."""


SETTLE_SECONDS = 0.02
"""Between two questions to QEMU."""

_UNDER_WAY = switchover.CANCELLABLE | {"device", "cancelling"}


class Guard:
    """One guest that leaves. All calls are harmless where there is nothing to guard."""

    def __init__(self, uri: str, uuid: str) -> None:
        self.service = service_of(uri)
        self._uuid = uuid
        self._name = ""

    def watch(self, name: str) -> None:
        """From now on, whoever mends after a death of libvirtd minds this guest. Before Perform. Blocks."""
        self._name = name
        self._try(lambda run: switchover.mark(run, self._uuid, name))

    async def mend(self) -> None:
        """libvirtd was lost in Perform. If it is dead, see to it that its next life does not resume a guest that has left."""
        found = await self._do(lambda run: switchover.mend_after_death(run, self._uuid, self._name))
        log.warning(f"{self.service.name} was lost during Perform", domain=self._name, outcome=found.value if found else "not known")

    async def forget(self) -> None:
        """The migration has ended on this side."""
        await self._do(lambda run: switchover.unmark(run, self._uuid))

    async def forget_definition(self, remove: Callable[[Path], None]) -> None:
        """`stored.remove_leftovers`, where this host's files can be seen. Raises what it raises."""
        run = self.service.run
        if run is not None:
            await asyncio.shield(asyncio.wrap_future(threads.submit(lambda: remove(run))))

    async def _do(self, function: Callable[[Path], T]) -> T | None:
        """In a thread; for want of one, as `_try`."""
        try:
            return await asyncio.shield(asyncio.wrap_future(threads.submit(lambda: self._try(function))))
        except HypervisorUnavailable as error:
            self._failed(error)
            return None

    def _try(self, function: Callable[[Path], T]) -> T | None:
        """What goes wrong with files is logged and no more: `settle` remains."""
        run = self.service.run
        if run is None:
            return None
        try:
            return function(run)
        except OSError as error:
            self._failed(error)
            return None

    def _failed(self, error: Exception) -> None:
        log.warning("the guard against a second copy has failed", domain=self._name, error=str(error))


def settle(domain: Any) -> None:
    """What libvirtd left unsettled, once it is back and no job of its holds the guest any more. Blocks.

    The last line, for when `switchover` had no chance or could not tell. Only QEMU knows whether the state has left; asking it
    taints the domain ("custom-monitor"), so this is for recovery only. Afterwards the domain's state is true and stays:

    - a transfer that goes on without libvirtd is ended: its guest would stop for a switch-over that never comes;
    - a guest whose whole state had left, and which libvirtd has resumed, is paused.

    A ``completed`` of an earlier migration of the same QEMU, whose guest was kept, looks like the second: such a guest is
    paused in vain until its destination has said that it is gone.
    """
    deadline = time.monotonic() + switchover.DEVICE_SECONDS
    while (state := _migration(domain)) in _UNDER_WAY and time.monotonic() < deadline:
        if state in switchover.CANCELLABLE:
            _ask(domain, "migrate_cancel")
        time.sleep(SETTLE_SECONDS)  # libvirt hands us no event of QEMU's migration
    if state == "completed" and _is(domain, DomainState.RUNNING, CANCELED):
        hold(domain)


def hold(domain: Any) -> None:
    """Pause a guest that libvirt resumed when its transfer failed: it had been stopped for the switch-over, so the destination,
    armed early, may have all of it and run it. Blocks.
    """
    if _is_running(domain):
        _ask(domain, "stop")  # not suspend(): that would look like a pause by the user


def is_switching(domain: Any) -> bool:
    """The guest was stopped for the switch-over (or for a transfer that is not live)."""
    return _is(domain, DomainState.PAUSED, domains.MIGRATION)


def stopped_by_user(domain: Any) -> bool:
    """QEMU stands still because it was told to, and not for the switch-over, nor for an error. Blocks. Taints the domain."""
    return _ask(domain, "query-status").get("status") == "paused"


def is_held(domain: Any) -> bool:
    """It was paused by `hold`."""
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
