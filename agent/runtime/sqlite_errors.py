"""Errors of a database, with advice for the operator."""

import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from agent.runtime.errors import DroverError, Reason

_ACCEPT: Final = 'to go on with what is left of it (see docs/operations.md, "A damaged journal"): touch {path}.accept-loss'

_ADVICE: Mapping[str, str] = {
    "SQLITE_FULL": "free space on its file system; nothing needs a restart",
    "SQLITE_READONLY": "make its file system and the file writable; nothing needs a restart after that",
    "SQLITE_CANTOPEN": "see that its directory exists and that this user may write in it",
    "SQLITE_PERM": "see that this user may read and write it",
    "SQLITE_AUTH": "see that this user may read and write it",
    "SQLITE_BUSY": "another program holds it locked; end that program",
    "SQLITE_LOCKED": "another program holds it locked; end that program",
    "SQLITE_IOERR": "look at the kernel's log for errors of the disk",
    "SQLITE_CORRUPT": f"restore it, its -wal and its .mark from a backup; or move it and its -wal away, and {_ACCEPT}",
    "DEADLINE": "the disk is slow or hangs; look at its load and at the kernel's log",
    "CLOSED": "the daemon is stopping",
    "SQLITE_NOTADB": f"restore it, its -wal and its .mark from a backup; or move it and its -wal away, and {_ACCEPT}",
    "LOST_WRITES": f"restore it, its -wal and its .mark from a backup; or {_ACCEPT}",
    "DAMAGED_MARK": _ACCEPT,
    "DAMAGED_ROW": f"restore it, its -wal and its .mark from a backup; or {_ACCEPT}",
}
"""By SQLite's primary error code."""


def unusable(path: Path, cause: str, what: str, written: str, advice: str = "") -> DroverError:
    """Return JOURNAL_UNAVAILABLE. `cause`: SQLite's or Drover's name of the error; `written`: whether the write took place."""
    what = " ".join(what.split())  # SQLite's report of a damaged file has several lines
    primary = "_".join(cause.split("_")[:2])  # SQLITE_IOERR_WRITE is a kind of SQLITE_IOERR
    advice = (advice or _ADVICE.get(primary, "look at the file and at its disk")).replace("{path}", str(path))
    text = f"{path} cannot be used: {what} ({cause}); {advice}"
    return DroverError(Reason.JOURNAL_UNAVAILABLE, text, metadata={"path": str(path), "cause": cause, "written": written})


def cause_of(error: sqlite3.Error | OSError) -> str:
    """Return SQLite's name of the error; for an error of the system, the name that SQLite would use."""
    if isinstance(error, OSError):
        return _SYSTEM.get(type(error), "SQLITE_IOERR")
    return getattr(error, "sqlite_errorname", None) or type(error).__name__


_SYSTEM: Mapping[type[OSError], str] = {
    FileNotFoundError: "SQLITE_CANTOPEN",
    NotADirectoryError: "SQLITE_CANTOPEN",
    IsADirectoryError: "SQLITE_CANTOPEN",
    PermissionError: "SQLITE_PERM",
}
