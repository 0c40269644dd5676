"""Drives one attempt to its end: asks `decide` what to call, makes the calls, and reads the records that they answer with.

Used by three callers: the coordinator, a source agent peer to peer, and a source agent that takes over from a driver that went
silent. It keeps nothing that is needed for safety: it may be stopped anywhere, and another driver goes on.
"""

import asyncio
import contextlib
import functools
from collections.abc import Callable
from typing import Final

import structlog

from agent.handshake.drive.calls import Calls, NotCalledError
from agent.handshake.drive.plan import Plan
from agent.handshake.drive.reader import Reader
from agent.handshake.drive.slots import TRANSFERRING, BothSlots, Request, slot_request
from agent.handshake.drive.view import Parties, StateUnknownError, View
from agent.handshake.host.peer import HandshakePeer
from agent.handshake.machines.decide import Call, decide
from agent.handshake.machines.destination import DestinationState as Dst
from agent.handshake.machines.failpoints import failpoint
from agent.handshake.machines.source import SourceState as Src
from agent.runtime.backoff import ANSWERED, OTHER_HOST, SYSTEM_CLOCK, Clock, Pauses
from agent.runtime.errors import DroverError, Reason
from agent.runtime.events import Bus, CallFailed, DriverDecided
from agent.runtime.failure import Failure
from agent.runtime.wire import cut
from drover.agent.v1 import handshake_pb2 as pb

log = structlog.get_logger()

PATIENCE: Final = 20.0
"""Seconds for which a host may be unreachable before the transfer is started; then the migration is given up. Long enough for the
restart of an agent (it waits up to 10 s for running work). Once memory may flow, silence ends nothing."""

STALLED: Final = 10.0
"""Seconds after the source has sent everything after which an armed copy that still waits has lost the last bytes (the link was
cut). More than any working link needs to deliver what was on its way."""

FOLLOW_AFTER: Final = 0.25
"""Seconds after which the record of a side is watched: most phases are over by then, and a watch costs two calls."""

_TRANSIENT: Final = frozenset({Reason.HYPERVISOR_UNAVAILABLE, Reason.JOURNAL_UNAVAILABLE, Reason.DRAINING, Reason.OVERLOADED})
"""Errors of a host that answers after which the same call is made again."""

_STALE: Final = frozenset({Reason.WRONG_PHASE, Reason.RECORD_NOT_FOUND, Reason.CANCELLED})
"""Errors that mean that the record is not in the state that the driver believed, or that another driver has given back the place in
a queue: it reads the record again, which says why."""

_MAY_BE_REFUSED: Final = frozenset({Call.RESERVE, Call.BEGIN, Call.PREPARE, Call.PERFORM})
"""Calls whose error ends the migration: nothing was changed, and another try would fail too."""

_SOURCE_CALLS: Final = frozenset({Call.BEGIN, Call.PERFORM, Call.ABORT, Call.CONFIRM_RUNNING, Call.CONFIRM_GONE})


