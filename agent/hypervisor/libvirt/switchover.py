"""Repair of libvirt's status file after the source's libvirtd died before it could record that the guest has left.

The problem. Finish is armed early, so the destination starts the guest as soon as the whole state is there. On the source,
libvirtd tells QEMU to switch over (`migrate-continue`), and only when QEMU reports the end does it write into its status
file that Perform is done. If it dies in between, QEMU sends the rest by itself and the destination starts the guest; the
restarted libvirtd reads "in Perform, paused by the migration", cancels what has long ended, and resumes its own copy. Two
copies run (seen 2 to 10 ms after the guest was suspended, every time).

The repair. While no libvirtd runs, QEMU's monitor is free, and QEMU knows what happened. If the state has left, or may have,
the phase in libvirt's status file is set to what the dead libvirtd would have written an instant later: `perform3_done`. With
that, libvirt leaves the guest paused for its manager to decide. Nothing is frozen or killed, and libvirtd starts as usual.
Nobody can resume the guest until libvirtd starts, so the repair only has to be done before it reads the file. Two parties
do it, and either is enough:

- the live agent, at the moment that its Perform loses libvirtd (`guard.Guard`);
- libvirt's own hook ``daemon … start``, which libvirtd runs, and waits for, before it looks at any guest. (The hook
  ``qemu NAME reconnect`` comes too late: libvirt 9.0 calls it after the guest was resumed.) So it also holds when the
  agent is dead. Install it with ``python -m agent.hypervisor.libvirt.hook``.

Why QEMU's answer can be trusted. QEMU serves a new monitor connection only after it has noticed the end of the old one and
dropped the commands pending on it, so nobody can tell it to switch over any more: before ``device`` the guest stays, from
then on it may have left. And a guest that was resumed since (a ``completed`` of an earlier migration) reports that it runs.

Only guests that Drover is migrating are touched: they have a mark, a file RUN/drover/UUID with the guest's name. Any other
migration has a manager that finishes only after Perform, and for it libvirt's own recovery is right.

This file is installed as the hook, so it uses the standard library only and no other file of Drover. A file that it cannot
read or does not understand is left as it is.
"""

import enum
import fcntl
import json
import os
import re
import select
import socket
import struct
import sys
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RUN = Path("/run/libvirt")
"""libvirt's folder for state that lasts until the next boot."""
MARKS = "drover"
"""Folder of the marks, in `RUN`."""

ETC = Path("/etc/libvirt")
HOOK = Path("hooks/daemon.d/50-drover")
"""Path of the hook, in `ETC`. Scripts in a `.d` folder run in addition to those that an administrator has."""

MONITOR_SECONDS = 3.0
"""Longest wait for an answer of QEMU. It does not answer while it sends the last of the memory."""

DEVICE_SECONDS = 5.0
"""Longest wait in state ``device``, which lasts until the destination has acknowledged the whole state: milliseconds, unless the
line is cut."""

CONTINUE_SECONDS = 0.1
"""A ``migrate-continue`` that was executed just before our query shows within this time: a thread has to wake for it."""

GONE_SECONDS = 1.0
"""Longest wait for a dying libvirtd to release its lock: it closes its sockets an instant earlier."""


class Outcome(enum.Enum):
    """Result of a migration after its libvirtd died, as QEMU reports it."""

    STAYS = "stays"
    """The state has not left, and never will: nobody can tell QEMU to switch over any more."""
    LEFT = "left"
    """The whole state left, or may have left: the destination decides."""


_WAITS = {"pre-switchover": CONTINUE_SECONDS, "device": DEVICE_SECONDS}
"""Transient states, with the longest wait for the next state in seconds."""
_LEFT = frozenset({"device", "completed"})
CANCELLABLE = frozenset({"setup", "active", "pre-switchover"})
"""QEMU's states of a migration before the switch-over, which only a libvirtd could still trigger."""
_STOPPED_BY_MIGRATION = frozenset({"finish-migrate", "postmigrate"})


# --- marks


