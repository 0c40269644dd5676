"""Rules of the wait for a slot."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar

from agent.runtime.alongside import alongside
from agent.runtime.errors import DroverError, Reason

T = TypeVar("T")

LATEST_START: Final = 60.0
"""Age in seconds above which a later life does not start a fail-fast migration: its caller saw an error, and may act on it."""

PLAN_SECONDS: Final = 60.0
"""Age above which a plan is not used for another try: hosts and guest may have changed."""

WAITED_FOR: Final = frozenset(
    {
        Reason.BUSY,
        Reason.DOMAIN_BUSY,
        Reason.HOST_UNREACHABLE,
        Reason.DEADLINE_EXCEEDED,
        Reason.DRAINING,
        Reason.OVERLOADED,
        Reason.HYPERVISOR_UNAVAILABLE,
        Reason.JOURNAL_UNAVAILABLE,
    }
)
"""Errors after which a migration that may wait for its slot tries again."""


async def unless_cancelled(event: asyncio.Event, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Return what `work` returns. Raises CANCELLED, and ends `work`, as soon as `event` is set."""
    if not event.is_set():
        async with alongside(event.wait()) as waiting, alongside(work()) as task:
            await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
    raise DroverError(Reason.CANCELLED, "cancelled on request")
