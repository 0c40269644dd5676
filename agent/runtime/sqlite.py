"""The one way in which Drover uses SQLite: the agent's journal and the coordinator's embedded store.

A `Database` owns one file, one connection and one thread. A whole transaction is one hop into that thread, so nothing that
happens to the coroutine that waits (a deadline, a cancellation, the end of its RPC) can leave half of a transaction::

    async with Database(path, SCHEMA) as db:
        rows = await db.transaction(lambda connection: connection.execute("SELECT …").fetchall())

Durability: WAL with `synchronous=FULL`, that is one fdatasync for each transaction that wrote; when `transaction` returns,
the data survives a loss of power. A read costs no sync. About 0.3 ms each on a disk that syncs in 0.13 ms.

Wholeness: what was acknowledged and is not there any more is noticed when the file is opened (`intact`), and the file is then
refused, unless a file ``PATH.accept-loss`` says that an operator wants to go on with what is left.

Errors: `JOURNAL_UNAVAILABLE` for everything that SQLite, the disk or the deadline does, with metadata `path`, `cause`
(SQLite's name, such as ``SQLITE_FULL``) and `written`: ``no`` (certainly not, and never will be) or ``unknown`` (the
commit had begun: the data may be there after a restart; repeat the write, so writes must be idempotent). What `fn` raises
itself passes through after a rollback, unless it is a `sqlite3.Error` or `OSError`.
"""

import asyncio
import contextlib
import fcntl
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import structlog

from agent.runtime.errors import DroverError
from agent.runtime.intact import Damage, Loss, Mark, add_functions, as_text, commits, look, make_commits, set_commits
from agent.runtime.sqlite_errors import cause_of, unusable

T = TypeVar("T")

Migration = str | Callable[[sqlite3.Connection], None]
"""One step of a schema: a script, or a function for what SQL cannot say. It holds no BEGIN or COMMIT."""

log = structlog.get_logger(__name__)

TIMEOUT_SECONDS: Final = 10.0
"""Default deadline of one transaction, its time in the queue included."""

CHECKPOINT_PAGES: Final = 1000
"""Pages (4 KiB) of the WAL after which a commit copies it into the database; bounds the WAL to about 4 MiB, unless one
transaction alone is larger."""

TIDY_COMMITS: Final = 512
"""After so many commits, pages that deletes have freed are given back to the file system …"""

TIDY_PAGES: Final = 1000
"""… at most so many at once (a few milliseconds)."""

MARK_SECONDS: Final = 1.0
"""The mark is synced so long after it was synced last, at the next commit."""


