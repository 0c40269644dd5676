"""Reads the record of the other host of an attempt, so that decisions rest on it and not on a caller's claim."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

import structlog

from agent.handshake.host.attempt import Attempt
from agent.handshake.host.peer import HandshakePeer
from agent.handshake.host.record_cache import RecordCache
from agent.handshake.host.records import AttemptRecord, Role, state_from_proto
from agent.handshake.machines.decision import NOTHING_FLOWS, destination_yields, source_obeys
from agent.handshake.machines.destination import DestinationState
from agent.handshake.machines.source import SourceEvent, SourceState
from agent.network.uri import MigrationUri
from agent.runtime.errors import DroverError, Reason
from drover.agent.v1 import handshake_pb2 as pb

log = structlog.get_logger()

_UNREACHABLE: Final = frozenset({Reason.HOST_UNREACHABLE, Reason.DEADLINE_EXCEEDED, Reason.UNIMPLEMENTED})
"""Errors of a call that mean that the host itself did not answer. Any other error is an answer."""


NO_RECORD: Final = (Reason.RECORD_NOT_FOUND, Reason.STALE_ATTEMPT)
"""Errors of a host that has no record of the attempt, or none any more."""

READ_SECONDS: Final = 3.0
"""Deadline of reading the record before Perform. The driver waits 5 s for Perform's answer; within that, the record that it relays
must be used instead."""

_S = TypeVar("_S", DestinationState, SourceState)


@dataclass(frozen=True)
class Reading:
    """What is known of the other host's record."""

    record: pb.Record | None
    """None if that host has no record of the attempt, or nothing is known."""
    answered: bool
    """Whether that host itself answered."""
    why: str = ""
    """Why it did not answer, or what is wrong with its answer. Empty if a record was read."""


@dataclass(frozen=True)
class Decision:
    """The decision that a source must obey."""

    event: SourceEvent
    by_statement: bool
    """Whether it rests on an operator's statement instead of the destination's record."""


class PeerRecords:
    """The reader of the other hosts' records. `peer_of` gives the other host of an attempt, None if its agent's address is not
    known; `heard` has what it answered this process with lately."""

    def __init__(self, host: str, peer_of: Callable[[Attempt], HandshakePeer | None], heard: RecordCache) -> None:
        self._host = host
        self._peer_of = peer_of
        self._heard = heard

    async def read(
        self,
        attempt: Attempt,
        relayed: pb.Record | None = None,
        *,
        will_do: Callable[[pb.Record], bool] = lambda _: False,
        within: float | None = None,
    ) -> Reading:
        """Read the other host's record.

        Args:
            relayed: the record as the driver relays it. It counts only if the other host cannot be reached, and if it names the
                attempt, the guest and both hosts.
            will_do: whether a record that the other host answered with lately is enough, so that it is not asked again.
            within: deadline in seconds; by default that of a question (`remote_peer.QUESTION_SECONDS`).
        """
        ours = attempt.record
        heard = self._heard.of(ours)
        if heard is not None and will_do(heard) and not differs(ours, heard, self._host):
            return Reading(heard, answered=True)
        peer = self._peer_of(attempt)
        why = "the address of its agent is not known"
        if peer is not None:
            try:
                async with asyncio.timeout(within):
                    record = (await peer.get_record(pb.GetRecordRequest(ref=ours.ref))).record
            except TimeoutError:
                why = f"{ours.peer_host} did not answer within {within:g} s"
            except DroverError as error:
                if error.reason not in _UNREACHABLE:
                    return Reading(None, answered=True, why=error.message)
                why = error.message
            else:
                if record.host == ours.peer_host:
                    wrong = differs(ours, record, self._host, unnamed=ours.role is Role.DESTINATION)
                    return Reading(None if wrong else record, answered=True, why=wrong)
                why = f"the agent at its address is that of {record.host or 'a host without a name'}"
                if not differs(ours, _renamed(record, ours.peer_host), self._host):
                    return Reading(None, answered=True, why=f"{why}, but has the record of this attempt: the host was renamed")
        if relayed is None or not relayed.host:
            return Reading(None, answered=False, why=why)
        wrong = differs(ours, relayed, self._host)
        if wrong:
            log.warning("a relayed record is not of this attempt", migration=ours.migration_id, why=wrong)
        return Reading(None if wrong else relayed, answered=False, why=f"{why}; {wrong}" if wrong else why)

    async def follow(self, attempt: Attempt) -> None:
        """Watch the other host's record, so that it need not be asked when a call depends on it. Ends with the record, or with the
        first error; then it is asked. Does nothing if this process is the driver, which gets the record anyway.
        """
        peer = self._peer_of(attempt)
        if peer is None or self._heard.of(attempt.record) is not None:
            return
        address, ref = attempt.record.peer_agent, attempt.record.ref
        try:
            async for response in peer.watch_record(pb.WatchRecordRequest(ref=ref)):
                self._heard.note(address, ref, response.record)
        except DroverError as error:
            log.info("the watch of the other host's record has ended", migration=ref.migration_id, error=error.message)
            self._heard.note(address, ref, None)

    async def decision(self, attempt: Attempt, relayed: pb.Record, *, stated_dead: bool) -> Decision:
        """Return what a source that has stopped its guest must do, by the destination's record.

        Raises:
            DroverError: UNDECIDED; NOT_IN_DOUBT for an operator's statement about a destination that answers.
        """
        reading = await self.read(attempt, relayed, will_do=_decides)
        state = _known(DestinationState, reading)
        event = source_obeys(state, answered=reading.answered, stated_dead=stated_dead)
        if event is None:
            stays = f"Guest {attempt.record.domain_name} stays stopped on {self._host} until {attempt.record.peer_host} answers"
            raise self._undecided(attempt, reading, f"{stays} whether it runs there", stated=stated_dead)
        return Decision(event, by_statement=event is SourceEvent.CONFIRM_GONE and state is not DestinationState.GONE)

    async def check_nothing_flows(self, attempt: Attempt, relayed: pb.Record, *, stated_dead: bool) -> bool:
        """Check, by the source's record, that an armed copy may be given up. Return whether only an operator's statement allows it.

        Raises:
            DroverError: UNDECIDED; NOT_IN_DOUBT for an operator's statement about a source that answers.
        """
        reading = await self.read(attempt, relayed)
        state = _known(SourceState, reading)
        if not destination_yields(state, answered=reading.answered, stated_dead=stated_dead):
            stays = f"The copy of guest {attempt.record.domain_name} on {self._host} stays, and starts once all memory has arrived"
            raise self._undecided(attempt, reading, stays, stated=stated_dead)
        return state not in NOTHING_FLOWS

    async def source_sends(self, attempt: Attempt) -> bool:
        """Return whether the source itself answers that it has begun to send."""
        return _known(SourceState, await self.read(attempt)) in (SourceState.PERFORMING, SourceState.PERFORMED)

    async def check_uri(self, attempt: Attempt, uri: MigrationUri, relayed: pb.Record) -> None:
        """Check, by the destination's record, that it listens on `uri` for this attempt, and that its slot allows the transfer.

        Raises:
            DroverError: URI_NOT_ALLOWED, UNDECIDED, BUSY.
        """
        reading = await self.read(attempt, relayed, will_do=_takes_memory, within=READ_SECONDS)
        untouched = f"Nothing was sent, and guest {attempt.record.domain_name} stays on {self._host}"
        if reading.record is None or not reading.record.uri:
            raise self._undecided(attempt, reading, f"{untouched}, as the URI of its copy is not known", stated=False)
        if uri != _parsed(reading.record.uri):
            peer = attempt.record.peer_host
            raise DroverError(
                Reason.URI_NOT_ALLOWED,
                f"migration URI {uri} is refused: {peer} listens on {reading.record.uri} for this attempt. {untouched}",
                metadata={"uri": str(uri), "host": peer},
            )
        if not _takes_memory(reading.record):
            raise only_prepared(attempt.record.peer_host, "incoming", untouched)

    def _undecided(self, attempt: Attempt, reading: Reading, consequence: str, *, stated: bool) -> DroverError:
        peer = attempt.record.peer_host
        finding = f"its record is {state_from_proto(reading.record)}" if reading.record is not None else reading.why
        if reading.answered and stated:
            return DroverError(
                Reason.NOT_IN_DOUBT,
                f"{peer} answers {self._host}, so its record counts and the statement that it is dead does not: {finding}. "
                f"{consequence}",
                metadata={"host": peer},
            )
        asked = f"{peer} answers" if reading.answered else f"{self._host} cannot ask {peer}"
        return DroverError(
            Reason.UNDECIDED,
            f"{asked}, but nothing is decided: {finding}. {consequence}",
            metadata={"host": peer, "answers": "yes" if reading.answered else "no"},
        )


