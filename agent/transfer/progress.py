"""What a hypervisor reports of a running transfer."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """One reading of a running transfer. A field is zero where the hypervisor does not report it."""

    elapsed: float = 0.0
    iteration: int = 0
    """1 is the first pass over the memory."""
    total_bytes: int = 0
    processed_bytes: int = 0
    remaining_bytes: int = 0
    rate: int = 0
    """Bytes per second on the wire."""
    dirty_rate: int = 0
    """Bytes per second that the guest dirties; 0 during the first iteration."""
    downtime: float = 0.0
    """The expected downtime while the transfer runs; the measured one at its end."""
    postcopy: bool = False
