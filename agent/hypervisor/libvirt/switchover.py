"""What a source libvirtd did not live to write down: that its guest has left.

The hole. Finish is armed early, so the destination starts the guest as soon as the whole state is there. On the source,
libvirtd tells QEMU to switch over (`migrate-continue`), and only when QEMU reports the end does it write into its status
file that Perform is done. If it dies in between, QEMU sends the rest by itself and the destination starts the guest; the
restarted libvirtd reads "in Perform, paused by the migration", cancels what has long ended, and resumes its own copy. Two
copies run (seen 2 to 10 ms after the guest was suspended, every time).

The mend. While no libvirtd runs, QEMU's monitor is free, and QEMU knows the truth. If the state has left, or may have, the
phase in libvirt's status file is set to what the dead libvirtd would have written an instant later: `perform3_done`, at
which libvirt leaves the guest paused for its manager to decide. Nothing is frozen or killed, and libvirtd starts as ever.
Until it starts nobody can resume the guest, so there is no hurry but to be done before it reads the file. Two do that,
and either is enough:

- the live agent, at the moment that its Perform loses libvirtd (`guard.Guard`);
- libvirt's own hook ``daemon … start``, which libvirtd runs, and waits for, before it looks at any guest. (The hook
  ``qemu NAME reconnect`` comes too late: libvirt 9.0 calls it after the guest was resumed.) So it also holds when the
  agent is dead. Install it with ``python -m agent.hypervisor.libvirt.switchover install``.

Why QEMU's answer can be trusted. A new monitor connection is served only after QEMU has noticed the end of the old one and
dropped what had been asked on it, so nobody tells it to switch over any more: before ``device`` it stays, from then on it
may have left. And a guest that was resumed since (a ``completed`` of an earlier migration) runs, and then says so.

Only guests that Drover is moving are touched: they have a mark, a file RUN/drover/UUID with the guest's name. Any other
migration has a manager that finishes only after Perform, and for it libvirt's own recovery is right.

This file is installed as the hook, so it stands alone: the standard library only. Whatever it cannot
read or does not understand it leaves as it is.
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
"""libvirt's folder for what is true until the next boot."""

MARKS = "drover"
"""The folder of the marks, in it."""

ETC = Path("/etc/libvirt")
HOOK = Path("hooks/daemon.d/50-drover")
"""Where the hook belongs, in that folder. Scripts in a `.d` folder run beside those that an administrator has."""

MONITOR_SECONDS = 3.0
"""A QEMU that has not answered by then is left as it is. It is silent while it sends the last of the memory."""

DEVICE_SECONDS = 5.0
"""QEMU says ``device`` until the destination has acknowledged the whole state: milliseconds, unless the line is cut."""

CONTINUE_SECONDS = 0.1
"""A ``migrate-continue`` that was executed just before we asked shows within this: a thread has to wake for it."""

GONE_SECONDS = 1.0
"""A dying libvirtd closes its sockets an instant before it lets go of its lock."""


class Outcome(enum.Enum):
    """What QEMU says of the migration that its libvirtd left behind."""

    STAYS = "stays"
    """The state has not left, and never will: nobody tells QEMU to switch over any more."""
    LEFT = "left"
    """The whole state left, or may have: the destination decides."""


_WAITS = {"pre-switchover": CONTINUE_SECONDS, "device": DEVICE_SECONDS}
"""Passing states, and how long to wait for the next."""
_LEFT = frozenset({"device", "completed"})
CANCELLABLE = frozenset({"setup", "active", "pre-switchover"})
"""QEMU's states of a migration before the switch-over that only a libvirtd could still ask for."""
_STOPPED_BY_MIGRATION = frozenset({"finish-migrate", "postmigrate"})


# --- marks


def mark(run: Path, uuid: str, name: str) -> None:
    """From now on this guest's migration is Drover's: Finish may be armed."""
    folder = run / MARKS
    folder.mkdir(mode=0o700, exist_ok=True)
    temporary = folder / f".{uuid}"
    temporary.write_text(name)
    temporary.replace(folder / uuid)


def unmark(run: Path, uuid: str) -> None:
    (run / MARKS / uuid).unlink(missing_ok=True)


def marked(run: Path) -> Iterator[tuple[str, str]]:
    """The UUID and the name of each marked guest."""
    for path in sorted((run / MARKS).glob("[!.]*")):
        yield path.name, path.read_text()


# --- libvirt's status file


_JOB = re.compile(r"^  <job\b[^>]*>", re.MULTILINE)
_PERFORM, _PERFORM_DONE = "phase='perform3'", "phase='perform3_done'"


