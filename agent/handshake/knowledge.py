"""What a driver knows of its attempt: the records as last heard, who is silent, and what was said about them."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import structlog

from agent.errors import DroverError, Reason
from agent.handshake.decide import assume, disputed, ended
from agent.handshake.destination import DestinationState as Dst
from agent.handshake.records import Failure, state_from_proto
from agent.handshake.source import SourceState as Src
from drover.agent.v1 import handshake_pb2 as pb

log = structlog.get_logger()

_LEFT: Final = frozenset({Src.PERFORMED, Src.LOST, Src.REMOVING, Src.REMOVED, Src.RESUMING})
"""The guest may not run at the source any more, or not yet again."""


@dataclass(frozen=True)
class Parties:
    """Who takes part, by what the driver was asked for."""

    source: str
    destination: str
    domain_uuid: str


VOUCHED_SECONDS: Final = 30.0
"""For which a host counts as alive that another one has heard. Longer than a driver needs to ask again."""

_NO_ANSWER: Final = frozenset({Reason.HOST_UNREACHABLE, Reason.DEADLINE_EXCEEDED})
"""Errors that say that nobody answered."""


class StateUnknownError(DroverError):
    """A host answered with a record in a state that this version does not know. Nothing may be concluded from it."""

    def __init__(self, side: str, record: pb.Record) -> None:
        super().__init__(
            Reason.PROTOCOL_MISMATCH,
            f"the {side} says that it is in {state_from_proto(record)}, which this version does not know. Nothing is done about it "
            "here; it is asked again. Update this side too",
        )


class Knowledge:
    """`on_change` is called after every change of what is known; sides are named ``source`` and ``destination``."""

    def __init__(self, ref: pb.AttemptRef, parties: Parties | None, on_change: Callable[[], None]) -> None:
        self.ref = ref
        self.foreign: DroverError | None = None
        """MIGRATION_EXISTS, once a record turned out to be of another migration with this id: nothing more is to be called."""
        self._parties = parties
        self.source_record: pb.Record | None = None
        self.destination_record: pb.Record | None = None
        self.failure: Failure | None = None
        self.cancelling = False
        self.waiting_for = ""
        self.silent_since: dict[str, float] = {}
        """Sides that do not answer at all, and since when by `time.monotonic`."""
        self._vouched: dict[str, float] = {}
        self.words: dict[str, pb.OperatorWord] = {}
        """Sides that were declared dead, and have not answered since."""
        self.hypervisor_calls: dict[str, list[tuple[float, float]]] = {"source": [], "destination": []}
        """Of each side: beginning and end of each phase's call of its hypervisor, by this process's monotonic clock."""
        self._wall_offsets: dict[str, float] = {}
        """Of each side: its wall clock less this process's monotonic one, when it answered the first call of this driver."""
        self._on_change = on_change
        self._wake = asyncio.Event()

    @property
    def source_state(self) -> Src | None:
        return Src(state_from_proto(self.source_record)) if self.source_record is not None else None

    @property
    def destination_state(self) -> Dst | None:
        return Dst(state_from_proto(self.destination_record)) if self.destination_record is not None else None

    @property
    def states(self) -> tuple[Src | None, Dst | None]:
        """What to act on: the records, but for sides that were declared dead."""
        dead = self.words.keys() & self.silent_since.keys()
        return assume(
            self.source_state, self.destination_state, source_dead="source" in dead, destination_dead="destination" in dead
        )

    @property
    def by_word(self) -> bool:
        """The source's record carries an operator's word."""
        return self.source_record is not None and self.source_record.HasField("operator_word")

    @property
    def disputed(self) -> bool:
        """See `decide.disputed`."""
        return disputed(*self.states, by_word=self.by_word)

    @property
    def ended(self) -> bool:
        return ended(*self.states)

    def declare_dead(self, side: str, word: pb.OperatorWord) -> None:
        """Go on without the word of a side that does not answer. If it answers before the end, the statement is refuted for good."""
        self.words[side] = word
        self._changed()

    @property
    def outcome_unknown(self) -> bool:
        """The guest is paused at the source and the destination, which alone knows, does not answer (or the other way round)."""
        if self.states[1] in (Dst.RUNNING, Dst.GONE) or not self.silent_since or self.words:
            return False
        return self.source_state in _LEFT or {"source", "destination"} <= self.silent_since.keys()

    @property
    def hangs_on(self) -> str:
        """The side whose death would settle an unknown outcome. Empty where both are silent: it may well be this driver that is cut
        off, and the guest may run on as before.
        """
        side = next(iter(self.silent_since)) if self.outcome_unknown and len(self.silent_since) == 1 else ""
        return "" if self.is_vouched_for(side) else side

    def vouched_for(self, side: str) -> None:
        """The other host says that it hears this side: it is this driver that is cut off from it."""
        self._vouched[side] = time.monotonic()

    def is_vouched_for(self, side: str) -> bool:
        return time.monotonic() - self._vouched.get(side, float("-inf")) < VOUCHED_SECONDS

    def cancel(self, failure: Failure) -> None:
        """Stop if it is not too late; the records say what came of it. The first reason is kept."""
        self.failure = self.failure or failure
        self.cancelling = True
        self._changed()

    def _changed(self) -> None:
        self._wake.set()
        self._on_change()

    def saw_source(self, record: pb.Record) -> None:
        """The source answered; an answer that was overtaken by a newer one changes nothing. Raises `StateUnknownError`."""
        if state_from_proto(record) not in set(Src):
            raise StateUnknownError("source", record)
        if self._is_of_another(record, "source"):
            return
        if self.source_record is None or record.revision >= self.source_record.revision:
            self.source_record = record
            self._time_calls("source", record)
        self.heard("source")
        self._changed()

    def saw_destination(self, record: pb.Record) -> None:
        """Likewise."""
        if state_from_proto(record) not in set(Dst):
            raise StateUnknownError("destination", record)
        if self._is_of_another(record, "destination"):
            return
        if self.destination_record is None or record.revision >= self.destination_record.revision:
            self.destination_record = record
            self._time_calls("destination", record)
        self.heard("destination")
        self._changed()

    def _time_calls(self, side: str, record: pb.Record) -> None:
        """Lay the calls that have ended since the last word of a side on this process's clock: the last one has ended just now.

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
        """Compare a side's wall clock, where it has just changed its record and answered with it: one that was not seen yet."""
        known = self.source_record if side == "source" else self.destination_record
        if known is not None and record.revision <= known.revision:
            return  # the answer to a call that joined: the record may have been changed long ago
        if record.HasField("update_time"):
            self._wall_offsets.setdefault(side, record.update_time.ToNanoseconds() / 1e9 - time.monotonic())

    @property
    def clock_skew(self) -> float:
        """Seconds by which the destination's wall clock is ahead of the source's; 0 where that is not known."""
        offsets = self._wall_offsets
        return offsets["destination"] - offsets["source"] if len(offsets) == 2 else 0.0

    def _is_of_another(self, record: pb.Record, side: str) -> bool:
        """A record names its guest and the other host, unless the attempt was given up before it got there."""
        if self._parties is None:
            return False
        host, peer = self._parties.source, self._parties.destination
        if side == "destination":
            host, peer = peer, host
        named = ((record.peer_host, peer, "the other host"), (record.domain_uuid, self._parties.domain_uuid, "the guest"))
        differs = [f"{what} is {got}, not {wanted}" for got, wanted, what in named if got and got != wanted]
        if differs:
            text = f"{host} knows migration {record.ref.migration_id} as another one: {'; '.join(differs)}"
            self.is_foreign(DroverError(Reason.MIGRATION_EXISTS, f"{text}. Nothing more was done; choose a new UUID"))
        return bool(differs)

    def is_foreign(self, error: DroverError) -> None:
        """Stop: the id is another migration's, which goes on as it was."""
        self.foreign = self.foreign or error
        self.failure = self.failure or Failure.of(error)
        self._changed()

    def refuted(self, side: str) -> None:
        """A side that was declared dead answers the other host: the statement does not count."""
        if self.words.pop(side, None) is not None:
            log.warning("a host that was declared dead answers the other one", migration=self.ref.migration_id, side=side)

    def silent_for(self, side: str) -> float:
        """Seconds for which a side has not answered; 0 for one that does."""
        since = self.silent_since.get(side)
        return 0.0 if since is None else time.monotonic() - since

    def heard(self, side: str) -> None:
        """It answers, whatever it says: it is neither silent nor dead."""
        if self.silent_since.pop(side, None) is not None and not self.silent_since:
            self.waiting_for = ""
        if self.words.pop(side, None) is not None:
            log.warning("a host that was declared dead answers", migration=self.ref.migration_id, side=side)

    def missed(self, side: str, error: DroverError) -> None:
        """A question to it, or a call, failed: there was no answer, or the answer was an error."""
        if error.reason in _NO_ANSWER:
            self.silent_since.setdefault(side, time.monotonic())
        else:
            self.heard(side)
        self.waiting_for = f"{error.message} (trying again)"
        self._on_change()
