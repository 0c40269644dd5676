"""How long ago something was, by the clock of this machine that nobody sets: the time since it was started.

It goes on over a restart of this process, unlike what the process has measured itself, and no step of the wall clock changes it.
"""

import time
from functools import cache
from pathlib import Path
from typing import Final

from drover.agent.v1 import migration_pb2 as pb

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


@cache
def _boot_id() -> str:
    return _BOOT_ID.read_text("ascii").strip()


def _seconds() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def uptime() -> pb.Uptime:
    """Now."""
    now = pb.Uptime(boot_id=_boot_id())
    now.since_boot.FromNanoseconds(int(_seconds() * 1e9))
    return now


def seconds_since(moment: pb.Uptime) -> float | None:
    """None where it was on another machine, or before this one was started: that cannot be measured here."""
    if moment.boot_id != _boot_id():
        return None
    return max(0.0, _seconds() - moment.since_boot.ToNanoseconds() / 1e9)


def age_of(migration: pb.Migration) -> tuple[float, bool]:
    """Return how many seconds ago a migration was requested, and whether that was measured; else the wall clock says it."""
    measured = seconds_since(migration.create_uptime)
    age = time.time() - migration.create_time.ToNanoseconds() / 1e9 if measured is None else measured
    return max(0.0, age), measured is not None


def with_age(migration: pb.Migration) -> pb.Migration:
    """Return the migration for an answer that is given now, with its age."""
    shown = pb.Migration()
    shown.CopyFrom(migration)
    age, measured = age_of(migration)
    shown.age_by_wall_clock = not measured
    shown.age.FromNanoseconds(int(age * 1e9))
    return shown
