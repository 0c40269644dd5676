"""Background tasks that restart after an unexpected error."""

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from agent.runtime.backoff import BACKGROUND, SYSTEM_CLOCK, Clock, Pauses

log = structlog.get_logger()


def supervise(name: str, work: Callable[[], Awaitable[None]], clock: Clock = SYSTEM_CLOCK) -> "asyncio.Task[None]":
    """Run `work` in a task until it returns or the task is cancelled. Any error is logged with its traceback, and `work` restarts
    after a pause: it must begin from the present state, not go on from where it was."""
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
            log.error("background work was cancelled unexpectedly; it restarts", work=name, exc_info=True)
        except Exception:
            log.exception("unexpected error (bug) in background work; it restarts", work=name)
        else:
            return
        if clock.monotonic() - began > BACKGROUND.cap:
            pauses.succeeded()
        await pauses.pause()


def _is_being_cancelled() -> bool:
    """Return whether the task itself is being cancelled: gRPC also raises CancelledError in the readers of a closed channel."""
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0