@dataclass(frozen=True)
class Status:
    """libvirt's own record of a running guest, of which little is read and one word is written."""

    path: Path
    text: str
    pid: int
    monitor: str
    """The socket's path, as QEMU sees it."""

    @classmethod
    def read(cls, run: Path, uuid: str, name: str) -> "Status | None":
        """The status of a guest in the Perform phase of an outgoing migration; None for any other."""
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
        """Write that Perform is done. False where the text is not as libvirt is known to write it."""
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
"""The guest's QEMU is dead."""


class Monitor:
    """A connection to QEMU's monitor, which takes one client at a time: libvirtd, while one runs."""

    def __init__(self, pid: int, uuid: str, path: str) -> None:
        """Raises one of `NO_QEMU`, or OSError or ValueError where it does not answer as it should."""
        if uuid not in Path(f"/proc/{pid}/cmdline").read_text().split("\0"):
            raise ProcessLookupError(f"process {pid} is not the QEMU of {uuid}")
        self._deadline = time.monotonic() + MONITOR_SECONDS
        self._buffer = b""
        self._migration: list[str] = []
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.settimeout(MONITOR_SECONDS)
            self._socket.connect(f"/proc/{pid}/root{path}")  # QEMU's own view: it may live in other mounts than ours
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
        """The state of the latest migration; empty for a QEMU that never had one."""
        return str(self.ask("query-migrate").get("status", ""))

    def next_migration(self, seconds: float) -> str:
        """Its next state, as QEMU tells it; or what it is after so long."""
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
    """What became of the migration. `cancel` one that will not end by itself, so that its guest runs on at once rather than
    at the next start of libvirtd (which would cancel it as well).
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
    """Write down what libvirtd could not, for one guest. None where that is nobody's business but libvirt's: the guest is not in
    Perform, its QEMU is dead, or a libvirtd looks after it (libvirt's other daemons run the same hook).
    """
    status = Status.read(run, uuid, name)
    if status is None or not libvirtd_is_gone(run):
        return None
    try:
        with Monitor(status.pid, uuid, status.monitor) as monitor:
            found = outcome(monitor, cancel)
    except NO_QEMU:
        return None  # libvirtd will see that
    except (OSError, ValueError, KeyError):
        # A QEMU that does not answer may be sending the last of the memory: the safe side is the paused one.
        found = Outcome.LEFT
    if found is Outcome.LEFT and libvirtd_is_gone(run):
        status.finish_perform()
    return found


def mend_after_death(run: Path, uuid: str, name: str) -> Outcome | None:
    """`mend`, by the agent, when its connection broke."""
    return mend(run, uuid, name, cancel=True) if libvirtd_is_gone(run, GONE_SECONDS) else None


def libvirtd_is_gone(run: Path, within: float = 0.0) -> bool:
    """No process holds the lock of libvirt's QEMU driver, which is taken before any guest is looked at."""
    try:
        with (run / "qemu/driver.pid").open() as file:
            holder = _lock_holder(file.fileno())
            return not holder or (_has_ended(holder, within) and not _lock_holder(file.fileno()))
    except OSError:
        return False


def libvirtd_pid(run: Path) -> int:
    """The process that has that lock; 0 where none has, or it cannot be read."""
    try:
        with (run / "qemu/driver.pid").open() as file:
            return _lock_holder(file.fileno())
    except OSError:
        return 0


def _lock_holder(descriptor: int) -> int:
    """The process that has a lock on the file, 0 where none has. Asks without locking."""
    question = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)  # struct flock, 64 bit
    answer = struct.unpack("hhqqi4x", fcntl.fcntl(descriptor, fcntl.F_GETLK, question))
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


def install(etc: Path) -> Path:
    """Put the hook into this configuration folder of libvirt. libvirtd finds it at its next start."""
    hook = etc / HOOK
    hook.parent.mkdir(parents=True, exist_ok=True)
    temporary = hook.with_name(f".{hook.name}")
    interpreter = Path(sys.executable).resolve()  # not the one of a virtual environment, which an upgrade may remove
    temporary.write_text(f"#!{interpreter} -I\n{Path(__file__).read_text()}")
    temporary.chmod(0o755)
    temporary.replace(hook)
    return hook


def is_installed(hook: Path) -> bool:
    """Whether the hook is there, and is that of this very Drover."""
    try:
        return hook.read_text().endswith(Path(__file__).read_text())
    except OSError:
        return False


def main(words: list[str]) -> None:
    """As the hook (``- start - start``), or ``install [/etc/libvirt]``."""
    if words[:1] == ["install"]:
        print(install(Path(words[1]) if words[1:] else ETC))
    elif words[1:2] == ["start"]:
        for uuid, name in marked(RUN):  # at once: libvirtd waits for us, and one QEMU that is silent is enough to wait for
            threading.Thread(target=mend, args=(RUN, uuid, name)).start()


if __name__ == "__main__":
    main(sys.argv[1:])