def mark(run: Path, uuid: str, name: str) -> None:
    """Mark the guest as migrated by Drover: Finish may be armed."""
    folder = run / MARKS
    folder.mkdir(mode=0o700, exist_ok=True)
    temporary = folder / f".{uuid}"
    temporary.write_text(name)
    temporary.replace(folder / uuid)


def unmark(run: Path, uuid: str) -> None:
    (run / MARKS / uuid).unlink(missing_ok=True)


def marked(run: Path) -> Iterator[tuple[str, str]]:
    """Yield the UUID and the name of each marked guest."""
    for path in sorted((run / MARKS).glob("[!.]*")):
        yield path.name, path.read_text()


# --- libvirt's status file


_JOB = re.compile(r"^  <job\b[^>]*>", re.MULTILINE)
_PERFORM, _PERFORM_DONE = "phase='perform3'", "phase='perform3_done'"


@dataclass(frozen=True)
class Status:
    """libvirt's status file of a running guest. A few fields are read, and only the phase is written."""

    path: Path
    text: str
    pid: int
    monitor: str
    """Path of the monitor's socket in QEMU's own mount namespace."""

    @classmethod
    def read(cls, run: Path, uuid: str, name: str) -> "Status | None":
        """Read the status of a guest in the Perform phase of an outgoing migration; None for any other guest."""
        path = run / "qemu" / f"{name}.xml"
        try:
            text = path.read_text()
            root = ET.fromstring(text)
        except (OSError, ValueError, ET.ParseError):
            return None
        job, monitor = root.find("job"), root.find("monitor")
        if job is None or (job.get("async"), job.get("phase")) != ("migration out", "perform3") or monitor is None:
            return None
        if root.findtext("domain/uuid") != uuid or not root.get("pid", "").isdigit():
            return None
        return cls(path, text, int(root.get("pid", "0")), monitor.get("path", ""))

    def finish_perform(self) -> bool:
        """Write that Perform is done. Return False, and write nothing, if the text is not as libvirt is known to write it."""
        jobs = _JOB.findall(self.text)
        if len(jobs) != 1 or _PERFORM not in jobs[0]:
            return False
        text = self.text.replace(jobs[0], jobs[0].replace(_PERFORM, _PERFORM_DONE))
        temporary = self.path.with_name(f".{self.path.name}.drover")  # libvirtd reads only what ends in .xml
        temporary.touch(0o600)
        temporary.write_text(text)
        temporary.replace(self.path)
        return True


# --- QEMU's monitor


NO_QEMU = (FileNotFoundError, ProcessLookupError, ConnectionRefusedError)
"""Errors that mean that the guest's QEMU is dead."""


class Monitor:
    """A connection to QEMU's monitor, which accepts one client at a time: libvirtd, while that runs."""

    def __init__(self, pid: int, uuid: str, path: str) -> None:
        """Connect. Raises one of `NO_QEMU` where QEMU is dead, and OSError or ValueError where it does not answer as expected."""
        if uuid not in Path(f"/proc/{pid}/cmdline").read_text().split("\0"):
            raise ProcessLookupError(f"process {pid} is not the QEMU of {uuid}")
        self._deadline = time.monotonic() + MONITOR_SECONDS
        self._buffer = b""
        self._migration: list[str] = []
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.settimeout(MONITOR_SECONDS)
            self._socket.connect(f"/proc/{pid}/root{path}")  # QEMU may have a mount namespace of its own
            self._message()  # the greeting
            self.ask("qmp_capabilities")
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *_error: object) -> None:
        self._socket.close()

    def ask(self, command: str) -> dict[str, Any]:
        self._deadline = time.monotonic() + MONITOR_SECONDS
        self._socket.sendall(json.dumps({"execute": command}).encode() + b"\n")
        while True:
            answer = self._message()
            if "return" in answer:
                return dict(answer["return"])
            if "error" in answer:
                raise ValueError(f"{command}: {answer['error']}")

    def migration(self) -> str:
        """Return the state of the latest migration; empty for a QEMU that never had one."""
        return str(self.ask("query-migrate").get("status", ""))

    def next_migration(self, seconds: float) -> str:
        """Return the next state that QEMU reports by an event; after `seconds` without one, the state that it has then."""
        self._deadline = time.monotonic() + seconds
        try:
            while not self._migration:
                self._message()
        except TimeoutError:
            return self.migration()
        return self._migration.pop(0)

    def _message(self) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            left = self._deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError("QEMU did not answer")
            self._socket.settimeout(left)
            data = self._socket.recv(65536)
            if not data:
                raise ConnectionResetError("QEMU closed its monitor")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        if message.get("event") == "MIGRATION":
            self._migration.append(message["data"]["status"])
        return message


