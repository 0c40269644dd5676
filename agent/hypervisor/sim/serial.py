"""The serial line of a simulated guest: the same lines as the lab's bare-metal guest writes (`tests/kit/lab/guest`)::

    BOOT <mem MiB> <pages> <ticks/s>    once; a second one means that the guest was started again
    S <seq> <us> <checked> <bad>        one per tick: seq rises by one, us is the guest's own clock, which stops while it is stopped
    W <second of day> <us>              at each full second of wall time (UTC)

The number of a tick follows from the guest's own clock, so only the clock has to be transferred: a copy that runs where
it should not prints numbers that the other copy printed too, and the lab's judge finds them.
"""

import os
import re
from pathlib import Path

TICKS_PER_SECOND = 100
TICK_US = 1_000_000 // TICKS_PER_SECOND
SWEEP_MS = 2000
"""Milliseconds in which the lab's guest checks all of its memory once."""
MIB, PAGE = 1 << 20, 4096
TAIL = 65_536
"""Bytes at the end of a log that are searched for the last number."""


def ticks(clock: float) -> int:
    """Return the number of ticks of a guest that has run for `clock` seconds, rounded to a microsecond."""
    return int(clock * 1_000_000 + 0.5) // TICK_US


def boot_line(memory: int) -> str:
    return f"BOOT {memory // MIB} {memory // PAGE} {TICKS_PER_SECOND}"


def lines(memory: int, first: int, last: int, clock: float, wall: float) -> list[tuple[int, str]]:
    """Return (guest's clock in microseconds, line) for the ticks `first` to `last`. At the wall time `wall` the guest's clock is at
    `clock` seconds."""
    a_tick = TICKS_PER_SECOND * SWEEP_MS
    checks = max(1, (memory // PAGE * 1000 + a_tick - 1) // a_tick)
    boot = wall - clock
    second = int(boot + (first - 1) / TICKS_PER_SECOND)
    found = []
    for seq in range(first, last + 1):
        now = int(boot + seq / TICKS_PER_SECOND)
        if now > second:
            second = now
            turned = round((second - boot) * 1_000_000)
            found.append((turned, f"W {second % 86_400} {turned}"))
        found.append((seq * TICK_US, f"S {seq} {seq * TICK_US} {seq * checks} 0"))
    return found


def write(path: str, written: list[tuple[int, str]], clock: float, monotonic: float) -> None:
    """Append to the log, then to the .stamps file beside it, which has the time of each line (CLOCK_MONOTONIC, us)."""
    boot = round((monotonic - clock) * 1_000_000)
    append(path, "".join(f"{line}\n" for _, line in written))
    append(str(Path(path).with_suffix(".stamps")), "".join(f"{boot + us} {line}\n" for us, line in written))


def within(path: str, root: str) -> bool:
    """Return whether a log path is below a root. Paths come from peers, so they must not lead anywhere else."""
    return bool(root) and os.path.isabs(path) and Path(root).resolve() in Path(path).resolve().parents


def append(path: str, text: str) -> None:
    """Append the text by one write with O_APPEND, so that lines of two hosts are never mixed."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def last_number(path: str) -> int:
    """Return the number of the last tick in a log; 0 where there is none."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
            found = re.findall(rb"^S (\d+) ", file.read(), re.MULTILINE)
    except FileNotFoundError:
        return 0
    return int(found[-1]) if found else 0
