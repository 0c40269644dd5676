"""SQLite as Drover uses it: the agent's journal and the coordinator's embedded store.

A `Database` owns one file, one connection and one thread. A whole transaction is one job of that thread, so nothing that happens to
the coroutine that waits (a deadline, a cancellation, the end of its RPC) can leave half of a transaction::

    async with Database(path, SCHEMA) as db:
        rows = await db.transaction(lambda connection: connection.execute("SELECT …").fetchall())

Durability: WAL with `synchronous=FULL`, that is one fdatasync for each transaction that wrote; when `transaction` returns, the data
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
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import structlog

from agent.runtime.intact import Damage
from agent.runtime.sqlite_file import DatabaseFile, Migration

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
            await self._hop(self._file.open, threading.Lock(), self._timeout)
        except BaseException as error:
            closing = self._begin_close()
            if not isinstance(error, asyncio.CancelledError):  # a cancelled caller leaves at once
                await asyncio.wait({closing}, timeout=self._timeout)
            raise

    async def transaction(self, fn: Callable[[sqlite3.Connection], T], *, timeout: float | None = None) -> T:
        """Run `fn` between BEGIN IMMEDIATE and COMMIT in the writer's thread and return its result.

        `fn` must wait for nothing but the connection, must not commit, and must return values, not cursors.

        Cancellation: the caller leaves at once, and the transaction is carried out all the same. Deadline: `timeout` seconds
        (default: the database's); a transaction that has not begun to commit by then is rolled back, and the error says so."""
        commit_or_deadline = threading.Lock()
        deadline = self._timeout if timeout is None else timeout
        return await self._hop(lambda: self._file.transaction(fn, commit_or_deadline), commit_or_deadline, deadline)

    async def read(self, fn: Callable[[sqlite3.Connection], T], *, timeout: float | None = None) -> T:
        """Run `fn` on one consistent state; its writes are rolled back. Works on a full disk."""
        deadline = self._timeout if timeout is None else timeout
        return await self._hop(lambda: self._file.read(fn), threading.Lock(), deadline)

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

    async def _hop(self, job: Callable[[], T], once: threading.Lock, deadline: float) -> T:
        """Run `job` in the thread and return its result. `once` is taken by the commit or by the deadline, whichever comes first.

        Makes one plain future and one timer: a handshake needs dozens of hops, and `asyncio.wait` with `wrap_future` costs as much
        as the write. Cancelling the caller does not cancel the job."""
        if self._closed:
            raise self._file.error("CLOSED", "it is closed", "no")
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()
        self._executor.submit(self._do_job, job, loop, answer)
        timer = loop.call_later(deadline, self._expire, answer, once, deadline)
        try:
            return await answer
        finally:
            timer.cancel()

    def _expire(self, answer: "asyncio.Future[T]", once: threading.Lock, deadline: float) -> None:
        if not answer.done():
            written = "no" if once.acquire(blocking=False) else "unknown"
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

    # ---- in the thread

    def _do_job(self, job: Callable[[], T], loop: asyncio.AbstractEventLoop, answer: "asyncio.Future[T]") -> None:
        result: Any = None
        error: BaseException | None = None
        try:
            result = job()
        except BaseException as caught:
            error = caught
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
            loop.call_soon_threadsafe(self._settle, answer, result, error)
