"""One SQLite file and its connection: synchronous, for the thread of a `sqlite.Database` only."""

import contextlib
import fcntl
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

import structlog

from agent.runtime.errors import DroverError
from agent.runtime.intact import Damage, Loss, Mark, add_functions, as_text, commits, look, make_commits, set_commits
from agent.runtime.sqlite_errors import cause_of, unusable

T = TypeVar("T")

Migration = str | Callable[[sqlite3.Connection], None]
"""One step of a schema: an SQL script, or a function for what SQL cannot express. Contains no BEGIN or COMMIT."""

log = structlog.get_logger(__name__)

CHECKPOINT_PAGES: Final = 1000
"""Pages (4 KiB) of the WAL after which a commit copies it into the database: bounds it to about 4 MiB, or one transaction."""
TIDY_COMMITS: Final = 512
"""Commits after which freed pages are returned to the file system."""
TIDY_PAGES: Final = 1000
"""Most pages that are returned at once (a few milliseconds)."""
MARK_SECONDS: Final = 1.0
"""Shortest time between two syncs of the mark, each of which follows a commit."""


@dataclass
class Job:
    """A transaction that waits for its turn."""

    fn: Callable[[sqlite3.Connection], Any]
    decided: threading.Lock = field(default_factory=threading.Lock)
    """Taken by the commit or by the deadline, whichever comes first."""
    committing: bool = False
    result: Any = None
    error: BaseException | None = None


