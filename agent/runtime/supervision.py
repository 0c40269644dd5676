"""Work in the background that must not end unseen."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final

import structlog

log = structlog.get_logger()

FIRST_PAUSE_SECONDS: Final = 1.0
"""Before work that has failed begins again; twice as long after each failure, …"""
LONGEST_PAUSE_SECONDS: Final = 60.0
"""… up to this. Work that has gone on for longer begins with the first pause again."""


def supervise(name: str, work: Callable[[], Awaitable[None]]) -> "asyncio.Task[None]":
    """Do this work until it returns, or the task is cancelled. An error that it did not foresee is logged with its traceback, and
    the work begins again: it must look at what there is, not go on from where it was.
    """
    return asyncio.create_task(_keep_doing(name, work), name=name)


async def _keep_doing(name: str, work: Callable[[], Awaitable[None]]) -> None:
    failures = 0
    while True:
        began = time.monotonic()
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
        failures = 1 if time.monotonic() - began > LONGEST_PAUSE_SECONDS else failures + 1
        await asyncio.sleep(pause_after(failures))


def pause_after(failures: int) -> float:
    """Seconds before the next try. Pure."""
    return float(min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2.0 ** min(failures - 1, 32)))


def _is_being_cancelled() -> bool:
    """gRPC raises CancelledError in whoever reads from a channel that is closed, too."""
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0