def outcome(monitor: Monitor, cancel: bool = False) -> Outcome:
    """Return the result of the migration. With `cancel`, also cancel one that will not end by itself, so that its guest runs on
    at once rather than at the next start of libvirtd (which would cancel it as well).
    """
    state = monitor.migration()
    waited = None
    while state in _WAITS and state != waited:
        waited, state = state, monitor.next_migration(_WAITS[state])
    if state in _LEFT and monitor.ask("query-status").get("status") in _STOPPED_BY_MIGRATION:
        return Outcome.LEFT
    if cancel and state in CANCELLABLE:
        monitor.ask("migrate_cancel")
    return Outcome.STAYS


# --- together


def mend(run: Path, uuid: str, name: str, cancel: bool = False) -> Outcome | None:
    """Repair the status file of one guest, and return the result of its migration. Return None and do nothing where libvirt needs no
    help: the guest is not in Perform, its QEMU is dead, or a libvirtd is running (libvirt's other daemons run the same hook).
    """
    status = Status.read(run, uuid, name)
    if status is None or not libvirtd_is_gone(run):
        return None
    try:
        with Monitor(status.pid, uuid, status.monitor) as monitor:
            found = outcome(monitor, cancel)
    except NO_QEMU:
        return None  # libvirtd will notice that
    except (OSError, ValueError, KeyError):
        # A QEMU that does not answer may be sending the last of the memory: a paused guest is the safe result.
        found = Outcome.LEFT
    if found is Outcome.LEFT and libvirtd_is_gone(run):
        status.finish_perform()
    return found


def mend_after_death(run: Path, uuid: str, name: str) -> Outcome | None:
    """Call `mend` for the agent when its connection to libvirtd broke. Return None where libvirtd is alive."""
    return mend(run, uuid, name, cancel=True) if libvirtd_is_gone(run, GONE_SECONDS) else None


def libvirtd_is_gone(run: Path, within: float = 0.0) -> bool:
    """Return whether no process holds the lock of libvirt's QEMU driver, which libvirtd takes before it reads any guest. `within`:
    seconds to wait for the end of a process that holds it. False where the lock file cannot be read."""
    holder = _driver_lock(run)
    return holder == 0 or (holder is not None and _has_ended(holder, within) and _driver_lock(run) == 0)


def libvirtd_pid(run: Path) -> int:
    """Return the process that holds that lock; 0 where none does, or the file cannot be read."""
    return _driver_lock(run) or 0


def _driver_lock(run: Path) -> int | None:
    """Return the process that holds that lock, 0 where none does, None where the file cannot be read. Takes no lock."""
    question = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)  # struct flock, 64 bit
    try:
        with (run / "qemu/driver.pid").open() as file:
            answer = struct.unpack("hhqqi4x", fcntl.fcntl(file.fileno(), fcntl.F_GETLK, question))
    except OSError:
        return None
    return 0 if answer[0] == fcntl.F_UNLCK else int(answer[4])


def _has_ended(pid: int, within: float) -> bool:
    try:
        process = os.pidfd_open(pid)
    except OSError:
        return True
    try:
        poll = select.poll()
        poll.register(process, select.POLLIN)
        return bool(poll.poll(within * 1000))
    finally:
        os.close(process)


# --- the hook


def main(arguments: list[str]) -> None:
    """Run as the hook: libvirtd calls it with ``- start - start``."""
    if arguments[1:2] == ["start"]:
        for uuid, name in marked(RUN):  # in parallel: libvirtd waits for the hook, and each silent QEMU takes `MONITOR_SECONDS`
            threading.Thread(target=mend, args=(RUN, uuid, name)).start()


if __name__ == "__main__":
    main(sys.argv[1:])
