"""SQLite as Drover uses it: the agent's journal and the coordinator's embedded store.

A `Database` owns one file, one connection and one thread. A whole transaction is one job of that thread, so nothing that happens to
the coroutine that waits (a deadline, a cancellation, the end of its RPC) can leave half of a transaction. Transactions that wait at
the same time are committed together::

    async with Database(path, SCHEMA) as db:
        rows = await db.transaction(lambda connection: connection.execute("SELECT …").fetchall())

Durability: WAL with `synchronous=FULL`, that is one fdatasync for each commit that wrote; when `transaction` returns, the data
survives a loss of power. A read costs no sync. About 0.3 ms each on a disk that syncs in 0.13 ms.

Integrity: opening a file detects missing acknowledged data (`intact`) and then fails, unless an operator has created the file
``PATH.accept-loss`` to go on with the rest.

Errors: `JOURNAL_UNAVAILABLE` for every failure of SQLite, the disk or the deadline, with metadata `path`, `cause` (SQLite's name,
such as ``SQLITE_FULL``) and `written`: ``no`` (not written, and never will be) or ``unknown`` (the commit had begun: the data may be
there after a restart; repeat the write, so writes must be idempotent). Other errors of `fn` pass through after a rollback."""

import asyncio
import contextlib
import os
import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import structlog

from agent.runtime.intact import Damage
from agent.runtime.sqlite_file import DatabaseFile, Job, Migration

T = TypeVar("T")

log = structlog.get_logger(__name__)

TIMEOUT_SECONDS: Final = 10.0
"""Default deadline of one transaction, its time in the queue included."""