def differs(ours: AttemptRecord, theirs: pb.Record, host: str, *, unnamed: bool = False) -> str:
    """Return, as text, in what `theirs` differs from a record of the other side of `ours`; empty if it is one.

    `unnamed`: a record that names no guest is accepted too, such as that of a source that got Abort before Begin.
    """
    if unnamed and not theirs.domain_uuid and theirs.ref == ours.ref:
        return ""
    named = {
        "attempt": ((theirs.ref.migration_id, theirs.ref.attempt), ours.key),
        "guest": (theirs.domain_uuid, ours.domain_uuid),
        "host": (theirs.host, ours.peer_host),
        "other host": (theirs.peer_host, host),
    }
    wrong = [f"its {what} is {got or 'not given'}, not {want}" for what, (got, want) in named.items() if got != want]
    return "; ".join(wrong)


def _renamed(record: pb.Record, host: str) -> pb.Record:
    renamed = pb.Record()
    renamed.CopyFrom(record)
    renamed.host = host
    return renamed


def _decides(record: pb.Record) -> bool:
    """Return whether this is a destination's record that has ended."""
    return record.state in (pb.RECORD_STATE_RUNNING, pb.RECORD_STATE_GONE)


def _takes_memory(record: pb.Record) -> bool:
    """Return whether a destination listens, with a slot that allows the transfer. Older versions give no cost, and have no other."""
    return bool(record.uri) and (record.slot.transferring or not record.slot.cost)


def only_prepared(host: str, direction: str, untouched: str) -> DroverError:
    """Return the error for a transfer whose slot is only prepared."""
    return DroverError(
        Reason.BUSY,
        f"the {direction} slot of this migration on {host} is only prepared, so no memory may flow yet. {untouched}; ask {host} "
        "for the rest with AcquireSlot (SLOT_KIND_TRANSFERRING), which can wait for it, then repeat the call",
        metadata={"host": host, "limit": f"{direction}_limit"},
        retry_after=1.0,
    )


def _known(states: type[_S], reading: Reading) -> _S | None:
    """Return the state that was read; None without a record, or for a state that is not one of `states` (a newer version's)."""
    state = "" if reading.record is None else state_from_proto(reading.record)
    return states(state) if state in set(states) else None


def _parsed(uri: str) -> MigrationUri | None:
    try:
        return MigrationUri.parse(uri)
    except ValueError:
        return None
