"""Capture of what the C cores of libraries (gRPC, libvirt) write to stderr, which may contain text of a peer.

While a daemon runs, file descriptor 2 is a pipe. A thread reads it, and logs each line as a value: cut, without control characters,
and rate-limited, so that nobody can fill the disk. The log has a descriptor of its own."""

import contextlib
import os
import select
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final, TextIO

MAX_LINE: Final = 500
"""Bytes of a line that are logged."""
MAX_LINES: Final = 10
"""Lines that are logged in each `WINDOW_SECONDS`; the others are counted."""
WINDOW_SECONDS: Final = 10.0
CLOSE_SECONDS: Final = 1.0

_CHUNK: Final = 65536


@contextlib.contextmanager
def real_stderr() -> Iterator[TextIO]:
    """Yield a stream to the present stderr, with a descriptor of its own."""
    with os.fdopen(os.dup(2), "w", buffering=1, encoding="utf-8", errors="backslashreplace") as stream:
        yield stream


@contextlib.contextmanager
def captured(on_line: Callable[[str], None], on_dropped: Callable[[int], None]) -> Iterator[None]:
    """Capture descriptor 2 while the block runs: `on_line` gets its lines, `on_dropped` the number of lines over the limit.

    Both are called in a thread. A writer never waits: what the pipe cannot hold is lost."""
    sys.stderr.flush()
    before, (reading, writing) = os.dup(2), os.pipe()
    os.set_blocking(writing, False)
    os.dup2(writing, 2)
    os.close(writing)
    reader = threading.Thread(target=_read, args=(reading, _Limiter(on_line, on_dropped)), name="stray-output", daemon=True)
    reader.start()
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(before, 2)  # closes the pipe's last writer, which ends the thread, unless a child process lives on
        os.close(before)
        reader.join(CLOSE_SECONDS)


def _read(descriptor: int, limiter: "_Limiter") -> None:
    rest = b""
    while True:
        if not select.select([descriptor], [], [], limiter.seconds_left())[0]:
            limiter.end_window()
            continue
        chunk = os.read(descriptor, _CHUNK)
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines if chunk else [rest]:
            if line.strip():
                limiter.line(line)
        rest = rest[: MAX_LINE + 1]
        if not chunk:
            break
    limiter.end_window()
    os.close(descriptor)


class _Limiter:
    """Lets `MAX_LINES` through in each window."""

    def __init__(self, on_line: Callable[[str], None], on_dropped: Callable[[int], None]) -> None:
        self._on_line = on_line
        self._on_dropped = on_dropped
        self._ends = 0.0
        self._logged = self._dropped = 0

    def seconds_left(self) -> float | None:
        """Return the time until dropped lines are to be reported; None if there are none."""
        return max(0.0, self._ends - time.monotonic()) if self._dropped else None

    def line(self, line: bytes) -> None:
        if time.monotonic() >= self._ends:
            self.end_window()
        if self._logged < MAX_LINES:
            self._logged += 1
            self._on_line(printable(line))
        else:
            self._dropped += 1

    def end_window(self) -> None:
        if self._dropped:
            self._on_dropped(self._dropped)
        self._logged = self._dropped = 0
        self._ends = time.monotonic() + WINDOW_SECONDS


def printable(line: bytes) -> str:
    """Return the line as text: cut, with non-printable characters escaped."""
    text = line[:MAX_LINE].decode("utf-8", "backslashreplace") + ("…" if len(line) > MAX_LINE else "")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
