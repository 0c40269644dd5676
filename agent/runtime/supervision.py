"""Work in the background that must not end unseen."""

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from agent.runtime.backoff import BACKGROUND, SYSTEM_CLOCK, Clock, Pauses

log = structlog.get_logger()


def supervise(name: str, work: Callable[[], Awaitable[None]], clock: Clock = SYSTEM_CLOCK) -> "asyncio.Task[None]":
    """Do this work until it returns, or the task is cancelled. An error that it did not foresee is logged with its traceback, and
    the work begins again: it must look at what there is, not go on from where it was.
    """
    return asyncio.create_task(_keep_doing(name, work, clock), name=name)


async def _keep_doing(name: str, work: Callable[[], Awaitable[None]], clock: Clock) -> None:
    pauses = Pauses(BACKGROUND, clock)
    while True:
        began = clock.monotonic()
        try:
            await work()
        except asyncio.CancelledError:
            if _is_being_cancelled():
                raise
            log.error("work in the background was broken off, and nobody asked for it; it begins again", work=name, exc_info=True)
        except Exception:
            log.exception("unexpected error (bug) in the background; it begins again", work=name)
        else:
            return
        if clock.monotonic() - began > BACKGROUND.cap:
            pauses.succeeded()
        await pauses.pause()


def _is_being_cancelled() -> bool:
    """gRPC raises CancelledError in whoever reads from a channel that is closed, too."""
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0
