"""The last state of a guest that a hypervisor reported: the only basis for a statement to users about where a guest runs."""

import time
from enum import StrEnum

import msgspec
from google.protobuf.timestamp_pb2 import Timestamp

from agent.hypervisor.base import RESUMED, Domain, DomainEvent, DomainState
from drover.agent.v1 import handshake_pb2 as pb
from drover.agent.v1 import host_pb2

_SILENCE_CHARACTERS = 120


class GuestState(StrEnum):
    """The states of `GuestState` on the wire."""

    RUNNING = "running"
    PAUSED = "paused"
    WAITING = "waiting"
    """A copy that waits for its stream and has never run."""
    SHUTOFF = "shutoff"
    CRASHED = "crashed"
    ABSENT = "absent"
    OTHER = "other"


_STATES = {
    DomainState.RUNNING: GuestState.RUNNING,
    DomainState.PAUSED: GuestState.PAUSED,
    DomainState.SHUTOFF: GuestState.SHUTOFF,
    DomainState.CRASHED: GuestState.CRASHED,
}

NO_PROCESS = frozenset({GuestState.SHUTOFF, GuestState.CRASHED, GuestState.ABSENT})
"""States in which the guest has no process on the host."""


class GuestFact(msgspec.Struct, frozen=True):
    """One report of a hypervisor about a guest, perhaps with a failed question after it (`silence`)."""

    state: GuestState
    reason: str = ""
    time: float = 0.0
    """When the hypervisor reported it, by this host's wall clock."""
    silence: str = ""
    """Why the hypervisor does not answer now; `state` is then its last report. Empty: it answered."""


def fact_of(domain: Domain | None, *, arriving: bool = False) -> GuestFact:
    """Return the fact in a hypervisor's answer. `domain`: None if the host does not have the guest. `arriving`: it is the copy of
    a destination that is not RUNNING yet.
    """
    now = time.time()
    if domain is None:
        return GuestFact(GuestState.ABSENT, "", now)
    # The incoming job still holds a copy for a moment after its start, and in post-copy for long.
    if (domain.incoming and domain.state is not DomainState.RUNNING) or (arriving and domain.never_started):
        return GuestFact(GuestState.WAITING, domain.reason, now)
    if domain.state is DomainState.SHUTOFF and domain.reason == "crashed":
        return GuestFact(GuestState.CRASHED, domain.reason, now)
    return GuestFact(_STATES.get(domain.state, GuestState.OTHER), domain.reason, now)


_REASONS = {"migrated": "migration", "paused": "user"}
"""From the detail of libvirt's event to the reason that libvirt gives with the guest's state, where they differ."""


def fact_of_event(event: DomainEvent) -> GuestFact | None:
    """Return the fact in an event of the hypervisor; None for an event that says nothing about the guest's state."""
    reason, now = _REASONS.get(event.detail, event.detail), time.time()
    match event.kind:
        case "stopped":
            died = event.detail in ("crashed", "failed")  # libvirt's event has "failed" for a process that died
            return GuestFact(GuestState.CRASHED, "crashed", now) if died else GuestFact(GuestState.SHUTOFF, event.detail, now)
        case "suspended":
            return GuestFact(GuestState.PAUSED, reason, now)
        case kind if kind == RESUMED:
            return GuestFact(GuestState.RUNNING, reason, now)
        case _:
            return None


def silent(before: GuestFact | None, error: Exception) -> GuestFact | None:
    """Return the fact after the hypervisor failed to answer: the one before with `error` as its silence; None if there was none."""
    if before is None:
        return None
    return msgspec.structs.replace(before, silence=str(error)[:_SILENCE_CHARACTERS] or type(error).__name__)


def fact_to_proto(fact: GuestFact) -> pb.GuestFact:
    seen = Timestamp()
    seen.FromNanoseconds(int(fact.time * 1e9))
    state = pb.GuestState.Value(f"GUEST_STATE_{fact.state.upper()}")
    return pb.GuestFact(state=state, reason=fact.reason[:60], see_time=seen, silence=fact.silence)


_OF_DOMAIN = {
    host_pb2.DOMAIN_STATE_RUNNING: pb.GUEST_STATE_RUNNING,
    host_pb2.DOMAIN_STATE_PAUSED: pb.GUEST_STATE_PAUSED,
    host_pb2.DOMAIN_STATE_SHUTOFF: pb.GUEST_STATE_SHUTOFF,
    host_pb2.DOMAIN_STATE_CRASHED: pb.GUEST_STATE_CRASHED,
}


def fact_of_description(domain: host_pb2.Domain) -> pb.GuestFact:
    """Return the fact in an agent's description of a guest, which is as old as its answer."""
    fact = pb.GuestFact(state=_OF_DOMAIN.get(domain.state, pb.GUEST_STATE_OTHER), reason=domain.reason[:60])
    fact.see_time.GetCurrentTime()
    return fact
