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


def with_age(migration: pb.Migration) -> pb.Migration:
    """For an answer that is given now: how long ago it was accepted, measured where that can be, else by the wall clock."""
    shown = pb.Migration()
    shown.CopyFrom(migration)
    measured = seconds_since(migration.create_uptime)
    shown.age_by_wall_clock = measured is None
    age = time.time() - migration.create_time.ToNanoseconds() / 1e9 if measured is None else measured
    shown.age.FromNanoseconds(int(max(0.0, age) * 1e9))
    return shown