class Database:
    """One SQLite file, used by this process alone (a lock on ``PATH.lock`` sees to that).

    `schema` is a tuple of migrations. `PRAGMA user_version` counts those that have run; never change one that was
    released, append another. Each runs in a transaction of its own.

    `check` finds the damaged rows of its tables. `timeout` in seconds bounds each transaction, opening and closing.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        schema: Sequence[Migration],
        *,
        check: Callable[[sqlite3.Connection], Sequence[Damage]] = lambda _: (),
        timeout: float = TIMEOUT_SECONDS,
    ) -> None:
        self.path = Path(path)
        self.lost = False
        """It was opened although something that mattered is missing: an operator accepted that."""
        self._accept_loss = Path(f"{self.path}.accept-loss")
        self._mark = Mark(Path(f"{self.path}.mark"))
        self._mark_synced = 0.0
        self._count: int | None = None
        """Transactions that were committed; None where that is to be read. Touched in the executor's thread only."""
        self._schema = tuple(schema)
        self._check_rows = check
        self._timeout = timeout
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"sqlite-{self.path.name}")
        self._lock_fd = -1
        self._open: sqlite3.Connection | None = None  # touched in the executor's thread only
        self._closed = False

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def open(self) -> None:
        """Open or create the file, check it as a whole, and bring its tables up to date.

        A transaction that was cut short by a crash is gone, all that were committed are there. After an error the
        `Database` is closed; make another one to try again.
        """
        try:
            await self._hop(self._do_open, threading.Lock(), self._timeout)
        except BaseException as error:
            closing = self._begin_close()
            if not isinstance(error, asyncio.CancelledError):  # who was cancelled leaves at once
                await asyncio.wait({closing}, timeout=self._timeout)
            raise

    async def transaction(self, fn: Callable[[sqlite3.Connection], T], *, timeout: float | None = None) -> T:
        """Run `fn` between BEGIN IMMEDIATE and COMMIT in the writer's thread and give back what it returns.

        `fn` must not wait for anything but the connection, not commit, and return values, not cursors.

        Cancellation: the caller leaves at once, and the transaction is carried out whole all the same (a write that was
        asked for is not lost because the asker went away). Deadline: `timeout` seconds (default: the database's); what had
        not begun to commit by then is rolled back, and the error says so.
        """
        commit_or_deadline = threading.Lock()
        deadline = self._timeout if timeout is None else timeout
        return await self._hop(lambda: self._do_transaction(fn, commit_or_deadline), commit_or_deadline, deadline)

    async def read(self, fn: Callable[[sqlite3.Connection], T], *, timeout: float | None = None) -> T:
        """Run `fn` on one consistent state; what it writes is rolled back. Works on a disk that is full."""
        deadline = self._timeout if timeout is None else timeout
        return await self._hop(lambda: self._do_read(fn), threading.Lock(), deadline)

    async def close(self) -> None:
        """Wait for the transactions under way, fold the WAL into the file, and close. Can be called again."""
        if self._closed:
            return
        done, _ = await asyncio.wait({self._begin_close()}, timeout=self._timeout)
        if not done:  # the thread goes on; what was committed is safe in the WAL either way
            log.warning("sqlite.close_timed_out", path=str(self.path), seconds=self._timeout)

    # ---- from the loop to the thread

    def _begin_close(self) -> "asyncio.Future[None]":
        """Nothing enters the queue any more; what is in it is done first."""
        self._closed = True
        future = self._executor.submit(self._do_close)
        self._executor.shutdown(wait=False)
        return asyncio.wrap_future(future)

    async def _hop(self, job: Callable[[], T], once: threading.Lock, deadline: float) -> T:
        """Run `job` in the thread. `once` is taken by the commit or by the deadline, whichever comes first.

        One plain future and one timer for each hop: a handshake makes dozens, and what `asyncio.wait` and `wrap_future` do
        for theirs costs as much as the write. The waiter's cancellation ends the future and not the job.
        """
        if self._closed:
            raise self._error("CLOSED", "it is closed", "no")
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
            answer.set_exception(self._error("DEADLINE", f"it did not answer within {deadline:g} s (written: {written})", written))

    def _settle(self, answer: "asyncio.Future[T]", result: T, error: BaseException | None) -> None:
        if not answer.done():
            if error is None:
                answer.set_result(result)
            else:
                answer.set_exception(error)
        elif error is not None:  # the one who asked is gone, so a failure is told to the log
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

    @property
    def _connection(self) -> sqlite3.Connection:
        if self._open is None:
            raise sqlite3.ProgrammingError("the database is not open")
        return self._open

    def _do_open(self) -> None:
        with self._translated("no"):
            self._take_lock()
            faults, loss = look(self.path, self._mark)
            if faults:
                raise self._error("SQLITE_CORRUPT", "; ".join(faults), "no")
            if loss is not None:
                self._lose(loss)
            # SQLite makes the file with the umask's rights; a journal is nobody else's business.
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            self._open = sqlite3.connect(self.path, timeout=self._timeout / 2, isolation_level=None)
            self._configure(self._open)
            self._migrate(self._open)
            self._mend_rows(self._open)
            self._mark.open(commits(self._open) or 0)
            self._accept_loss.unlink(missing_ok=True)

    def _mend_rows(self, connection: sqlite3.Connection) -> None:
        """Tell of damaged rows and forget them; refuse where something may still be decided by one."""
        connection.text_factory = as_text
        damages = self._check_rows(connection)
        connection.text_factory = str
        mattering = [damage for damage in damages if damage.matters]
        if mattering:
            more = f" (and {len(mattering) - 1} more rows)" if len(mattering) > 1 else ""
            self._lose(Loss("DAMAGED_ROW", f"{mattering[0].row}{more} is damaged, and something may still be decided by it"))
        for damage in damages:
            log.error("sqlite.damaged_row", path=str(self.path), row=damage.row, matters=damage.matters)
        connection.execute("BEGIN IMMEDIATE")
        for damage in damages:
            connection.execute(damage.mend, damage.parameters)
        connection.execute("COMMIT")

    def _lose(self, loss: Loss) -> None:
        """Something that mattered is missing: refuse, unless an operator has accepted that."""
        if not self._accept_loss.exists():
            raise self._error(loss.cause, loss.what, "no")
        self.lost = True
        log.error("sqlite.loss_accepted", path=str(self.path), cause=loss.cause, what=loss.what)

    def _take_lock(self) -> None:
        """Two daemons on one journal would each trust what they remember; a file of its own, because closing any other
        descriptor of the database would drop SQLite's own locks."""
        self._lock_fd = os.open(f"{self.path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._error("SQLITE_BUSY", "it is in use by another process", "no") from None

    @staticmethod
    def _configure(connection: sqlite3.Connection) -> None:
        add_functions(connection)
        connection.execute("PRAGMA auto_vacuum=INCREMENTAL")  # before WAL: it only works before the first page is written
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")
        connection.execute(f"PRAGMA wal_autocheckpoint={CHECKPOINT_PAGES}")
        # A larger WAL (one huge transaction) is cut back to this at the next checkpoint.
        connection.execute(f"PRAGMA journal_size_limit={CHECKPOINT_PAGES * 4096}")

    def _migrate(self, connection: sqlite3.Connection) -> None:
        done = connection.execute("PRAGMA user_version").fetchone()[0]
        if done > len(self._schema):
            raise self._error(
                "NEWER_SCHEMA",
                f"it was written by a newer Drover (schema {done}, this one knows {len(self._schema)})",
                "no",
                "install that version again, or restore the file from a backup",
            )
        make_commits(connection)
        for version, migration in enumerate(self._schema[done:], start=done + 1):
            # One transaction, so that the tables and the number that says they exist cannot disagree.
            try:
                if isinstance(migration, str):
                    connection.executescript(f"BEGIN IMMEDIATE;\n{migration}\n;")  # it leaves the transaction open
                else:
                    connection.execute("BEGIN IMMEDIATE")
                    migration(connection)
                connection.execute(f"PRAGMA user_version={version}")
                connection.execute("COMMIT")
            except BaseException:
                self._roll_back(connection)
                raise

    def _do_transaction(self, fn: Callable[[sqlite3.Connection], T], commit_or_deadline: threading.Lock) -> T:
        if commit_or_deadline.locked():
            raise self._error("DEADLINE", "the deadline passed in the queue", "no")
        with self._translated("no"):
            connection = self._connection
            self._roll_back(connection)  # nothing, unless the rollback after an error failed too
            connection.execute("BEGIN IMMEDIATE")
            count, changes = None, connection.total_changes
            try:
                result = fn(connection)
                if connection.total_changes != changes:
                    count = self._count + 1 if self._count is not None else (commits(connection) or 0) + 1
                    set_commits(connection, count)
                if not commit_or_deadline.acquire(blocking=False):
                    raise self._error("DEADLINE", "the deadline passed before the commit", "no")
                # A failed commit may have put its frames on the disk, where a restart would find them.
                with self._translated("unknown"):
                    connection.execute("COMMIT")
            except BaseException:
                self._count = None  # whether it was committed is to be read again
                self._roll_back(connection)
                raise
        if count is not None:
            self._count = count
            self._count_commit(count)
        return result

    def _do_read(self, fn: Callable[[sqlite3.Connection], T]) -> T:
        with self._translated("no"):
            connection = self._connection
            self._roll_back(connection)
            connection.execute("BEGIN")
            try:
                return fn(connection)
            finally:
                self._roll_back(connection)

    @staticmethod
    def _roll_back(connection: sqlite3.Connection) -> None:
        # After some errors (disk full) SQLite has rolled back by itself; the first error is the one to tell.
        if connection.in_transaction:
            with contextlib.suppress(sqlite3.Error):
                connection.execute("ROLLBACK")

    def _count_commit(self, count: int) -> None:
        try:
            self._mark.write(count)
        except OSError as error:  # the data is safe; the mark says too little
            log.warning("sqlite.mark_not_written", path=str(self._mark.path), error=str(error))
        chores = [self._do_tidy] if count % TIDY_COMMITS == 0 else []
        if time.monotonic() - self._mark_synced > MARK_SECONDS:
            self._mark_synced = time.monotonic()
            chores.append(self._do_sync_mark)
        for chore in chores:
            # A job of its own, so that no caller waits for it.
            with contextlib.suppress(RuntimeError):  # closed in this very moment
                self._executor.submit(chore)

    def _do_sync_mark(self) -> None:
        with contextlib.suppress(OSError):
            self._mark.sync()

    def _do_tidy(self) -> None:
        with contextlib.suppress(sqlite3.Error):  # a chore: whoever writes next is told of a broken disk
            # The pragma frees one page for each step, and Python's execute makes one step only; executescript makes all.
            # But executescript commits what is open, which here can only be what a failed rollback left: never that.
            self._roll_back(self._connection)
            if not self._connection.in_transaction:
                self._connection.executescript(f"PRAGMA incremental_vacuum({TIDY_PAGES})")

    def _do_close(self) -> None:
        if self._open is not None:
            with contextlib.suppress(sqlite3.Error):  # the WAL stays then, and the next open recovers from it
                self._do_tidy()
                self._open.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            with contextlib.suppress(sqlite3.Error):
                self._open.close()
            self._open = None
            self._do_sync_mark()
        self._mark.close()
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    # ---- errors

    @contextlib.contextmanager
    def _translated(self, written: str) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise self._error(cause_of(error), str(error), written) from error

    def _error(self, cause: str, what: str, written: str, advice: str = "") -> DroverError:
        return unusable(self.path, cause, what, written, advice)
