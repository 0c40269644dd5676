"""The arithmetic of a live migration: pure functions, no clock and no I/O.

A transfer is a value that `advance` moves forward by some seconds at some rate. Its phases::

    COPY      the guest runs at the source; pass after pass over the memory, each sends what the one before left dirty
     ├─> STOP      what is left can be sent within the allowed downtime: the guest stands still while it is
     ├─> POSTCOPY  on request (`switch`): the guest runs at the destination and pulls what is left, each byte once
     └─> …    for as long as the guest dirties faster than the link sends
    DONE      nothing is left

The model of dirtying: a guest writes its working set round and round at `dirty_rate`, so that in s seconds it dirties
``min(dirty_rate * s, working_set)`` bytes. Whatever it dirties during a pass is sent in the next one. From this follows
`converges`: a transfer ends by itself if, and only if, the guest dirties more slowly than the link sends, or its whole
working set fits into the allowed downtime.

Units: bytes, bytes per second, seconds; all floats, so that a slice of time as small as you like counts exactly.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from math import inf

from agent.transfer.progress import Progress

PAGE = 4096
"""Bytes."""
LEAST_STOP = 16 * PAGE
"""Bytes: so little left is always sent with the guest stopped, however small the allowed downtime."""
THROTTLE_FIRST, THROTTLE_STEP, THROTTLE_LAST = 0.20, 0.10, 0.99
"""Auto-converge as QEMU does it: the share of its time that the guest is held back."""
THROTTLE_AFTER = 2
"""Passes in a row that left more than half of what they sent, before the throttle goes up a step."""


class Phase(StrEnum):
    COPY = "copy"
    STOP = "stop"
    POSTCOPY = "postcopy"
    DONE = "done"


@dataclass(frozen=True)
class Load:
    """What a guest does to its memory."""

    memory: float
    dirty_rate: float = 0.0
    working_set: float = 0.0
    """At most `memory`; bytes that are written round and round."""

    @property
    def bound(self) -> float:
        """The most that can be dirty at once."""
        return min(self.working_set, self.memory)


@dataclass(frozen=True)
class Limits:
    """When pre-copy may end."""

    max_downtime: float = 0.3
    auto_converge: bool = False


@dataclass(frozen=True)
class Transfer:
    """A migration's memory at one moment."""

    phase: Phase
    remaining: float
    """Of this pass."""
    iteration: int = 1
    dirty: float = 0.0
    """Dirtied since this pass began; it is what the next pass sends."""
    sent: float = 0.0
    elapsed: float = 0.0
    downtime: float = 0.0
    """Time in STOP."""
    last_dirty: float = 0.0
    """What the pass before this one left: the measure of the expected downtime."""
    dirty_rate: float = 0.0
    """Measured over the pass before this one; 0 during the first."""
    throttle: float = 0.0
    lagging: int = 0
    """Passes in a row that left more than half of what they sent."""
    pass_bytes: float = 0.0
    pass_seconds: float = 0.0
    """The pass until now."""
    requests: float = 0.0
    """Pages that the guest touched before they were there (post-copy)."""


def start(load: Load, *, live: bool = True) -> Transfer:
    """A transfer that begins; a guest that is not live stands still, so that one pass is all."""
    phase = Phase.COPY if live else Phase.STOP
    return Transfer(phase=phase, remaining=load.memory, pass_bytes=load.memory)


def due(transfer: Transfer, rate: float) -> float:
    """Seconds until this pass ends at this rate; infinite at rate 0, and when all is done."""
    if transfer.phase is Phase.DONE or rate <= 0:
        return inf
    return transfer.remaining / rate


def advance(transfer: Transfer, load: Load, limits: Limits, rate: float, seconds: float) -> Transfer:
    """The transfer `seconds` later, at `rate` all the while.

    Stops short at a change of phase, because the one who drives the guest must act then: the rest of the time is lost.
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
    """Bytes move for so long; the pass does not end within."""
    whole = seconds >= due(transfer, rate)  # so that rounding never leaves a billionth of a byte
    moved = transfer.remaining if whole else rate * seconds
    copying, stopped = transfer.phase is Phase.COPY, transfer.phase is Phase.STOP
    written = load.dirty_rate * (1 - transfer.throttle) * seconds if copying else 0.0
    missing = transfer.remaining / load.memory if transfer.phase is Phase.POSTCOPY and load.memory else 0.0
    return replace(
        transfer,
        remaining=transfer.remaining - moved,
        sent=transfer.sent + moved,
        dirty=min(load.bound, transfer.dirty + written),
        elapsed=transfer.elapsed + seconds,
        pass_seconds=transfer.pass_seconds + seconds,
        downtime=transfer.downtime + (seconds if stopped else 0.0),
        requests=transfer.requests + load.dirty_rate / PAGE * missing * seconds,
    )


def _end_pass(transfer: Transfer, load: Load, limits: Limits, rate: float) -> Transfer:
    """The pass has sent all that it had."""
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
    """From pre-copy to post-copy: each byte that is not there yet, or not any more, is sent once."""
    owed = min(load.memory, transfer.remaining + transfer.dirty)
    return replace(transfer, phase=Phase.POSTCOPY, remaining=owed, dirty=0.0, pass_bytes=owed, pass_seconds=0.0)


def resume(load: Load, owed: float) -> Transfer:
    """A post-copy that goes on after its stream broke, with so much still to send."""
    return Transfer(phase=Phase.POSTCOPY, remaining=min(owed, load.memory), pass_bytes=owed)


def converges(load: Load, rate: float, max_downtime: float) -> bool:
    """Whether pre-copy at that rate ends by itself, without a throttle."""
    return load.dirty_rate < rate or load.bound <= max(LEAST_STOP, rate * max_downtime)


def progress(transfer: Transfer, load: Load, limits: Limits, rate: float) -> Progress:
    """What a monitor reads: the expected downtime is that of what the last pass left, at the rate of now."""
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
        postcopy_requests=int(transfer.requests),
    )


def max_min(capacity: float, limits: Sequence[float]) -> list[float]:
    """Max-min fair shares of a link: none over its own limit (0: none), and what one leaves goes to the others.

    >>> max_min(100, [10, 0, 0])
    [10, 45.0, 45.0]
    """
    wishes = [limit if limit > 0 else inf for limit in limits]
    shares = [0.0] * len(wishes)
    left, waiting = capacity, len(wishes)
    for index in sorted(range(len(wishes)), key=wishes.__getitem__):
        shares[index] = min(wishes[index], left / waiting)
        left -= shares[index]
        waiting -= 1
    return shares
