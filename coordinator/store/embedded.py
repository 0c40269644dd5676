"""The base of the stores within this process: order of writes, leases and watches on top of rows.

One write runs at a time, in a task of its own: even if the caller is cancelled, the write is carried out, reaches the watches in the
order of the revisions, and updates the leases. Reads run concurrently.
"""

import asyncio
import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Final, Generic, Self, TypeVar

import structlog

from agent.runtime.backoff import STORE, Pauses
from agent.runtime.errors import DroverError, Reason
from agent.runtime.supervision import supervise
from coordinator.store import rows as core
from coordinator.store.base import (
    MAX_LIST,
    Changes,
    Compare,
    Conflict,
    KeyValue,
    Listing,
    Operation,
    check_key,
    check_limit,
    check_ttl,
    check_txn,
    lease_expired,
)
from coordinator.store.history import History
from coordinator.store.leases import Leases
from coordinator.store.rows import Committed, LeaseGone, Rows

T = TypeVar("T")

WRITE_SECONDS: Final = 15.0
"""Deadline of a write, including the wait for its turn."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class _Written(Generic[T]):
    """The result of one write."""

    result: T
    base: int
    """The revision before the write."""
    batches: list[Changes]


class EmbeddedStore(ABC):
    """A `Store` on `Rows`; each class has its own `open`. `clock`: monotonic seconds, for the leases."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._leases = Leases(clock)
        self._history: History | None = None
        self._turn = asyncio.Lock()
        self._writes: set[asyncio.Task[None]] = set()
        self._sweeper: asyncio.Task[None] | None = None
        self._leases_changed = asyncio.Event()
        self._in_doubt = False
        """A write failed: it may have taken place, and the leases that were due with it must be ended again."""

    # ---- to be implemented by each class

    @abstractmethod
    async def _run_write(self, job: Callable[[Rows], T]) -> T:
        """Run `job`, which does not raise, in one transaction, which cancelling the await does not split."""

    @abstractmethod
    async def _run_read(self, job: Callable[[Rows], T]) -> T:
        """Run `job` on one consistent snapshot."""

    # ---- opening and closing

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def _start(self) -> None:
        """Make the store ready for use, and renew every stored lease."""
        revision, ttls = await self._run_read(lambda rows: (rows.revision(), rows.leases()))
        self._history = History(revision)
        self._leases.start(ttls)
        self._sweeper = supervise("store-leases", self._sweep)

    async def close(self) -> None:
        if self._history is not None:
            self._history.close()
        sweeper, self._sweeper = self._sweeper, None
        if sweeper is not None:
            sweeper.cancel()
            await asyncio.wait({sweeper}, timeout=WRITE_SECONDS)
        if self._writes:
            await asyncio.wait(self._writes, timeout=WRITE_SECONDS)

    # ---- the verbs

    async def get(self, key: str) -> KeyValue | None:
        check_key(key)
        return await self._read(lambda rows: rows.get(key))

    async def list(self, prefix: str, limit: int = MAX_LIST, *, after: str = "") -> Listing:
        check_key(prefix, name="prefix", empty=True)
        check_key(after, name="after", empty=True)
        check_limit(limit)
        return await self._read(lambda rows: core.listing(rows, prefix, after, limit))

    async def txn(self, compares: Sequence[Compare], operations: Sequence[Operation]) -> int | Conflict:
        check_txn(compares, operations)
        outcome = await self._write(
            lambda rows: core.transact(rows, compares, operations),
            changes_of=lambda outcome: outcome.changes if isinstance(outcome, Committed) else None,
        )
        if isinstance(outcome, LeaseGone):
            raise lease_expired(outcome.lease_id)
        return outcome if isinstance(outcome, Conflict) else outcome.revision

    async def grant(self, ttl: int) -> int:
        check_ttl(ttl)

        def begin(lease_id: int) -> None:
            self._leases.start({lease_id: ttl})
            self._leases_changed.set()

        return await self._write(lambda rows: rows.add_lease(ttl), then=begin)

    async def keepalive(self, lease_id: int) -> int:
        self._opened()
        return self._leases.keepalive(lease_id)

    async def revoke(self, lease_id: int) -> None:
        await self._write(
            lambda rows: core.end_lease(rows, lease_id),
            changes_of=lambda changes: changes,
            then=lambda _: self._leases.forget(lease_id),
        )

    def watch(self, prefix: str, from_revision: int = 0) -> AsyncIterator[Changes]:
        check_key(prefix, name="prefix", empty=True)
        return self._opened().watch(prefix, from_revision)

    # ---- turns

    def _opened(self) -> History:
        if self._history is None or self._history.closed:
            raise DroverError(Reason.JOURNAL_UNAVAILABLE, "the store is not open", metadata={"written": "no"})
        return self._history

    async def _read(self, job: Callable[[Rows], T]) -> T:
        self._opened()
        if self._leases.due():  # their keys must not be seen any more, so a write ends them first
            return await self._write(job)
        return await self._run_read(job)

    async def _write(
        self,
        job: Callable[[Rows], T],
        *,
        changes_of: Callable[[T], Changes | None] = lambda _: None,
        then: Callable[[T], None] = lambda _: None,
    ) -> T:
        """End the leases that are due, run `job`, pass `changes_of` its result to the watches, and call `then` with the result.

        Raises JOURNAL_UNAVAILABLE after `WRITE_SECONDS`; the write may still take place.
        """
        self._opened()
        result: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(self._write_in_turn(job, changes_of, then, result))
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)
        # Unlike wait_for, wait does not cancel the future when this task is cancelled.
        done, _ = await asyncio.wait({result}, timeout=WRITE_SECONDS)
        if not done:
            raise DroverError(
                Reason.JOURNAL_UNAVAILABLE,
                f"the store did not write within {WRITE_SECONDS:g} s (written: unknown); check its disk",
                metadata={"written": "unknown", "cause": "DEADLINE"},
            )
        return result.result()

    async def _write_in_turn(
        self,
        job: Callable[[Rows], T],
        changes_of: Callable[[T], Changes | None],
        then: Callable[[T], None],
        result: "asyncio.Future[T]",
    ) -> None:
        async with self._turn:
            due = self._leases.due()
            try:
                written = await self._run_write(lambda rows: _run(rows, due, job, changes_of))
                self._settle(due, written)
                then(written.result)
            except Exception as error:  # passed to the caller
                self._in_doubt = True
                self._leases_changed.set()
                result.set_exception(error)
                result.exception()  # marks it as retrieved, as the caller may be gone
            else:
                result.set_result(written.result)

    def _settle(self, due: Sequence[int], written: _Written[T]) -> None:
        assert self._history is not None  # `_write` checks that the store is open
        for lease_id in due:
            self._leases.forget(lease_id)
        self._history.append(written.base, written.batches)

    # ---- leases

    async def _sweep(self) -> None:
        """End leases when they are due, even without a request; after a failed write, learn by another whether it took place."""
        pauses = Pauses(STORE)
        while True:
            self._leases_changed.clear()
            if self._in_doubt:
                await pauses.pause(self._leases_changed)
            else:
                pauses.succeeded()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._leases.next_end()):  # not wait_for: in 3.11 it can swallow a cancellation
                        await self._leases_changed.wait()
            if self._in_doubt or self._leases.due():
                self._in_doubt = False
                await self._sweep_once()

    async def _sweep_once(self) -> None:
        try:
            await self._write(lambda _: None)
        except DroverError as error:
            log.warning("store.sweep_failed", error=error.message)


def _run(rows: Rows, due: Sequence[int], job: Callable[[Rows], T], changes_of: Callable[[T], Changes | None]) -> _Written[T]:
    base = rows.revision()
    batches = core.end_leases(rows, due)
    result = job(rows)
    changes = changes_of(result)
    return _Written(result, base, batches if changes is None else [*batches, changes])
