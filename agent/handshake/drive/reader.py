"""Reads the records of both hosts of an attempt for its driver."""

import asyncio
import contextlib
from collections.abc import Callable, Mapping

from agent.handshake.drive.calls import Calls
from agent.handshake.drive.view import View
from agent.handshake.host.peer import HandshakePeer
from agent.handshake.host.records import state_from_proto
from agent.handshake.machines.destination import DestinationState as Dst
from agent.handshake.machines.source import SourceState as Src
from agent.runtime.backoff import OTHER_HOST, Clock, Pauses
from agent.runtime.errors import DroverError, Reason
from drover.agent.v1 import handshake_pb2 as pb


class Reader:
    """The part of a driver that asks both hosts for their records, and tells its view."""

    def __init__(self, view: View, calls: Calls, source: HandshakePeer, destination: HandshakePeer, clock: Clock) -> None:
        self.view = view
        self.calls = calls
        self.clock = clock
        self._sides: Mapping[str, tuple[HandshakePeer, Callable[[pb.Record], None]]] = {
            "source": (source, view.saw_source),
            "destination": (destination, view.saw_destination),
        }

    async def resume(self, *, pending: bool = False) -> None:
        """Read both records first, however long it takes: another driver, or this one before a restart, has begun the attempt. Both
        are read again until both are known, since one side goes on while the other is silent. `pending`: it is enough to know that
        the source has none, as the guest is untouched then.
        """
        pauses = Pauses(OTHER_HOST, self.clock)
        while True:
            looked = await asyncio.gather(*(self._try_to_look(side) for side in self._sides))
            if all(looked) or self.view.ended:  # the record of a source that has removed its copy is enough
                return
            if pending and self.view.source_record is None and "source" not in self.view.silent_since:
                return
            await pauses.pause()

    async def newest(self, side: str) -> pb.Record | None:
        """Ask a side once for its newest record of the migration. Return it if it is of this attempt or a later one, for the same
        guest and source; or the source's of an earlier one that it has not given up: a driver that had not heard of this one went on
        with that. None: it has none, or was declared dead. Raises the error of a side that does not say."""
        ours, parties = self.view.ref, self.view.parties
        request = pb.GetRecordRequest(ref=pb.AttemptRef(migration_id=ours.migration_id))
        try:
            record = (await self._sides[side][0].get_record(request)).record
        except DroverError as error:
            if error.reason is not Reason.RECORD_NOT_FOUND:
                self.view.call_failed(side, error)
                if not self.view.is_dead(side):
                    raise
            else:
                self.view.answered(side)
            return None
        self.view.answered(side)
        source = record.host if side == "source" else record.peer_host
        same = parties is not None and (record.domain_uuid, source) == (parties.domain_uuid, parties.source)
        begun = side == "source" and state_from_proto(record) != Src.KEPT
        counts = record.ref.migration_id == ours.migration_id and (record.ref.attempt >= ours.attempt or begun)
        return record if same and counts else None

    async def later(self, side: str, *, elsewhere: bool = False) -> pb.Record | None:
        """Return a side's newest record if it is of a later attempt: another driver went on with that. `elsewhere`: also one of the
        source with the same or an earlier number to another destination. Raises as `newest`."""
        record, parties = await self.newest(side), self.view.parties
        if record is None or parties is None:
            return None
        aside = elsewhere and side == "source" and record.peer_host not in ("", parties.destination)
        return record if aside or record.ref.attempt > self.view.ref.attempt else None

    async def begun_elsewhere(self, *, both: bool = False) -> pb.Record | None:
        """Return the record of an attempt that another driver has begun (see `newest`): the source's, or the destination's if that
        is past its slot and the source has forgotten its own. `both`: the destination has to answer, too. Raises as `newest`."""
        if (record := await self.newest("source")) is not None:
            return record
        try:
            record = await self.newest("destination")
        except DroverError:
            if both or "source" in self.view.silent_since:
                raise
            return None
        is_past = record is not None and state_from_proto(record) not in (Dst.RESERVED, Dst.GONE)
        return record if is_past else None

    async def _try_to_look(self, side: str) -> bool:
        """Read a side's record. Return whether enough is known of it to go on: the record, or a statement that it is dead."""
        try:
            await self._look(side)
        except DroverError as error:
            self.view.call_failed(side, error)
            return self.view.is_dead(side)
        return True

    async def answers(self, side: str) -> bool:
        """Ask a side now, and the source too if the destination is silent. Return whether it answers, with an error or not, whether
        the source hears it, or whether the attempt has ended.
        """
        await self._try_to_look(side)
        if side == "destination" and side in self.view.silent_since:
            with contextlib.suppress(DroverError):
                await self._look("source")
            await self._ask_the_source()
        return side not in self.view.silent_since or self.view.is_reported_alive(side) or self.view.ended

    async def _ask_the_source(self) -> None:
        """Call Confirm at the source. It may reach a destination that this driver cannot reach, and then obeys its decision."""
        if self.view.source_state is not Src.PERFORMED:
            return
        try:
            await self.calls.confirm(pb.DECISION_RUNNING)
        except DroverError as error:
            self.view.call_failed("source", error)
            if error.metadata.get("answers") == "yes":
                self.view.reported_alive("destination")

    async def _look(self, side: str) -> None:
        """Read a side's record; it may have none. Raises `DroverError`."""
        peer, saw = self._sides[side]
        try:
            saw((await peer.get_record(pb.GetRecordRequest(ref=self.view.ref))).record)
        except DroverError as error:
            if error.reason is Reason.STALE_ATTEMPT:
                self.view.overtaken.add(side)
            elif error.reason is not Reason.RECORD_NOT_FOUND:
                raise
            self.view.answered(side)
