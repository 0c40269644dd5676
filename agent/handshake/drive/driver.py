"""Drives one attempt to its end: asks `decide` what to call, makes the calls, and reads the records that they answer with.

Used by three callers: the coordinator, a source agent peer to peer, and a source agent that takes over from a driver that went
silent. It keeps nothing that is needed for safety: it may be stopped anywhere, and another driver goes on.
"""

import asyncio
import contextlib
import secrets
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

import structlog

from agent.handshake.drive.knowledge import Knowledge, Parties, StateUnknownError
from agent.handshake.drive.plan import Plan
from agent.handshake.host.peer import HandshakePeer
from agent.handshake.machines.decide import Call, decide
from agent.handshake.machines.destination import DestinationState as Dst
from agent.handshake.machines.failpoints import failpoint
from agent.handshake.machines.source import SourceState as Src
from agent.network.networks import check_destination_uri
from agent.runtime.backoff import OTHER_HOST, SYSTEM_CLOCK, Clock, Pauses
from agent.runtime.errors import DroverError, Reason
from agent.runtime.failure import Failure
from agent.runtime.wire import duration
from drover.agent.v1 import handshake_pb2 as pb
from drover.agent.v1 import host_pb2

log = structlog.get_logger()

LONG_POLL: Final = 5.0
"""Seconds for which a call waits before it is made again, so that a host that hangs is noticed soon."""

PATIENCE: Final = 20.0
"""Seconds for which a host may be unreachable before the transfer is started; then the migration is given up. Long enough for the
restart of an agent (it waits up to 10 s for running work). Once memory may flow, silence ends nothing: a transfer needs no driver.
"""

STALLED: Final = 10.0
"""Seconds after the source has sent everything after which an armed copy that still waits has lost the last bytes (the link was
cut). More than any working link needs to deliver what was on its way."""

FOLLOW_AFTER: Final = 0.25
"""Seconds after which the record of a side is watched: most phases are over by then, and a watch costs two calls."""

_TRANSIENT: Final = frozenset({Reason.HYPERVISOR_UNAVAILABLE, Reason.JOURNAL_UNAVAILABLE, Reason.DRAINING, Reason.OVERLOADED})
"""Errors of a host that answers after which the same call is made again."""

_STALE: Final = frozenset({Reason.WRONG_PHASE, Reason.RECORD_NOT_FOUND})
"""Errors that mean that the record is not in the state that the driver believed: it reads the record again."""

_LISTENS: Final = frozenset({pb.RECORD_STATE_PREPARED, pb.RECORD_STATE_ARMED, pb.RECORD_STATE_RUNNING})
"""States of a destination that has answered with the URI at which it listens. If Prepare takes longer than a call may last, the
answer is still PREPARING, and the call is made again: it waits too."""

_MAY_BE_REFUSED: Final = frozenset({Call.RESERVE, Call.BEGIN, Call.PREPARE, Call.PERFORM})
"""Calls whose error ends the migration: nothing was changed, and another try would fail too."""

_SOURCE_CALLS: Final = frozenset({Call.BEGIN, Call.PERFORM, Call.ABORT, Call.CONFIRM_RUNNING, Call.CONFIRM_GONE})


