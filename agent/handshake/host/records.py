"""The durable record of one attempt on one host, and its conversion to the wire.

An `AttemptRecord` is a value: every change makes a new one, which is in the journal before it is used.
"""

import time
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Final, cast

import msgspec

from agent.handshake.machines.destination import DESTINATION, DestinationState
from agent.handshake.machines.machine import Refused
from agent.handshake.machines.source import SOURCE, SourceState
from agent.hypervisor.base import Stored
from agent.hypervisor.guest_fact import GuestFact, fact_to_proto
from agent.hypervisor.options import Options, Value
from agent.runtime.errors import DroverError, Reason
from agent.runtime.events import RecordChanged
from agent.runtime.failure import Failure, failure_to_proto
from agent.runtime.wire import cut, duration, enum_name, timestamp
from agent.transfer.progress import Progress
from drover.agent.v1 import handshake_pb2 as pb


class Role(StrEnum):
    SOURCE = "source"
    DESTINATION = "destination"


MACHINES: Mapping[Role, Any] = {Role.SOURCE: SOURCE, Role.DESTINATION: DESTINATION}


_HOLDS_SLOT: Final[Mapping[Role, frozenset[str]]] = {
    # The guest's last bytes may still be on their way in the states after these, but nothing is left to send.
    Role.SOURCE: frozenset({SourceState.BEGINNING, SourceState.BEGUN, SourceState.PERFORMING}),
    Role.DESTINATION: frozenset(DestinationState) - DESTINATION.final,
}


class Statement(msgspec.Struct, frozen=True):
    """An operator's statement that a host is dead. It replaces that host's record, as long as that host does not answer."""

    dead_host: str
    reason: str
    said_by: str
    time: float

    @classmethod
    def of(cls, message: pb.Statement) -> "Statement":
        stated = message.say_time.ToNanoseconds() / 1e9 if message.HasField("say_time") else time.time()
        return cls(message.dead_host, message.reason, message.said_by, stated)

    def to_proto(self) -> pb.Statement:
        return pb.Statement(dead_host=self.dead_host, reason=self.reason, said_by=self.said_by, say_time=timestamp(self.time))

    def failure(self) -> Failure:
        return Failure(
            Reason.DECLARED_DEAD,
            f"{self.said_by} stated that {self.dead_host} is dead: {self.reason}",
            {"dead_host": self.dead_host, "said_by": self.said_by},
        )


class BandwidthClaim(msgspec.Struct, frozen=True):
    """See the message on the wire."""

    most: int = 0
    least: int = 0
    importance: int = 0
    network: str = ""
    network_rules: bytes = b""
    """Serialized; empty: none."""

    @classmethod
    def of(cls, message: pb.BandwidthClaim) -> "BandwidthClaim":
        rules = message.network_rules.SerializeToString(deterministic=True)
        return cls(message.max_bytes_per_second, message.min_bytes_per_second, message.importance, message.network, rules)


class Timing(msgspec.Struct, frozen=True):
    """The time of one phase on one host, and of the hypervisor calls in it, in seconds; `start` is of the host's wall clock."""

    phase: str
    start: float
    duration: float
    hypervisor: float


class AttemptRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt on one host. The fields in `SECRETS` are not journalled: no state needs them after a restart of the agent."""

    migration_id: str
    attempt: int
    role: Role
    state: str
    host: str = ""
    """This host's name when the record was made. Empty if an older version made it, or the attempt never reached this host."""
    domain_name: str = ""
    domain_uuid: str = ""
    destination_name: str = ""
    peer_host: str = ""
    peer_agent: str = ""
    options: dict[str, Value] = {}
    epoch: int = 0
    """Epoch of the slot on this host."""
    transferring: bool = True
    """Whether the slot allows the transfer."""
    cost: int = 1
    """Units of the limit that the slot takes."""
    expires: float = 0.0
    """When the lease ends, by the wall clock; destination only."""
    had_definition: bool = False
    """Whether a definition of the guest was stored here before; destination only."""
    domain_xml: str = ""
    stored: Stored | None = None
    autostart: bool = False
    """Whether the guest had autostart on at the source before Begin; the host on which it stays sets it again."""
    paused_by_user: bool = False
    """See the field of `Record` on the wire."""
    aftercare: bool = False
    """Whether settings of the guest have yet to be restored here after the end (`aftercare`): resumed after a restart."""
    uri: str = ""
    listen: str = ""
    """This host's migration address, at which the guest's memory arrives; destination only."""
    proved: str = ""
    """The destination's migration address, once the path to it was proved; source only."""
    bandwidth: int = 0
    claim: BandwidthClaim | None = None
    """What the driver said of its migration's claim to bandwidth. Source only."""
    max_downtime: float = 0.0
    """Seconds; 0: the hypervisor's default. Source only."""
    cookies: dict[str, bytes] = {}
    """By the phase that returned them."""
    requests: dict[str, str] = {}
    """By phase: the digest of the request that began it."""
    request_ids: dict[str, str] = {}
    """By phase: the id of that request."""
    failure: Failure | None = None
    statement: Statement | None = msgspec.field(default=None, name="operator_word")
    settled: bool = False
    """Whether the source has ended too, so that it will never ask for this record again; destination only."""
    waiting_for: str = ""
    timings: tuple[Timing, ...] = ()
    seen: GuestFact | None = None
    """The guest's state as the hypervisor reported it last. Journalled with the next change: no decision rests on it."""
    created: float = msgspec.field(default_factory=time.time)
    updated: float = 0.0
    revision: int = 0

    @property
    def key(self) -> tuple[str, int]:
        return self.migration_id, self.attempt

    @property
    def ref(self) -> pb.AttemptRef:
        return pb.AttemptRef(migration_id=self.migration_id, attempt=self.attempt)

    @property
    def final(self) -> bool:
        return self.state in MACHINES[self.role].final

    @property
    def holds_slot(self) -> bool:
        """Whether it takes a slot of this host."""
        return self.state in _HOLDS_SLOT[self.role]

    @property
    def user_options(self) -> Options:
        return cast(Options, self.options)

    def event(self, was: str) -> RecordChanged:
        """Return the event that tells of this record; `was` is the state of the one before."""
        return RecordChanged(
            self.migration_id,
            self.attempt,
            role=self.role,
            state=self.state,
            was=was,
            peer_host=self.peer_host,
            domain_uuid=self.domain_uuid,
            waiting_for=self.waiting_for,
            reason=self.failure.reason if self.failure is not None else "",
        )

    def changed(self, **changes: Any) -> "AttemptRecord":
        """Return a new record with the next revision. One that ends drops what only a running migration needs."""
        new = msgspec.structs.replace(self, **changes, revision=self.revision + 1, updated=time.time())
        if new.final and not self.final:
            # A driver that lost Finish's answer still needs its cookie. Digests are of requests that contain secrets.
            kept = {phase: cookie for phase, cookie in new.cookies.items() if phase == "finish"}
            new = msgspec.structs.replace(new, domain_xml="", stored=None, cookies=kept, requests={}, request_ids={})
        if new.state in (SourceState.REMOVED, DestinationState.GONE):
            new = msgspec.structs.replace(new, aftercare=False)  # no guest of this attempt is here
        return new


