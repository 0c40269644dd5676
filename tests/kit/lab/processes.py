"""Runs programs with deadlines; finds and ends the processes of a network namespace, and no other process.

A process belongs to the lab if and only if it lives in one of the lab's network namespaces. To end a process, these functions
open a pidfd *before* they check its namespace, so that a reused process id can never be hit (pidfd_open(2)).
"""

import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.kit.lab.errors import LabError, LabTimeoutError

NETNS_DIR = Path("/run/netns")
"""Where `ip netns` keeps the names of network namespaces."""


def run(argv: Sequence[str | Path], timeout: float = 30.0, stdin: str | None = None) -> str:
    """Run a program to its end; return its standard output. `timeout` in seconds. Raises LabError, LabTimeoutError."""
    words = [str(word) for word in argv]
    try:
        done = subprocess.run(
            words,
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired as error:
        raise LabTimeoutError(f"`{' '.join(words)}` did not end within {timeout:g} s") from error
    except OSError as error:
        raise LabError(f"`{words[0]}` cannot be run: {error}") from error
    if done.returncode != 0:
        output = (done.stderr.strip() or done.stdout.strip())[-2000:]
        raise LabError(f"`{' '.join(words)}` ended with {done.returncode}: {output}")
    return done.stdout


def wait_until(condition: Callable[[], bool], timeout: float, what: str, interval: float = 0.01) -> None:
    """Wait for a condition for which there is no event: check it every `interval` seconds. Raises LabTimeoutError, which names
    `what`, after `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() >= deadline:
            raise LabTimeoutError(f"{what}: not within {timeout:g} s")
        time.sleep(interval)


def namespace_inode(name: str) -> int | None:
    """Return the inode of a named network namespace, or None if there is none of that name.

    Returns None for this process's own namespace as well, so that its processes can never be ended through it.
    """
    try:
        found, own = (NETNS_DIR / name).stat(), os.stat("/proc/self/ns/net")
    except FileNotFoundError:
        return None
    is_namespace = found.st_dev == own.st_dev  # else it is the plain file of an `ip netns add` that was killed
    return found.st_ino if is_namespace and found.st_ino != own.st_ino else None


def in_namespace(pid: int, inode: int) -> bool:
    """Return whether a process lives in that network namespace. Zombies live in none."""
    try:
        return os.stat(f"/proc/{pid}/ns/net").st_ino == inode
    except OSError:
        return False


def namespace_pids(inodes: Iterable[int]) -> list[int]:
    """Return the processes that live in any of these network namespaces, by process id."""
    wanted = set(inodes)
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            inode = os.stat(f"/proc/{entry}/ns/net").st_ino
        except OSError:
            continue
        if inode in wanted:
            found.append(int(entry))
    return sorted(found)


def read_pid(path: Path) -> int | None:
    """Return the number in a pid file; None if there is no file or it is empty."""
    try:
        return int(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def command_line(pid: int) -> list[str]:
    """Return the words of a process's command line; empty if it is gone or a zombie."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
    except OSError:
        return []


@contextmanager
def held(pid: int, inode: int) -> Iterator[int | None]:
    """Yield a pidfd of `pid` if it is (still) a process of that network namespace, else None."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        yield None
        return
    try:
        yield fd if in_namespace(pid, inode) else None
    finally:
        os.close(fd)


def send_signal(pid: int, inode: int, number: signal.Signals, wait: float | None = None) -> bool:
    """Send a signal to a process of that namespace; with `wait`, wait for its end.

    Returns False if there is no such process (any more). Raises LabTimeoutError if it has not ended after `wait` seconds.
    """
    with held(pid, inode) as fd:
        if fd is None:
            return False
        try:
            signal.pidfd_send_signal(fd, number)
        except ProcessLookupError:
            return False
        if wait is not None and not _ended(fd, wait):
            raise LabTimeoutError(f"process {pid} did not end within {wait:g} s of {number.name}")
    return True


def _ended(fd: int, timeout: float) -> bool:
    """Return whether the process of a pidfd ends within `timeout` seconds (the pidfd then becomes readable)."""
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    return bool(poller.poll(timeout * 1000))


def kill_namespaces(inodes: Iterable[int], reapers: Iterable[int] = (), timeout: float = 60.0) -> None:
    """Kill every process of these network namespaces, repeatedly until none is left (they may fork meanwhile).

    The `reapers` (the nodes' inits) are killed last: they reap the processes killed before, so that no zombies are left
    to process 1, which may be slow in a container.
    """
    wanted, last = list(inodes), set(reapers)
    deadline = time.monotonic() + timeout
    while pids := namespace_pids(wanted):
        for pid in [pid for pid in pids if pid not in last] or pids:
            for inode in wanted:
                send_signal(pid, inode, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise LabTimeoutError(f"processes {pids} outlived SIGKILL for {timeout:g} s")
        time.sleep(0.005)