class DatabaseFile:
    """The file, its lock, its mark and its connection. Arguments as for `sqlite.Database`.

    `later` runs a chore after the transaction under way; no caller waits for it."""

    def __init__(
        self,
        path: Path,
        schema: Sequence[Migration],
        check: Callable[[sqlite3.Connection], Sequence[Damage]],
        timeout: float,
        later: Callable[[Callable[[], None]], object],
    ) -> None:
        self.path = path
        self.lost = False
        """It was opened in spite of a loss, which an operator accepted."""
        self._accept_loss = Path(f"{path}.accept-loss")
        self._mark = Mark(Path(f"{path}.mark"))
        self._mark_synced = 0.0
        self._count: int | None = None
        """Committed transactions; None: to be read from the file."""
        self._schema = tuple(schema)
        self._check_rows = check
        self._timeout = timeout
        self._later = later
        self._lock_fd = -1
        self._open: sqlite3.Connection | None = None

    @property
    def _connection(self) -> sqlite3.Connection:
        if self._open is None:
            raise sqlite3.ProgrammingError("the database is not open")
        return self._open

    def open(self) -> None:
        with self._translated("no"):
            self._take_lock()
            faults, loss = look(self.path, self._mark)
            if faults:
                raise self.error("SQLITE_CORRUPT", "; ".join(faults), "no")
            if loss is not None:
                self._lose(loss)
            # SQLite would create the file with the umask's mode; only its owner may read a journal.
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            self._open = sqlite3.connect(self.path, timeout=self._timeout / 2, isolation_level=None)
            self._configure(self._open)
            self._migrate(self._open)
            self._mend_rows(self._open)
            self._mark.open(commits(self._open) or 0)
            self._accept_loss.unlink(missing_ok=True)

    def _mend_rows(self, connection: sqlite3.Connection) -> None:
        """Log damaged rows and remove them. Raises DAMAGED_ROW if a decision may still depend on one."""
        connection.text_factory = as_text
        damages = self._check_rows(connection)
        connection.text_factory = str
        mattering = [damage for damage in damages if damage.matters]
        if mattering:
            more = f" (and {len(mattering) - 1} more rows)" if len(mattering) > 1 else ""
            self._lose(Loss("DAMAGED_ROW", f"{mattering[0].row}{more} is damaged, and a decision may still depend on it"))
        for damage in damages:
            log.error("sqlite.damaged_row", path=str(self.path), row=damage.row, matters=damage.matters)
        connection.execute("BEGIN IMMEDIATE")
        for damage in damages:
            connection.execute(damage.mend, damage.parameters)
        connection.execute("COMMIT")

    def _lose(self, loss: Loss) -> None:
        """Raise the error of a loss, unless an operator has accepted it."""
        if not self._accept_loss.exists():
            raise self.error(loss.cause, loss.what, "no")
        self.lost = True
        log.error("sqlite.loss_accepted", path=str(self.path), cause=loss.cause, what=loss.what)

    def _take_lock(self) -> None:
        """Exclude a second daemon. The lock is a file of its own: closing one of the database would drop SQLite's locks."""
        self._lock_fd = os.open(f"{self.path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self.error("SQLITE_BUSY", "it is in use by another process", "no") from None

    @staticmethod
    def _configure(connection: sqlite3.Connection) -> None:
        add_functions(connection)
        connection.execute("PRAGMA auto_vacuum=INCREMENTAL")  # before WAL: no effect once the first page is written
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")
        connection.execute(f"PRAGMA wal_autocheckpoint={CHECKPOINT_PAGES}")
        # A larger WAL (one huge transaction) is cut back to this at the next checkpoint.
        connection.execute(f"PRAGMA journal_size_limit={CHECKPOINT_PAGES * 4096}")

    def _migrate(self, connection: sqlite3.Connection) -> None:
        done = connection.execute("PRAGMA user_version").fetchone()[0]
        if done > len(self._schema):
            raise self.error(
                "NEWER_SCHEMA",
                f"it was written by a newer Drover (schema {done}, this one knows {len(self._schema)})",
                "no",
                "install that version again, or restore the file from a backup",
            )
        make_commits(connection)
        for version, migration in enumerate(self._schema[done:], start=done + 1):
            # One transaction, so that the tables and user_version always agree.
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

    def commit(self, jobs: Sequence[Job]) -> None:
        """Run the jobs in one transaction, whose sync they share; if one of them fails, each in one of its own. Sets the result or
        the error of each; raises nothing."""
        for job in jobs:
            if job.decided.locked():
                job.error = self.error("DEADLINE", "the deadline passed in the queue", "no")
        waiting = [job for job in jobs if job.error is None]
        try:
            if waiting:
                self._commit(waiting)
        except BaseException as error:
            if len(waiting) == 1 or any(job.committing for job in waiting):
                for job in waiting:
                    job.error = error
                return
            for job in waiting:
                self.commit([job])

    def _commit(self, jobs: Sequence[Job]) -> None:
        with self._translated("no"):
            connection = self._connection
            self._roll_back(connection)  # no effect, unless the rollback after an error failed
            connection.execute("BEGIN IMMEDIATE")
            count, changes = None, connection.total_changes
            try:
                for job in jobs:
                    job.result = job.fn(connection)
                if connection.total_changes != changes:
                    count = self._count + 1 if self._count is not None else (commits(connection) or 0) + 1
                    set_commits(connection, count)
                self._begin_commit(jobs)
                # A failed commit may have put its frames on the disk, where a restart would find them.
                with self._translated("unknown"):
                    connection.execute("COMMIT")
            except BaseException:
                self._count = None  # it may have been committed: read the number again
                self._roll_back(connection)
                raise
        if count is not None:
            self._count = count
            self._count_commit(count)

    def _begin_commit(self, jobs: Sequence[Job]) -> None:
        """Take the deadlines of all jobs, or none: raise DEADLINE if one has passed."""
        for number, job in enumerate(jobs):
            if not job.decided.acquire(blocking=False):
                for taken in jobs[:number]:
                    taken.decided.release()
                raise self.error("DEADLINE", "the deadline passed before the commit", "no")
        for job in jobs:
            job.committing = True

    def read(self, fn: Callable[[sqlite3.Connection], T]) -> T:
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
        # After some errors (disk full) SQLite has rolled back by itself; the first error is the one to report.
        if connection.in_transaction:
            with contextlib.suppress(sqlite3.Error):
                connection.execute("ROLLBACK")

    def _count_commit(self, count: int) -> None:
        try:
            self._mark.write(count)
        except OSError as error:  # the data is safe; the mark is behind
            log.warning("sqlite.mark_not_written", path=str(self._mark.path), error=str(error))
        chores = [self._tidy] if count % TIDY_COMMITS == 0 else []
        if time.monotonic() - self._mark_synced > MARK_SECONDS:
            self._mark_synced = time.monotonic()
            chores.append(self._sync_mark)
        for chore in chores:
            with contextlib.suppress(RuntimeError):  # the database is being closed
                self._later(chore)

    def _sync_mark(self) -> None:
        with contextlib.suppress(OSError):
            self._mark.sync()

    def _tidy(self) -> None:
        with contextlib.suppress(sqlite3.Error):  # the next write reports a broken disk
            # The pragma frees one page per step; execute makes one step, executescript all. But executescript commits an open
            # transaction, and one that a failed rollback left open must never be committed.
            self._roll_back(self._connection)
            if not self._connection.in_transaction:
                self._connection.executescript(f"PRAGMA incremental_vacuum({TIDY_PAGES})")

    def close(self) -> None:
        if self._open is not None:
            with contextlib.suppress(sqlite3.Error):  # the WAL stays then, and the next open recovers from it
                self._tidy()
                self._open.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            with contextlib.suppress(sqlite3.Error):
                self._open.close()
            self._open = None
            self._sync_mark()
        self._mark.close()
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    @contextlib.contextmanager
    def _translated(self, written: str) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise self.error(cause_of(error), str(error), written) from error

    def error(self, cause: str, what: str, written: str, advice: str = "") -> DroverError:
        return unusable(self.path, cause, what, written, advice)