class Driver(Reader):
    """The driver of one attempt. `on_change` is called after every change of what it knows. `plan`: None for a driver that takes
    over, which can make none of the calls before Perform."""

    def __init__(
        self,
        ref: pb.AttemptRef,
        source: HandshakePeer,
        destination: HandshakePeer,
        plan: Plan | None,
        on_change: Callable[[], None],
        bus: Bus,
        clock: Clock = SYSTEM_CLOCK,
        request: Request | None = None,
    ) -> None:
        """`request`: the request for a slot of a side, if it has more than the plan says."""
        parties = Parties(plan.source_host, plan.destination_host, plan.domain_uuid) if plan is not None else None
        view = View(ref, parties, on_change, bus)
        super().__init__(view, Calls(view, source, destination, plan), source, destination, clock)
        request = request or functools.partial(slot_request, ref.migration_id, plan=plan)
        self.slots = BothSlots(source, destination, request, view.waits, view.answered, clock)
        self._bus = bus
        self._decided: frozenset[Call] = frozenset()
        self._pauses = {side: Pauses(OTHER_HOST, clock) for side in ("source", "destination")}
        """Before a side is called again after an error."""
        self._soon = Pauses(ANSWERED, clock)
        self._stalled: asyncio.TimerHandle | None = None
        self._is_stalled = False
        self._slot_asked = False

    # ---- the loop

    async def reserve(self) -> None:
        """Reserve the slot, without a retry: a refusal is raised as it is, and has changed nothing. Where the destination did not
        answer, the slot may have been taken.
        """
        failpoint("driver", Call.RESERVE, "before")
        self._slot_asked = True
        try:
            await self.calls.make(Call.RESERVE)
        except DroverError as error:
            self.view.call_failed("destination", error)
            self._slot_asked = "destination" in self.view.silent_since
            raise
        self.view.waiting_for = ""
        failpoint("driver", Call.RESERVE, "after")

    async def reserve_at_once(self) -> None:
        """Take the source's slot, then reserve the destination's, without waiting. Raises a refusal as it is; then the destination
        has no slot for it."""
        try:
            await self.slots.take("source", TRANSFERRING)
        except DroverError as error:
            self.view.call_failed("source", error)
            raise
        await self.reserve()

    @property
    def may_hold_slot(self) -> bool:
        """Whether the destination may hold a slot of which this driver has no answer."""
        return self._slot_asked or "destination" in self.view.silent_since

    async def give_back(self) -> None:
        """Give up a slot that may have been taken. On an error, its lease ends it."""
        with contextlib.suppress(DroverError):
            await self.calls.abandon(source_kept=False)

    async def run(self) -> None:
        """Drive until both records have ended and agree, or turn out to be of another migration (`foreign`). Cancelling this
        coroutine only ends the driver, not the migration.
        """
        tasks: dict[Call | str, asyncio.Task[object]] = {}
        try:
            while not self.view.ended and self.view.foreign is None:
                self.view.news.clear()
                for call in self._decide():
                    if call not in tasks:
                        tasks[call] = asyncio.create_task(self._make(call), name=f"{self.view.ref.migration_id[:8]} {call}")
                for side in self._followed():
                    if f"follow {side}" not in tasks:
                        tasks[f"follow {side}"] = asyncio.create_task(
                            self._follow(side), name=f"{self.view.ref.migration_id[:8]} follow"
                        )
                tasks["wake"] = asyncio.create_task(self.view.news.wait())
                done, _ = await asyncio.wait(tasks.values(), return_when=asyncio.FIRST_COMPLETED)
                for name in [name for name, task in tasks.items() if task in done]:
                    await tasks.pop(name)
                if wake := tasks.pop("wake", None):
                    wake.cancel()
            if self.view.foreign is not None:
                await self._give_back()
        finally:
            if self._stalled is not None:
                self._stalled.cancel()
            for task in tasks.values():
                task.cancel()
            await asyncio.gather(*tasks.values(), return_exceptions=True)

    def _decide(self) -> frozenset[Call]:
        """Return the calls that must be under way now, and tell if they have changed."""
        view = self.view
        calls = decide(*view.states, cancel=view.cancelling, stalled=self._stalls(), by_statement=view.by_statement)
        if calls != self._decided:
            source, destination = view.states
            event = DriverDecided(
                *view.about,
                calls=tuple(sorted(calls)),
                source_state=source or "",
                destination_state=destination or "",
                reason=view.failure.reason if view.failure is not None else "",
            )
            self._bus.publish(event)
        self._decided = calls
        return calls

    async def _give_back(self) -> None:
        """Give back the slot that was taken under an id that belongs to another migration. On an error, its lease ends by itself."""
        if self.view.destination_record is not None and self.view.destination_state in (Dst.RESERVED, Dst.PREPARING, Dst.PREPARED):
            await self.give_back()

    def _stalls(self) -> bool:
        """Return whether the records have been PERFORMED and ARMED for `STALLED` seconds. Wakes the loop when that time is over."""
        if self.view.states != (Src.PERFORMED, Dst.ARMED):
            if self._stalled is not None:
                self._stalled.cancel()
            self._stalled, self._is_stalled = None, False
        elif self._stalled is None:
            self._stalled = asyncio.get_running_loop().call_later(STALLED, self._stall)
        return self._is_stalled

    def _stall(self) -> None:
        log.warning("the source has sent everything, but the destination still waits", migration=self.view.ref.migration_id)
        self._is_stalled = True
        self.view.waiting_for = (
            f"the destination to start the guest or give up its copy: the source sent everything {STALLED:g} s ago, so the last "
            "bytes were lost on the way"
        )
        self.view.news.set()

    async def _make(self, call: Call) -> None:
        """Make one call. An error is not raised; it changes what is known."""
        call = self.calls.due(call)
        side = "source" if call in _SOURCE_CALLS else "destination"
        try:
            if call is Call.PERFORM and self.view.source_state is Src.BEGUN:
                await self.slots.right_to_transfer(self.view.source_record, self.view.destination_record)
                if self.view.cancelling:
                    return
            failpoint("driver", call, "before")
            await self.calls.make(call)
            failpoint("driver", call, "after")
        except DroverError as error:
            message = cut(error.message, 1024)
            side, self.slots.at = self.slots.at or side, ""
            self._bus.publish(CallFailed(*self.view.about, call=call, side=side, reason=error.reason, message=message))
            await self._failed(call, side, error)
        else:
            self._pauses[side].succeeded()
            if not self.view.silent_since:  # else the migration still waits for the silent side
                self.view.waiting_for = ""

    async def _failed(self, call: Call, side: str, error: DroverError) -> None:
        if error.reason is Reason.MIGRATION_EXISTS:
            self.view.is_foreign(error)
            return
        if error.reason is Reason.NOT_IN_DOUBT:
            self.view.drop_statement("destination" if side == "source" else "source")
        if not isinstance(error, NotCalledError):
            self.view.call_failed(side, error)
        if error.reason is Reason.PATH_NOT_PROVED and self.calls.renew_probe(error.metadata.get("found", "")):
            pass  # the slot is reserved once more, which gives a new probe
        elif side in self.view.silent_since:
            not_begun = not self.calls.transfer_asked and self.view.source_state in (None, Src.BEGINNING, Src.BEGUN)
            if not_begun and self.view.silent_for(side) > PATIENCE:
                self.view.cancel(Failure.of(error))
        elif call is Call.PERFORM and error.reason is Reason.BUSY and self.slots.may_wait:
            with contextlib.suppress(DroverError):  # a slot has become prepared meanwhile: it is waited for once more
                await self._look("destination")
        elif call in _MAY_BE_REFUSED and _refuses(error) and not isinstance(error, StateUnknownError):
            self.view.waiting_for = ""
            self.view.cancel(Failure.of(error))
        # Before the same call is made again, and before the record is read.
        away = side in self.view.silent_since or error.reason in _TRANSIENT
        await (self._pauses[side] if away else self._soon).pause()
        with contextlib.suppress(DroverError):
            await self._look(side)
        if "destination" in self.view.silent_since:
            await self._ask_the_source()

    def _followed(self) -> list[str]:
        """Return the sides to watch now: those that no call is made to while the other side works, and a source that sends."""
        going = self.view.destination_state in (Dst.RESERVED, Dst.PREPARING, Dst.PREPARED, Dst.ABANDONING)
        # Abandon answers only once the copy is gone: meanwhile the record shows what that waits for.
        given_up = self.view.destination_state is Dst.ARMED and self.view.source_state in (Src.KEPT, Src.LOST)
        watched = {
            # While Begin lasts, the source's record shows what it waits for.
            "source": self.view.source_state in (Src.BEGUN, Src.PERFORMING) or self.view.states == (None, Dst.RESERVED),
            "destination": going or given_up or self.view.disputed,
        }
        return [side for side, wanted in watched.items() if wanted]

    async def _follow(self, side: str) -> None:
        """Watch a side's record while it is to be followed. The watch is also a sign of life of the driver there."""
        peer, saw = self._sides[side]
        await self.clock.sleep(FOLLOW_AFTER)
        if side not in self._followed():
            return
        try:
            async for response in peer.watch_record(pb.WatchRecordRequest(ref=self.view.ref, driver=self.calls.token, driving=True)):
                saw(response.record)
                self._pauses[side].succeeded()
                if side not in self._followed():
                    return
        except DroverError as error:
            log.debug("a watch ended", migration=self.view.ref.migration_id, side=side, error=error.message)
            await self._pauses[side].pause()


def _refuses(error: DroverError) -> bool:
    """Return whether the same call would fail again: also where another driver has cancelled the migration."""
    return error.reason not in _TRANSIENT | _STALE or "cancelled" in error.metadata
