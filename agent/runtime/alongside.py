"""Coroutines that run concurrently with a block of code, or go on without their caller."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

import structlog

from agent.runtime.errors import DroverError

log = structlog.get_logger()

T = TypeVar("T")


@contextlib.asynccontextmanager
async def alongside(work: Coroutine[Any, Any, T]) -> AsyncIterator["asyncio.Task[T]"]:
    """Run `work` in a task while the block runs; the block awaits the task for its result. The end of the block cancels it."""
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # retrieved, so that asyncio does not log an error that the block ignored


async def unless(event: asyncio.Event, error: Exception, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Return what `work` returns. Raises `error`, and ends `work`, as soon as `event` is set."""
    if not event.is_set():
        async with alongside(event.wait()) as waiting, alongside(work()) as task:
            await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
    raise error


async def outlasting(work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`, which goes on if the caller is cancelled. Its `DroverError` is then nobody's and is dropped."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        task.add_done_callback(_log_bug)
        raise


def _log_bug(task: "asyncio.Task[Any]") -> None:
    if not task.cancelled() and (error := task.exception()) is not None and not isinstance(error, DroverError):
        log.error("unexpected error (bug)", exc_info=error)
