"""The arithmetic of a live migration: pure functions, no clock and no I/O.

A transfer is a value that `advance` moves forward by some seconds at some rate. Its phases::

    COPY      the guest runs at the source; each pass over the memory sends what the previous pass left dirty
     ├─> STOP      the rest can be sent within the allowed downtime: the guest is stopped meanwhile
     ├─> POSTCOPY  on request (`switch`): the guest runs at the destination and fetches the rest, each byte once
     └─> …    no other phase as long as the guest dirties memory faster than the link sends
    DONE      nothing is left

The model of dirtying: a guest writes to its working set cyclically at `dirty_rate`, so that in s seconds it dirties
``min(dirty_rate * s, working_set)`` bytes. What it dirties during a pass is sent in the next one. `converges` follows from
this: a transfer ends by itself if, and only if, the guest dirties more slowly than the link sends, or its whole
working set can be sent within the allowed downtime.

Units: bytes, bytes per second, seconds; all floats, so that arbitrarily small time steps are exact.
"""

from dataclasses import dataclass, replace
from enum import StrEnum
from math import inf

from agent.transfer.progress import Progress

PAGE = 4096
"""Bytes."""
LEAST_STOP = 16 * PAGE
"""Bytes: a rest of this size is always sent with the guest stopped, however small the allowed downtime."""
THROTTLE_FIRST, THROTTLE_STEP, THROTTLE_LAST = 0.20, 0.10, 0.99
"""Auto-converge as in QEMU: the share of time for which the guest does not run."""
THROTTLE_AFTER = 2
"""Number of consecutive passes that left more than half of what they sent, after which the throttle is raised by a step."""


class Phase(StrEnum):
    COPY = "copy"
    STOP = "stop"
    POSTCOPY = "postcopy"
    DONE = "done"


@dataclass(frozen=True)
class Load:
    """Memory of a guest, and how fast the guest writes to it."""

    memory: float
    dirty_rate: float = 0.0
    working_set: float = 0.0
    """Bytes that are written cyclically; counts as at most `memory`."""

    @property
    def bound(self) -> float:
        """The most bytes that can be dirty at once."""
        return min(self.working_set, self.memory)


@dataclass(frozen=True)
class Limits:
    """Conditions for the end of pre-copy."""

    max_downtime: float = 0.3
    auto_converge: bool = False


@dataclass(frozen=True)
class Transfer:
    """State of a transfer at one moment."""

    phase: Phase
    remaining: float
    """Bytes that this pass has still to send."""
    iteration: int = 1
    dirty: float = 0.0
    """Bytes dirtied since this pass began; the next pass sends them."""
    sent: float = 0.0
    elapsed: float = 0.0
    downtime: float = 0.0
    """Time in STOP."""
    last_dirty: float = 0.0
    """Bytes that the previous pass left; the expected downtime is derived from them."""
    dirty_rate: float = 0.0
    """Measured over the previous pass; 0 during the first."""
    throttle: float = 0.0
    lagging: int = 0
    """Number of consecutive passes that left more than half of what they sent."""
    pass_bytes: float = 0.0
    pass_seconds: float = 0.0
    """Duration of this pass until now."""
    """Pages that the guest touched before they had arrived (post-copy)."""


def start(load: Load, *, live: bool = True) -> Transfer:
    """Return a transfer at its beginning. Where it is not live, the guest is stopped, so one pass is enough."""
    phase = Phase.COPY if live else Phase.STOP
    return Transfer(phase=phase, remaining=load.memory, pass_bytes=load.memory)


def due(transfer: Transfer, rate: float) -> float:
    """Return the seconds until this pass ends at this rate; infinite at rate 0 and in phase DONE."""
    if transfer.phase is Phase.DONE or rate <= 0:
        return inf
    return transfer.remaining / rate


def advance(transfer: Transfer, load: Load, limits: Limits, rate: float, seconds: float) -> Transfer:
    """Return the transfer `seconds` later at a constant `rate`.

    Stops early at a change of phase, because the caller must act on the guest then; the rest of the time is dropped.
    """
    phase = transfer.phase
    while transfer.phase is phase and phase is not Phase.DONE:
        step = min(seconds, due(transfer, rate))
        transfer = _flow(transfer, load, rate, step)
        seconds -= step
        if seconds <= 0 and transfer.remaining > 0:
            break
        transfer = _end_pass(transfer, load, limits, rate)
    return transfer