class Driver(Knowledge):
    """The driver of one attempt. `on_change` is called after every change of what it knows. `plan`: None for a driver that takes
    over, which can make none of the calls before Perform."""

    def __init__(
        self,
        ref: pb.AttemptRef,
        source: HandshakePeer,
        destination: HandshakePeer,
        plan: Plan | None,
        on_change: Callable[[], None],
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        parties = Parties(plan.source_host, plan.destination_host, plan.domain_uuid) if plan is not None else None
        super().__init__(ref, parties, on_change)
        self.uri = ""
        self.clock = clock
        self._pauses = {side: Pauses(OTHER_HOST, clock) for side in ("source", "destination")}
        """Before a side is called again after an error."""
        self._stalled: asyncio.TimerHandle | None = None
        self._is_stalled = False
        self._source = source
        self._destination = destination
        self._plan = plan
        self._token = secrets.token_hex(8)
        self._calls = 0
        self._probe = pb.PathProbe()
        self._probe_renewed = False
        self._begun = pb.BeginResponse()
        self._prepared = pb.PrepareResponse()
        self._finish_cookie = b""
        self._perform_cookie = b""
        self._epoch = 0
        self._transfer_asked = False

    # ---- the loop

    async def reserve(self) -> None:
        """Reserve the slot, without a retry: a refusal is raised as it is, and has changed nothing."""
        failpoint("driver", Call.RESERVE, "before")
        await self._reserve()
        failpoint("driver", Call.RESERVE, "after")

    async def resume(self) -> None:
        """Read both records first, however long it takes: another driver, or this one before a restart, has begun the attempt. Both
        are read again until both are known, since one side goes on while the other is silent.
        """
        pauses = Pauses(OTHER_HOST, self.clock)
        while True:
            looked = await asyncio.gather(*(self._try_to_look(side) for side in self._sides))
            if all(looked) or self.ended:  # the record of a source that has removed its copy is enough
                return
            await pauses.pause()

    async def _try_to_look(self, side: str) -> bool:
        """Read a side's record. Return whether enough is known of it to go on: the record, or a statement that it is dead."""
        try:
            await self._look(side)
        except DroverError as error:
            self.missed(side, error)
            return side in self.silent_since and side in self.statements
        return True

    async def answers(self, side: str) -> bool:
        """Ask a side now, and the source too if the destination is silent. Return whether it answers, with an error or not, whether
        the source hears it, or whether the attempt has ended.
        """
        await self._try_to_look(side)
        if side == "destination" and side in self.silent_since:
            with contextlib.suppress(DroverError):
                await self._look("source")
            await self._ask_the_source()
        return side not in self.silent_since or self.is_vouched_for(side) or self.ended

    async def run(self) -> None:
        """Drive until both records have ended and agree, or turn out to be of another migration (`foreign`). Cancelling this
        coroutine only ends the driver, not the migration.
        """
        tasks: dict[Call | str, asyncio.Task[object]] = {}
        try:
            while not self.ended and self.foreign is None:
                self._wake.clear()
                for call in decide(*self.states, cancel=self.cancelling, stalled=self._stalls(), by_statement=self.by_statement):
                    if call not in tasks:
                        tasks[call] = asyncio.create_task(self._make(call), name=f"{self.ref.migration_id[:8]} {call}")
                for side in self._followed():
                    if f"follow {side}" not in tasks:
                        tasks[f"follow {side}"] = asyncio.create_task(self._follow(side), name=f"{self.ref.migration_id[:8]} follow")
                tasks["wake"] = asyncio.create_task(self._wake.wait())
                done, _ = await asyncio.wait(tasks.values(), return_when=asyncio.FIRST_COMPLETED)
                for name in [name for name, task in tasks.items() if task in done]:
                    await tasks.pop(name)
                if wake := tasks.pop("wake", None):
                    wake.cancel()
            if self.foreign is not None:
                await self._give_back()
        finally:
            if self._stalled is not None:
                self._stalled.cancel()
            for task in tasks.values():
                task.cancel()
            await asyncio.gather(*tasks.values(), return_exceptions=True)

    async def _give_back(self) -> None:
        """Give back the slot that was taken under an id that belongs to another migration. On an error, its lease ends by itself."""
        if self.destination_record is not None and self.destination_state in (Dst.RESERVED, Dst.PREPARING, Dst.PREPARED):
            with contextlib.suppress(DroverError):
                await self._abandon(source_kept=False)

    def _stalls(self) -> bool:
        """Return whether the records have been PERFORMED and ARMED for `STALLED` seconds. Wakes the loop when that time is over."""
        if self.states != (Src.PERFORMED, Dst.ARMED):
            if self._stalled is not None:
                self._stalled.cancel()
            self._stalled, self._is_stalled = None, False
        elif self._stalled is None:
            self._stalled = asyncio.get_running_loop().call_later(STALLED, self._stall)
        return self._is_stalled

    def _stall(self) -> None:
        log.warning("the source has sent everything, but the destination still waits", migration=self.ref.migration_id)
        self._is_stalled = True
        self.waiting_for = (
            f"the destination to start the guest or give up its copy: the source sent everything {STALLED:g} s ago, so the last "
            "bytes were lost on the way"
        )
        self._wake.set()

    async def _make(self, call: Call) -> None:
        """Make one call. An error is not raised; it changes what is known."""
        side = "source" if call in _SOURCE_CALLS else "destination"
        failpoint("driver", call, "before")
        try:
            await self._methods[call]()
            failpoint("driver", call, "after")
        except DroverError as error:
            log.info("call failed", migration=self.ref.migration_id, call=call.value, reason=error.reason.value, error=error.message)
            await self._failed(call, side, error)
        else:
            self._pauses[side].succeeded()
            if not self.silent_since:  # else the migration still waits for the silent side
                self.waiting_for = ""

    async def _failed(self, call: Call, side: str, error: DroverError) -> None:
        if error.reason is Reason.MIGRATION_EXISTS:
            self.is_foreign(error)
            return
        if error.reason is Reason.NOT_IN_DOUBT:
            self.refuted("destination" if side == "source" else "source")
        self.missed(side, error)
        if error.reason is Reason.PATH_NOT_PROVED and self._probe.nonce and not self._probe_renewed:
            # A destination whose agent was restarted answers at another port now: reserve once more to learn it.
            self._probe, self._probe_renewed = pb.PathProbe(), True
        elif side in self.silent_since:
            not_begun = not self._transfer_asked and self.source_state in (None, Src.BEGINNING, Src.BEGUN)
            if not_begun and self.silent_for(side) > PATIENCE:
                self.cancel(Failure.of(error))
        elif call in _MAY_BE_REFUSED and error.reason not in _TRANSIENT | _STALE and not isinstance(error, StateUnknownError):
            self.waiting_for = ""
            self.cancel(Failure.of(error))
        await self._pauses[side].pause()  # before the same call is made again, and before the record is read
        with contextlib.suppress(DroverError):
            await self._look(side)
        if "destination" in self.silent_since:
            await self._ask_the_source()

    async def _ask_the_source(self) -> None:
        """Call Confirm at the source. It may reach a destination that this driver cannot reach, and then obeys its decision."""
        if self.source_state is not Src.PERFORMED:
            return
        try:
            await self._confirm(pb.DECISION_RUNNING)
        except DroverError as error:
            self.missed("source", error)
            if error.metadata.get("answers") == "yes":
                self.vouched_for("destination")

    @property
    def _sides(self) -> Mapping[str, tuple[HandshakePeer, Callable[[pb.Record], None]]]:
        return {
            "source": (self._source, self.saw_source),
            "destination": (self._destination, self.saw_destination),
        }

    async def _look(self, side: str) -> None:
        """Read a side's record; it may have none. Raises `DroverError`."""
        peer, saw = self._sides[side]
        try:
            saw((await peer.get_record(pb.GetRecordRequest(ref=self.ref))).record)
        except DroverError as error:
            if error.reason is not Reason.RECORD_NOT_FOUND:
                raise
            self.heard(side)

    def _followed(self) -> list[str]:
        """Return the sides to watch now: those that no call is made to while the other side works, and a source that sends."""
        watched = {
            # While Begin lasts, the source's record shows what it waits for.
            "source": self.source_state in (Src.BEGUN, Src.PERFORMING) or self.states == (None, Dst.RESERVED),
            "destination": self.destination_state in (Dst.RESERVED, Dst.PREPARING, Dst.PREPARED, Dst.ABANDONING) or self.disputed,
        }
        return [side for side, wanted in watched.items() if wanted]

    async def _follow(self, side: str) -> None:
        """Watch a side's record while it is to be followed. The watch is also a sign of life of the driver there."""
        peer, saw = self._sides[side]
        await self.clock.sleep(FOLLOW_AFTER)
        if side not in self._followed():
            return
        try:
            async for response in peer.watch_record(pb.WatchRecordRequest(ref=self.ref, driver=self._token, driving=True)):
                saw(response.record)
                self._pauses[side].succeeded()
                if side not in self._followed():
                    return
        except DroverError as error:
            log.debug("a watch ended", migration=self.ref.migration_id, side=side, error=error.message)
            await self._pauses[side].pause()

    # ---- the calls

    @property
    def _methods(self) -> Mapping[Call, Callable[[], Awaitable[None]]]:
        return {
            Call.RESERVE: self._reserve,
            Call.BEGIN: self._begin,
            Call.PREPARE: self._prepare,
            Call.PERFORM: self._perform,
            Call.FINISH: self._finish,
            Call.CONFIRM_RUNNING: lambda: self._confirm(pb.DECISION_RUNNING),
            Call.CONFIRM_GONE: lambda: self._confirm(pb.DECISION_GONE),
            Call.ABORT: self._abort,
            Call.ABANDON: lambda: self._abandon(source_kept=False),
            Call.ABANDON_SOURCE_KEPT: lambda: self._abandon(source_kept=True),
        }

    def _request_id(self) -> str:
        self._calls += 1
        return f"{self._token}-{self._calls}"

    def _planned(self) -> Plan:
        if self._plan is None:
            raise DroverError(Reason.DRIVER_SILENT, "the driver went away before the transfer started, so the migration is given up")
        return self._plan

    async def _reserve(self) -> None:
        plan = self._planned()
        if plan.requirements is None and self.destination_record is None:
            raise DroverError(Reason.LEASE_EXPIRED, f"the slot on {plan.destination_host} was lost while the driver was away")
        needs = plan.requirements or host_pb2.GuestRequirements(name=plan.domain_name, uuid=plan.domain_uuid)
        response = await self._destination.reserve_slot(
            pb.ReserveSlotRequest(
                ref=self.ref,
                request_id=self._request_id(),
                requirements=needs,
                destination_name=plan.destination_name,
                source_host=plan.source_host,
                source_agent=plan.source_agent,
                options=plan.options,
                network=plan.network,
                uri_in=plan.uri,
            )
        )
        self._epoch = response.record.slot.epoch
        self.read_clock("destination", response.record)
        self._probe = response.probe
        self.saw_destination(response.record)

    async def _begin(self) -> None:
        plan = self._planned()
        if not self._probe.nonce and self.source_state is None and self.destination_state in (None, Dst.RESERVED):
            await self._make(Call.RESERVE)  # its answer was lost, or was received before this driver was restarted
            return
        self._begun = await self._source.begin(
            pb.BeginRequest(
                ref=self.ref,
                request_id=self._request_id(),
                domain=plan.domain_name,
                domain_uuid=plan.domain_uuid,
                destination_name=plan.destination_name,
                destination_host=plan.destination_host,
                destination_agent=plan.destination_agent,
                options=plan.options,
                slot_epoch=self._epoch,
                probe=self._probe,
            )
        )
        self.read_clock("source", self._begun.record)
        self.saw_source(self._begun.record)

    async def _prepare(self) -> None:
        plan = self._planned()
        if not self._begun.domain_xml:
            await self._make(Call.BEGIN)  # its answer was lost
            return
        if not self._epoch and self.destination_record is not None:
            self._epoch = self.destination_record.slot.epoch
        prepared = await self._destination.prepare(
            pb.PrepareRequest(
                ref=self.ref,
                request_id=self._request_id(),
                slot_epoch=self._epoch,
                domain_xml=self._begun.domain_xml,
                cookie_in=self._begun.cookie_out,
                network=plan.network,
                uri_in=plan.uri,
                stored=self._begun.stored if self._begun.HasField("stored") else None,
            )
        )
        if prepared.record.state not in _LISTENS:
            self.saw_destination(prepared.record)
            return
        prepared.uri_out = check_destination_uri(prepared.uri_out, plan.destination_networks, plan.destination_features)
        self._prepared = prepared
        self.uri = prepared.uri_out
        self.saw_destination(prepared.record)

    async def _perform(self) -> None:
        """Start the transfer, or wait for its end. The first call returns as soon as it runs, so that Finish can be called."""
        if self.source_state is Src.BEGUN:
            if not self._prepared.uri_out:
                await self._make(Call.PREPARE)  # its answer was lost
                return
            request = pb.PerformRequest(
                uri=self._prepared.uri_out,
                cookie_in=self._prepared.cookie_out,
                bandwidth_bytes_per_second=self._planned().bandwidth,
                destination_record=self._prepared.record,
            )
        else:
            request = pb.PerformRequest(uri="joined", wait=duration(LONG_POLL))
        request.ref.CopyFrom(self.ref)
        request.request_id = self._request_id()
        self._transfer_asked = True
        response = await self._source.perform(request)
        self._perform_cookie = response.cookie_out
        self.saw_source(response.record)

    async def _finish(self) -> None:
        response = await self._destination.finish(
            pb.FinishRequest(ref=self.ref, request_id=self._request_id(), cookie_in=self._perform_cookie, wait=duration(LONG_POLL))
        )
        self._finish_cookie = response.cookie_out
        self.saw_destination(response.record)

    async def _confirm(self, decision: pb.Decision.ValueType) -> None:
        response = await self._source.confirm(
            pb.ConfirmRequest(
                ref=self.ref,
                request_id=self._request_id(),
                decision=decision,
                cookie_in=self._finish_cookie,
                wait=duration(LONG_POLL),
                statement=self.statements.get("destination") if decision == pb.DECISION_GONE else None,
                destination_record=self.destination_record,
            )
        )
        self.saw_source(response.record)

    async def _abort(self) -> None:
        self.saw_source((await self._source.abort(pb.AbortRequest(ref=self.ref, request_id=self._request_id()))).record)

    async def _abandon(self, *, source_kept: bool) -> None:
        response = await self._destination.abandon(
            pb.AbandonRequest(
                ref=self.ref,
                request_id=self._request_id(),
                source_kept=source_kept,
                statement=self.statements.get("source") if source_kept else None,
                source_record=self.source_record,
                domain_uuid=self._parties.domain_uuid if self._parties else "",
                source_host=self._parties.source if self._parties else "",
            )
        )
        self.saw_destination(response.record)
