"""Ages by the machine's boot clock, which goes on over restarts of this process, and which no step of the wall clock changes."""

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
    """Return the present moment."""
    now = pb.Uptime(boot_id=_boot_id())
    now.since_boot.FromNanoseconds(int(_seconds() * 1e9))
    return now


def seconds_since(moment: pb.Uptime) -> float | None:
    """Return the time since that moment; None if it was on another machine, or before this one was started."""
    if moment.boot_id != _boot_id():
        return None
    return max(0.0, _seconds() - moment.since_boot.ToNanoseconds() / 1e9)


def age_of(migration: pb.Migration) -> tuple[float, bool]:
    """Return the seconds since a migration was requested, and whether they were measured (else they are by the wall clock)."""
    measured = seconds_since(migration.create_uptime)
    age = time.time() - migration.create_time.ToNanoseconds() / 1e9 if measured is None else measured
    return max(0.0, age), measured is not None


def with_age(migration: pb.Migration) -> pb.Migration:
    """Return a copy of the migration with its present age."""
    shown = pb.Migration()
    shown.CopyFrom(migration)
    age, measured = age_of(migration)
    shown.age_by_wall_clock = not measured
    shown.age.FromNanoseconds(int(age * 1e9))
    return shown
