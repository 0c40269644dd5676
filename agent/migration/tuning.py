"""Keeps the limits of a running transfer as the migration's settings say: applies each change at once, and reads it back."""

import asyncio
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Final

import structlog

from agent.handshake.drive.driver import Driver
from agent.handshake.drive.plan import Limits
from agent.handshake.machines.facts import sends
from agent.migration.settings import limits_of
from agent.runtime.backoff import OTHER_HOST, Clock, Pauses
from agent.runtime.bell import Bell
from agent.runtime.errors import DroverError, Reason
from agent.runtime.wire import duration
from drover.agent.v1 import migration_pb2 as pb

log = structlog.get_logger()

APPLY_SECONDS: Final = 2.0
"""Longest wait for the source to apply a change."""

_ENDED: Final = frozenset({Reason.WRONG_PHASE, Reason.RECORD_NOT_FOUND, Reason.STALE_ATTEMPT})
"""Errors of a source whose transfer has ended meanwhile, or has not begun."""


@dataclass
class Tuner:
    """Applies the limits of one migration to its transfer, as long as its driver runs."""

    migration: Callable[[], pb.Migration]
    """Returns it as it is now."""
    changed: Bell
    """Rings when it is another."""
    driver: Driver
    publish: Callable[[pb.Migration], None]
    clock: Clock
    error: DroverError | None = None
    """Why the limits that are wanted now are not applied; None: they are, or it was not tried yet."""
    reported: Limits | None = None
    """The limits that the source has applied and reported. None: unknown."""

    async def applied(self) -> None:
        """Wait until the limits are applied to the transfer, if one runs. Where that fails or lasts too long, raises an error that
        says that they are saved."""
        migration = self.migration()
        source = migration.source_host
        try:
            async with asyncio.timeout(APPLY_SECONDS):
                return await self._settled()
        except TimeoutError:
            reason, why = Reason.HOST_UNREACHABLE, f"{source} has not answered within {APPLY_SECONDS:g} s"
        except DroverError as error:
            reason, why = error.reason, error.message
        raise DroverError(
            reason,
            f"the change is saved, but not applied to the transfer yet: {why}. It is applied as soon as {source} answers; "
            f"`drover migration show {migration.migration_id}` shows what is applied",
            metadata={"host": source, "saved": "yes"},
        )

    async def _settled(self) -> None:
        """Wait until nothing is due. Raises `error`."""
        while self.due is not None:
            changed = self.changed.next
            if self.error is not None:
                raise self.error
            await changed.wait()

    @property
    def flows(self) -> bool:
        """Whether the source sends memory, as far as the driver knows."""
        view = self.driver.view
        return sends(view.source_state, view.source_record.progress if view.source_record is not None else None)

    @property
    def due(self) -> Limits | None:
        """The limits that have yet to be applied; None: no transfer runs, or they are."""
        wanted = limits_of(self.migration())
        begun = self.driver.calls.begun_with
        known = self.reported or (begun if begun is not None and begun.none else None)
        return wanted if self.flows and wanted != known else None

    async def run(self) -> None:
        """Apply what is due, for ever; after an error again and again, as the source may not answer now."""
        pauses = Pauses(OTHER_HOST, self.clock)
        while True:
            changed = self.changed.next
            self.driver.calls.limits = limits_of(self.migration())  # for a Perform that has yet to begin
            if (wanted := self.due) is None:
                pauses.succeeded()
                await changed.wait()
                continue
            try:
                answer = await self.driver.calls.limit(wanted)
            except DroverError as error:
                self.error = None if error.reason in _ENDED else error
                log.info("limits were not applied", migration=self.migration().migration_id, error=error.message)
                self.changed.ring()
                await pauses.pause()
            else:
                self.reported, self.error = wanted, None
                applied = deepcopy(self.migration())
                applied.applied_bandwidth_bytes_per_second = answer.bandwidth
                if answer.max_downtime:
                    applied.applied_max_downtime.CopyFrom(duration(answer.max_downtime))
                self.publish(applied)