def _flow(transfer: Transfer, load: Load, rate: float, seconds: float) -> Transfer:
    """Return the transfer after `seconds` within one pass, which does not end earlier."""
    whole = seconds >= due(transfer, rate)  # at the end of the pass, rounding must not leave a fraction of a byte
    moved = transfer.remaining if whole else rate * seconds
    copying, stopped = transfer.phase is Phase.COPY, transfer.phase is Phase.STOP
    written = load.dirty_rate * (1 - transfer.throttle) * seconds if copying else 0.0
    return replace(
        transfer,
        remaining=transfer.remaining - moved,
        sent=transfer.sent + moved,
        dirty=min(load.bound, transfer.dirty + written),
        elapsed=transfer.elapsed + seconds,
        pass_seconds=transfer.pass_seconds + seconds,
        downtime=transfer.downtime + (seconds if stopped else 0.0),
    )


def _end_pass(transfer: Transfer, load: Load, limits: Limits, rate: float) -> Transfer:
    """Return the transfer in its next pass or phase, after the pass has sent all its bytes."""
    if transfer.phase is not Phase.COPY:
        return replace(transfer, phase=Phase.DONE)
    fits = transfer.dirty <= max(LEAST_STOP, rate * limits.max_downtime)
    measured = transfer.dirty / transfer.pass_seconds if transfer.pass_seconds > 0 else load.dirty_rate
    after = replace(
        transfer,
        phase=Phase.STOP if fits else Phase.COPY,
        iteration=transfer.iteration + 1,
        remaining=transfer.dirty,
        pass_bytes=transfer.dirty,
        pass_seconds=0.0,
        last_dirty=transfer.dirty,
        dirty_rate=measured,
        dirty=0.0,
    )
    return after if fits or not limits.auto_converge else _throttle(after, left=transfer.dirty, of=transfer.pass_bytes)


def _throttle(transfer: Transfer, left: float, of: float) -> Transfer:
    lagging = transfer.lagging + 1 if left > of / 2 else 0
    if lagging < THROTTLE_AFTER:
        return replace(transfer, lagging=lagging)
    higher = transfer.throttle + THROTTLE_STEP if transfer.throttle else THROTTLE_FIRST
    return replace(transfer, lagging=0, throttle=min(higher, THROTTLE_LAST))


def switch(transfer: Transfer, load: Load) -> Transfer:
    """Switch from pre-copy to post-copy: each byte that is missing or outdated at the destination is sent once."""
    owed = min(load.memory, transfer.remaining + transfer.dirty)
    return replace(transfer, phase=Phase.POSTCOPY, remaining=owed, dirty=0.0, pass_bytes=owed, pass_seconds=0.0)


def resume(load: Load, owed: float) -> Transfer:
    """Return a post-copy transfer that continues after its stream broke, with `owed` bytes still to send."""
    return Transfer(phase=Phase.POSTCOPY, remaining=min(owed, load.memory), pass_bytes=owed)


def converges(load: Load, rate: float, max_downtime: float) -> bool:
    """Return whether pre-copy at that rate ends by itself, without a throttle."""
    return load.dirty_rate < rate or load.bound <= max(LEAST_STOP, rate * max_downtime)


def progress(transfer: Transfer, load: Load, limits: Limits, rate: float) -> Progress:
    """Return the reading of a monitor. The expected downtime is for what the previous pass left, at the current rate."""
    stopping = transfer.phase in (Phase.STOP, Phase.DONE)
    expected = transfer.last_dirty / rate if rate > 0 and transfer.iteration > 1 else limits.max_downtime
    return Progress(
        elapsed=transfer.elapsed,
        iteration=transfer.iteration,
        total_bytes=round(load.memory),
        processed_bytes=round(transfer.sent),
        remaining_bytes=round(transfer.remaining),
        rate=round(rate),
        dirty_rate=round(transfer.dirty_rate),
        downtime=transfer.downtime if stopping else expected,
        postcopy=transfer.phase is Phase.POSTCOPY,
    )
