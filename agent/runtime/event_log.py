"""The consumer of the bus that logs one line for each event."""

import asyncio
import contextlib
import functools
import logging
from collections.abc import AsyncIterator
from typing import Final

import msgspec
import structlog

from agent.runtime.errors import DroverError
from agent.runtime.events import (
    BreakerChanged,
    Bus,
    CallHandled,
    DriverDecided,
    Event,
    HostChanged,
    MigrationChanged,
    Published,
    SlotChanged,
    StatementChanged,
    Subscription,
)
from agent.runtime.supervision import supervise

log = structlog.get_logger("drover.events")

FLUSH_SECONDS: Final = 1.0
"""How long the end waits for the lines that are still to be written."""


@contextlib.asynccontextmanager
async def events_logged(bus: Bus) -> AsyncIterator[None]:
    """Log each event that is published in the block; close the bus at its end."""
    task = supervise("log events", functools.partial(_write_all, bus, bus.subscribe()))
    try:
        yield
    finally:
        bus.close()
        await asyncio.wait({task}, timeout=FLUSH_SECONDS)
        task.cancel()


async def _write_all(bus: Bus, events: Subscription) -> None:
    while True:
        try:
            async for published in events:
                _write(published)
        except DroverError as error:
            log.warning("events left out", error=error.message)
            events = bus.subscribe()
        else:
            return


def _write(published: Published) -> None:
    event = published.event
    level = level_of(event)
    if not log.is_enabled_for(level):  # a line costs 0.2 ms, most of it for its fields
        return
    fields = {name: value for name, value in msgspec.structs.asdict(event).items() if value != ""}
    if "migration_id" in fields:
        fields["migration"] = fields.pop("migration_id")
    log.log(level, str(event.__struct_config__.tag), revision=published.revision, **fields)


def level_of(event: Event) -> int:
    """Return the log level of an event. DEBUG for what would drown the others, and cost a migration milliseconds: calls that are
    refused or that drivers repeat, a driver's decisions, slots, and the phases of a migration that is on its way."""
    match event:
        case HostChanged(change="unreachable") | BreakerChanged(change="opened") | StatementChanged():
            return logging.WARNING
        case CallHandled() if event.reason or event.right not in ("migrate", "operate"):
            return logging.DEBUG
        case BreakerChanged(change="half_open") | DriverDecided() | SlotChanged() | MigrationChanged(state="active"):
            return logging.DEBUG
        case _:
            return logging.INFO