class Database:
    """One SQLite file, used by this process alone (by a lock on ``PATH.lock``).

    `schema`: migrations, each of which runs in a transaction of its own. `PRAGMA user_version` counts those that have run; never
    change a released one, append another. `check` returns the damaged rows. `timeout` (seconds): for each transaction, opening,
    closing."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        schema: Sequence[Migration],
        *,
        check: Callable[[sqlite3.Connection], Sequence[Damage]] = lambda _: (),
        timeout: float = TIMEOUT_SECONDS,
    ) -> None:
        self.path = Path(path)
        self._timeout = timeout
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"sqlite-{self.path.name}")
        self._file = DatabaseFile(self.path, schema, check, timeout, self._executor.submit)
        """Used in the executor's thread only, except for `error` and `lost`."""
        self._waiting: deque[tuple[Job, asyncio.Future[Any]]] = deque()
        """Transactions for the next commit."""
        self._is_commit_due = False
        """The thread has yet to take them."""
        self._closed = False

    @property
    def lost(self) -> bool:
        """Whether it was opened in spite of a loss, which an operator accepted."""
        return self._file.lost

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def open(self) -> None:
        """Open or create the file, check all of it, and migrate its tables.

        A transaction that a crash cut short is gone, every committed one is there. After an error it stays closed: make another
        one."""
        try:
            await self._run(self._file.open)
        except BaseException as error:
            closing = self._begin_close()
            if not isinstance(error, asyncio.CancelledError):  # a cancelled caller leaves at once
                await asyncio.wait({closing}, timeout=self._timeout)
            raise

    async def transaction(self, fn: Callable[[sqlite3.Connection], T], *, timeout: float | None = None) -> T:
        """Run `fn` between BEGIN IMMEDIATE and COMMIT in the writer's thread and return its result, once it is durable.

        `fn` must wait for nothing but the connection, must not commit, and must return values, not cursors. It is run again if
        another transaction of the same commit failed.

        Cancellation: the caller leaves at once, and the transaction is carried out all the same. Deadline: `timeout` seconds
        (default: the database's); a transaction that has not begun to commit by then is rolled back, and the error says so."""
        job = Job(fn)

        def enqueue(loop: asyncio.AbstractEventLoop, answer: "asyncio.Future[T]") -> None:
            self._waiting.append((job, answer))
            if not self._is_commit_due:
                self._is_commit_due = True
                self._executor.submit(self._commit, loop)

        return await self._hop(enqueue, job.decided, timeout)

    async def read(self, fn: Callable[[sqlite3.Connection], T]) -> T:
        """Run `fn` on one consistent state; its writes are rolled back. Works on a full disk."""
        return await self._run(lambda: self._file.read(fn))

    async def close(self) -> None:
        """Wait for the transactions under way, fold the WAL into the file, and close. Idempotent."""
        if self._closed:
            return
        done, _ = await asyncio.wait({self._begin_close()}, timeout=self._timeout)
        if not done:  # the thread goes on; what was committed is safe in the WAL either way
            log.warning("sqlite.close_timed_out", path=str(self.path), seconds=self._timeout)

    # ---- from the loop to the thread

    def _begin_close(self) -> "asyncio.Future[None]":
        """Accept no more jobs, and close after those in the queue."""
        self._closed = True
        future = self._executor.submit(self._file.close)
        self._executor.shutdown(wait=False)
        return asyncio.wrap_future(future)

    async def _run(self, job: Callable[[], T]) -> T:
        """Run `job` in the thread and return its result."""

        def submit(loop: asyncio.AbstractEventLoop, answer: "asyncio.Future[T]") -> None:
            self._executor.submit(self._do_job, job, loop, answer)

        return await self._hop(submit, threading.Lock())

    async def _hop(
        self,
        submit: "Callable[[asyncio.AbstractEventLoop, asyncio.Future[T]], None]",
        decided: threading.Lock,
        timeout: float | None = None,
    ) -> T:
        """Hand a job to the thread and return its result. `decided` is taken by the commit or by the deadline.

        Makes one plain future and one timer: a handshake needs dozens of hops, and `asyncio.wait` with `wrap_future` costs as much
        as the write. Cancelling the caller does not cancel the job."""
        if self._closed:
            raise self._file.error("CLOSED", "it is closed", "no")
        loop, deadline = asyncio.get_running_loop(), self._timeout if timeout is None else timeout
        answer: asyncio.Future[T] = loop.create_future()
        submit(loop, answer)
        timer = loop.call_later(deadline, self._expire, answer, decided, deadline)
        try:
            return await answer
        finally:
            timer.cancel()

    def _expire(self, answer: "asyncio.Future[T]", decided: threading.Lock, deadline: float) -> None:
        if not answer.done():
            written = "no" if decided.acquire(blocking=False) else "unknown"
            answer.set_exception(
                self._file.error("DEADLINE", f"it did not answer within {deadline:g} s (written: {written})", written)
            )

    def _settle(self, answer: "asyncio.Future[T]", result: T, error: BaseException | None) -> None:
        if not answer.done():
            if error is None:
                answer.set_result(result)
            else:
                answer.set_exception(error)
        elif error is not None:  # the caller is gone
            log.warning("sqlite.transaction_failed_unseen", path=str(self.path), error=str(error))

    def _settle_all(self, jobs: "Sequence[tuple[Job, asyncio.Future[Any]]]") -> None:
        for job, answer in jobs:
            self._settle(answer, job.result, job.error)

    # ---- in the thread

    def _commit(self, loop: asyncio.AbstractEventLoop) -> None:
        self._is_commit_due = False  # before the queue is read: what is added from now on is for another commit
        jobs = [self._waiting.popleft() for _ in range(len(self._waiting))]
        self._file.commit([job for job, _ in jobs])
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
            loop.call_soon_threadsafe(self._settle_all, jobs)

    def _do_job(self, job: Callable[[], T], loop: asyncio.AbstractEventLoop, answer: "asyncio.Future[T]") -> None:
        result: Any = None
        error: BaseException | None = None
        try:
            result = job()
        except BaseException as caught:
            error = caught
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
            loop.call_soon_threadsafe(self._settle, answer, result, error)