LISTENS: Final = frozenset({DestinationState.PREPARED, DestinationState.ARMED, DestinationState.RUNNING})
"""States of a destination whose URI is known with its port."""


def wire_state(record: AttemptRecord) -> pb.RecordState.ValueType:
    return pb.RecordState.Value(f"RECORD_STATE_{record.state.upper()}")


def state_from_proto(record: pb.Record) -> str:
    """Return the state as in `SourceState` and `DestinationState`; ``state 99`` for one that this version does not know."""
    return enum_name(pb.RecordState, record.state)


def timing_to_proto(timing: Timing) -> pb.PhaseTiming:
    return pb.PhaseTiming(
        phase=timing.phase,
        start_time=timestamp(timing.start),
        duration=duration(timing.duration),
        hypervisor_duration=duration(timing.hypervisor),
    )


def progress_to_proto(progress: Progress) -> pb.Progress:
    return pb.Progress(
        iteration=progress.iteration,
        total_bytes=progress.total_bytes,
        processed_bytes=progress.processed_bytes,
        remaining_bytes=progress.remaining_bytes,
        bytes_per_second=progress.rate,
        dirty_bytes_per_second=progress.dirty_rate,
        downtime=duration(progress.downtime),
        elapsed=duration(progress.elapsed),
        post_copy=progress.postcopy,
    )


def record_to_proto(record: AttemptRecord, host: str, progress: pb.Progress | None = None) -> pb.Record:
    """Convert to the wire, without cookies and XML. `host`: this host's name."""
    message = pb.Record(
        ref=record.ref,
        host=host,
        state=wire_state(record),
        domain_name=record.domain_name,
        domain_uuid=record.domain_uuid,
        peer_host=record.peer_host,
        timings=[timing_to_proto(t) for t in record.timings],
        revision=record.revision,
        waiting_for=cut(record.waiting_for, 1024),
        create_time=timestamp(record.created),
        update_time=timestamp(record.updated),
        paused_by_user=record.paused_by_user,
    )
    if record.failure is not None:
        message.failure.CopyFrom(failure_to_proto(record.failure))
    if record.statement is not None:
        message.statement.CopyFrom(record.statement.to_proto())
    if record.seen is not None:
        message.guest.CopyFrom(fact_to_proto(record.seen))
    if record.epoch:
        message.slot.epoch, message.slot.transferring, message.slot.cost = record.epoch, record.transferring, record.cost
    if record.role is Role.DESTINATION:
        message.slot.expire_time.CopyFrom(timestamp(record.expires))
        message.uri = record.uri if record.state in LISTENS else ""
    if progress is not None:
        message.progress.CopyFrom(progress)
    return message


def wrong_phase(record: AttemptRecord, refused: Refused, allowed: list[str]) -> DroverError:
    """Return the error for a call that the record's state does not allow."""
    state = refused.state or "unknown here"
    return DroverError(
        Reason.WRONG_PHASE,
        f"{refused.event} is not allowed now: attempt {record.attempt} of migration {record.migration_id} is {state} on this "
        f"{record.role}, and allows {', '.join(allowed) if allowed else 'no call that changes it'}",
        metadata={"state": state, "event": refused.event, "allowed": ",".join(allowed), "role": record.role.value},
    )


SECRETS: Mapping[str, Any] = {"domain_xml": "", "stored": None, "cookies": {}}
"""Fields with passwords of the guest (XML, and libvirt's cookies, which contain XML), and what is journalled instead."""


def encode(record: AttemptRecord) -> bytes:
    """Encode for the journal, without `SECRETS`."""
    return msgspec.msgpack.encode(msgspec.structs.replace(record, **SECRETS))


def decode(data: bytes) -> AttemptRecord:
    return msgspec.msgpack.decode(data, type=AttemptRecord)
