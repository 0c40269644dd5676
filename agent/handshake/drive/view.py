"""What a driver knows of its attempt: both records as last read, which hosts are silent, and statements about dead hosts."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

from agent.handshake.host.records import state_from_proto
from agent.handshake.machines.decide import assume, disputed, ended
from agent.handshake.machines.destination import DestinationState as Dst
from agent.handshake.machines.source import SourceState as Src
from agent.runtime.errors import DroverError, Reason
from agent.runtime.events import Bus, StatementChanged
from agent.runtime.failure import Failure
from drover.agent.v1 import handshake_pb2 as pb
from drover.agent.v1 import migration_pb2

_LEFT: Final = frozenset({Src.PERFORMED, Src.LOST, Src.REMOVING, Src.REMOVED, Src.RESUMING})
"""States in which the guest does not run at the source any more, or not yet again."""


@dataclass(frozen=True)
class Parties:
    """The hosts and the guest of the migration, as requested from the driver."""

    source: str
    destination: str
    domain_uuid: str


VOUCHED_SECONDS: Final = 30.0
"""How long a host counts as alive after the other host reported an answer from it. Longer than a driver needs to ask again."""

_NO_ANSWER: Final = frozenset({Reason.HOST_UNREACHABLE, Reason.DEADLINE_EXCEEDED})
"""Errors that mean that the host did not answer."""


def statement_event(migration_id: str, statement: pb.Statement, change: Literal["made", "refuted"]) -> StatementChanged:
    said_by, text = statement.said_by, statement.reason
    return StatementChanged(migration_id, change=change, dead_host=statement.dead_host, said_by=said_by, message=text)


class StateUnknownError(DroverError):
    """A record is in a state that this version does not know. Nothing may be concluded from it."""

    def __init__(self, side: str, record: pb.Record) -> None:
        super().__init__(
            Reason.PROTOCOL_MISMATCH,
            f"the {side} reports {state_from_proto(record)}, which this version of Drover does not know, so nothing is decided; the "
            f"{side} is asked again. Upgrade Drover on this side too",
        )


class View:
    """What is known of one attempt. Sides are named ``source`` and ``destination``. `on_change` is called after every change."""

    def __init__(self, ref: pb.AttemptRef, parties: Parties | None, on_change: Callable[[], None], bus: Bus) -> None:
        self.ref = ref
        self.about = ref.migration_id, ref.attempt
        self._bus = bus
        self.foreign: DroverError | None = None
        """MIGRATION_EXISTS once a record turned out to be of another migration with this id; then no more calls are made."""
        self.parties = parties
        self.source_record: pb.Record | None = None
        self.destination_record: pb.Record | None = None
        self.uri = ""
        """The destination's migration URI, once Prepare has answered."""
        self.path: pb.BeginResponse | None = None
        """Begin's answer, which says what was measured of the path."""
        self.failure: Failure | None = None
        self.cancelling = False
        self.waiting_for = ""
        self.wait: migration_pb2.Wait | None = None
        """The slot that it waits for; None: none."""
        self.held_up: migration_pb2.WaitReason.ValueType = migration_pb2.WAIT_REASON_UNSPECIFIED
        """What else than a slot it waits for before it asks for slots."""
        self.alternatives: tuple[str, ...] = ()
        """Hosts that could take the guest now, while it waits for a slot."""
        self.silent_since: dict[str, float] = {}
        """Sides that do not answer at all, with the time of the first missed answer by `time.monotonic`."""
        self.overtaken: set[str] = set()
        """Sides that answered STALE_ATTEMPT to the question for their record: see `decide.assume`."""
        self._vouched: dict[str, float] = {}
        self.statements: dict[str, pb.Statement] = {}
        """Statements about sides that were declared dead and have not answered since."""
        self.hypervisor_calls: dict[str, list[tuple[float, float]]] = {"source": [], "destination": []}
        """For each side: start and end of each phase's hypervisor call, by this process's monotonic clock."""
        self._wall_offsets: dict[str, float] = {}
        """For each side: its wall clock minus this process's monotonic clock, at its first answer that `read_clock` could use."""
        self._on_change = on_change
        self.news = asyncio.Event()
        """Set by every change; the driver clears it before it decides."""

    @property
    def source_state(self) -> Src | None:
        return Src(state_from_proto(self.source_record)) if self.source_record is not None else None

    @property
    def destination_state(self) -> Dst | None:
        return Dst(state_from_proto(self.destination_record)) if self.destination_record is not None else None

    @property
    def states(self) -> tuple[Src | None, Dst | None]:
        """The states to act on: those of the records, corrected by `assume` for sides that are silent and declared dead."""
        return assume(
            self.source_state,
            self.destination_state,
            source_dead=self.is_dead("source"),
            destination_dead=self.is_dead("destination"),
            overtaken=self.overtaken,
        )

    @property
    def by_statement(self) -> bool:
        """Whether the source's record carries an operator's statement."""
        return self.source_record is not None and self.source_record.HasField("statement")

    @property
    def disputed(self) -> bool:
        """See `decide.disputed`."""
        return disputed(*self.states, by_statement=self.by_statement)

    @property
    def ended(self) -> bool:
        return ended(*self.states)

    @property
    def untouched(self) -> bool:
        """Whether neither host is known to have a record, so that the slot has yet to be reserved."""
        return self.source_record is None and self.destination_record is None

    def declare_dead(self, side: str, statement: pb.Statement) -> None:
        """Go on without a side that does not answer. If it answers before the end, the statement is dropped for good."""
        self.statements[side] = statement
        self._changed()

    def is_dead(self, side: str) -> bool:
        """Whether a side does not answer and was declared dead."""
        return side in self.silent_since and side in self.statements

    @property
    def outcome_unknown(self) -> bool:
        """Whether it is unknown where the guest runs: no decision is known, a host is silent and none is declared dead, and either
        the guest has stopped at the source (as last known) or both hosts are silent.
        """
        if self.states[1] in (Dst.RUNNING, Dst.GONE) or not self.silent_since or self.statements:
            return False
        return self.source_state in _LEFT or {"source", "destination"} <= self.silent_since.keys()

    @property
    def decisive_side(self) -> str:
        """The side whose death would settle an unknown outcome. Empty if both are silent, or the other host hears it: then this
        driver may be the one that is cut off, and the guest may run on as before.
        """
        side = next(iter(self.silent_since)) if self.outcome_unknown and len(self.silent_since) == 1 else ""
        return "" if self.is_reported_alive(side) else side

    def reported_alive(self, side: str) -> None:
        """Note that the other host hears this side, so that it is this driver that is cut off from it."""
        self._vouched[side] = time.monotonic()

    def is_reported_alive(self, side: str) -> bool:
        return time.monotonic() - self._vouched.get(side, float("-inf")) < VOUCHED_SECONDS

    def cancel(self, failure: Failure) -> None:
        """Request a cancel, which has an effect only before the commit; the records show the outcome. Keeps the first failure."""
        self.failure = self.failure or failure
        self.cancelling = True
        self._changed()

    def _changed(self) -> None:
        self.news.set()
        self._on_change()

    def waits(self, wait: migration_pb2.Wait | None) -> None:
        """Note the slot that it waits for; None: it waits no more."""
        if wait != self.wait:
            self.wait = wait
            self._on_change()

    def saw_source(self, record: pb.Record) -> None:
        """Take an answer of the source. Keeps the newest revision of its record. Raises `StateUnknownError`."""
        if state_from_proto(record) not in set(Src):
            raise StateUnknownError("source", record)
        if self._is_of_another(record, "source"):
            return
        if self.source_record is None or record.revision >= self.source_record.revision:
            self.source_record = record
            self._time_calls("source", record)
        self.answered("source")
        self._changed()

    def saw_destination(self, record: pb.Record) -> None:
        """Take an answer of the destination, as `saw_source`."""
        if state_from_proto(record) not in set(Dst):
            raise StateUnknownError("destination", record)
        if self._is_of_another(record, "destination"):
            return
        if self.destination_record is None or record.revision >= self.destination_record.revision:
            self.destination_record = record
            self._time_calls("destination", record)
        self.answered("destination")
        self._changed()

    def _time_calls(self, side: str, record: pb.Record) -> None:
        """Add the calls that ended since a side's last answer to `hypervisor_calls`, on the assumption that the last ended just now.

        The wall clocks of two hosts need not agree, and each may be set at any moment, so nothing is computed from them.
        """
        known, end = self.hypervisor_calls[side], time.monotonic()
        calls: list[tuple[float, float]] = []
        for timing in reversed(record.timings[len(known) :]):
            begin = end - timing.hypervisor_duration.ToNanoseconds() / 1e9
            calls.insert(0, (begin, end))
            end = begin
        known.extend(calls)

    def read_clock(self, side: str, record: pb.Record) -> None:
        """Compare a side's wall clock with this process's clock, if it changed its record for this call: the revision is new."""
        known = self.source_record if side == "source" else self.destination_record
        if known is not None and record.revision <= known.revision:
            return  # the call joined a phase: the record may have been changed long ago
        if record.HasField("update_time"):
            self._wall_offsets.setdefault(side, record.update_time.ToNanoseconds() / 1e9 - time.monotonic())

    @property
    def clock_skew(self) -> float:
        """Seconds by which the destination's wall clock is ahead of the source's; 0 if unknown."""
        offsets = self._wall_offsets
        return offsets["destination"] - offsets["source"] if len(offsets) == 2 else 0.0

    def _is_of_another(self, record: pb.Record, side: str) -> bool:
        """Return whether a record names another guest or other host than was requested; then `foreign` is set. Empty names, of an
        attempt that was given up before it reached that host, count as the same.
        """
        if self.parties is None:
            return False
        host, peer = self.parties.source, self.parties.destination
        if side == "destination":
            host, peer = peer, host
        named = ((record.peer_host, peer, "the other host"), (record.domain_uuid, self.parties.domain_uuid, "the guest"))
        differs = [f"{what} is {got}, not {wanted}" for got, wanted, what in named if got and got != wanted]
        if differs:
            text = f"the record of migration {record.ref.migration_id} on {host} is of another migration: {'; '.join(differs)}"
            self.is_foreign(DroverError(Reason.MIGRATION_EXISTS, f"{text}. Nothing more was done; choose a new UUID"))
        return bool(differs)

    def is_foreign(self, error: DroverError) -> None:
        """Stop driving, as the id belongs to another migration, which is left as it is."""
        self.foreign = self.foreign or error
        self.failure = self.failure or Failure.of(error)
        self._changed()

    def drop_statement(self, side: str) -> None:
        """Drop the statement about a side that was declared dead, as it answers here or to the other host."""
        if (statement := self.statements.pop(side, None)) is not None:
            self._bus.publish(statement_event(self.ref.migration_id, statement, "refuted"))

    def silent_for(self, side: str) -> float:
        """Return for how many seconds a side has not answered; 0 if it answers."""
        since = self.silent_since.get(side)
        return 0.0 if since is None else time.monotonic() - since

    def answered(self, side: str) -> None:
        """Note that a side has answered, with an error or not: it is neither silent nor dead."""
        if self.silent_since.pop(side, None) is not None and not self.silent_since:
            self.waiting_for = ""
        self.drop_statement(side)

    def call_failed(self, side: str, error: DroverError) -> None:
        """Note that a call to a side failed: it did not answer, or answered with an error."""
        if error.reason in _NO_ANSWER:
            self.silent_since.setdefault(side, time.monotonic())
        else:
            self.answered(side)
        self.waiting_for = f"{error.message} (retrying)"
        self._on_change()
