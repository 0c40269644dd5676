"""Runs one state machine for one attempt: journal first, then the effect, one event at a time.

The work belongs to the attempt, not to the caller that asked for it: a caller that goes away cancels nothing.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Mapping
from typing import Any, Final

import msgspec
import structlog

from agent.handshake.host.journal import Journal
from agent.handshake.host.records import MACHINES, AttemptRecord, wrong_phase
from agent.handshake.host.signs import SignsOfLife
from agent.handshake.host.stopwatch import Stopwatch
from agent.handshake.machines.failpoints import failpoint
from agent.handshake.machines.machine import Refused
from agent.hypervisor.guest_fact import GuestFact
from agent.network.probe import Measured
from agent.runtime.alongside import outlasting
from agent.runtime.backoff import EFFECT, Clock, Pauses
from agent.runtime.bell import Bell
from agent.runtime.errors import DroverError, Reason
from agent.runtime.events import Bus
from drover.agent.v1 import handshake_pb2 as pb

log = structlog.get_logger()

EffectRunner = Callable[["Attempt", str], Coroutine[Any, Any, None]]
"""Carries out one effect and reports its result with `Attempt.report`."""

Look = Callable[["Attempt"], Awaitable[None]]
"""Asks the hypervisor for the state of the guest, within a deadline, and hands the answer to `Attempt.saw`. Raises nothing."""

WhyUnresponsive = Callable[["Attempt"], Awaitable[str]]
"""Returns why the hypervisor may not answer calls about the guest; empty: not known. Raises nothing."""

REPORT_AFTER_SECONDS: Final = 2.0
"""Seconds after which a call to the hypervisor that has not returned appears in `waiting_for`."""
FRESH_SECONDS: Final = 0.1
"""Maximum age of the guest's state in a record that ends; an older one is asked for again."""

_LateChanges = Callable[[], Mapping[str, Any]]
"""Returns what a request adds to the record; raises `DroverError` for one that must be refused. Called under the attempt's lock."""


class Attempt:
    """One attempt on this host. `record` is what the journal holds, besides `seen` and what `tell` sets, which may be newer.
    `on_put` is called after each durable change, with the record before; `on_done` at the end of each call, event and effect."""

    def __init__(
        self,
        record: AttemptRecord,
        journal: Journal,
        run_effect: EffectRunner,
        look: Look,
        why_unresponsive: WhyUnresponsive,
        on_put: Callable[["Attempt", AttemptRecord], None],
        on_done: Callable[["Attempt"], None],
        clock: Clock,
        bus: Bus,
    ) -> None:
        self.record = record
        self.clock = clock
        self._bus = bus
        self.progress: pb.Progress | None = None  # the latest reading of the transfer; not journalled
        self.stopwatch: Stopwatch | None = None  # times the phase that opens this attempt; not journalled
        self.measured: Measured | None = None  # of the path that was proved; not journalled
        self.opening: asyncio.Task[None] | None = None  # opens this attempt (`Attempts.open`), while it runs
        self._journal = journal
        self._run_effect = run_effect
        self._look = look
        self._why_unresponsive = why_unresponsive
        self._seen_at = float("-inf")
        self._own_wait = ""  # what `tell` set last
        self._on_put = on_put
        self._on_done = on_done
        self._applying = 0
        self._machine = MACHINES[record.role]
        self._lock = asyncio.Lock()
        self._bell = Bell()
        self._tasks: dict[asyncio.Task[None], str] = {}
        self.signs = SignsOfLife(lambda: self.record)

    # ---- events

    async def apply(self, event: str, late: _LateChanges = dict, **changes: Any) -> None:
        """Take one event: step, make the new record durable, then start the effects. Goes on if its caller is cancelled.

        Raises:
            DroverError (nothing was done): WRONG_PHASE for a call that the state forbids; what `late` raises; JOURNAL_UNAVAILABLE.
        """
        await outlasting(self._apply(event, late, changes))

    async def _apply(self, event: str, late: _LateChanges, changes: Mapping[str, Any]) -> None:
        self._applying += 1
        try:
            async with self._lock:
                await self._step(event, late, changes)
        finally:
            self._applying -= 1
            self._on_done(self)

    async def _step(self, event: str, late: _LateChanges, changes: Mapping[str, Any]) -> None:
        state = self.record.state or None
        try:
            transition = self._machine.step(state, event)
        except Refused as refused:
            raise wrong_phase(self.record, refused, self._machine.allowed(state)) from None
        if transition is None:
            log.debug("stale event ignored", migration=self.record.migration_id, state=state, event_name=event)
            return
        changes = {**changes, **late()}
        if transition.state in self._machine.final and transition.state != state:
            await self._look_before_the_end()
        if transition.state != state or changes:
            failpoint(self.record.role, event, "journal.before")
            await self._put(self.record.changed(state=transition.state, **changes))
            failpoint(self.record.role, event, "journal.after")
        for effect in transition.effects:
            self.start(effect, self._carry_out(effect))

    def saw(self, fact: GuestFact | None, *, look_again: bool = False) -> None:
        """Remember the guest's state as the hypervisor reported it. `look_again`: it was only concluded from an event or from the
        success of a phase, so the hypervisor is asked once more before the record ends."""
        changed = self._summary(fact) != self._summary(self.record.seen)
        self.record = msgspec.structs.replace(self.record, seen=fact)
        self._seen_at = float("-inf") if look_again else time.monotonic()
        if changed:
            self.wake()

    def tell(self, what: str) -> None:
        """Set `waiting_for`; empty clears it, unless something else has set it since. Not journalled: it changes every second."""
        what = what[:500]
        if what != self.record.waiting_for and (what or self.record.waiting_for == self._own_wait):
            self.record = msgspec.structs.replace(self.record, waiting_for=what)
            self._own_wait = what
            self.wake()

    @contextlib.asynccontextmanager
    async def reporting_wait(self, what: str) -> AsyncIterator[None]:
        """Put `what` into `waiting_for` while a call to the hypervisor lasts longer than `REPORT_AFTER_SECONDS`, with its duration
        and its known reason."""
        task = self.start("telling", self._tell_while(what))
        try:
            yield
        finally:
            task.cancel()
            self.tell("")

    async def _tell_while(self, what: str) -> None:
        began = time.monotonic()
        await self.clock.sleep(REPORT_AFTER_SECONDS)
        while True:
            why = await self._why_unresponsive(self)
            self.tell(f"{what}, asked {time.monotonic() - began:.0f} s ago and not answered yet" + (f": {why}" if why else ""))
            await self.clock.sleep(1.0)

    @staticmethod
    def _summary(fact: GuestFact | None) -> tuple[str, ...]:
        return (fact.state, fact.reason, fact.silence) if fact is not None else ()

    async def _look_before_the_end(self) -> None:
        """Ask for the guest's state unless it is fresh: a record that has ended keeps the one that it ends with."""
        if self.record.domain_uuid and time.monotonic() - self._seen_at > FRESH_SECONDS:
            await self._look(self)

    async def _carry_out(self, effect: str) -> None:
        failpoint(self.record.role, effect, "effect.before")
        await self._run_effect(self, effect)

    async def report(self, event: str, **changes: Any) -> None:
        """Take the event that an effect results in. Retries until the journal can be written: the effect has happened. Drops an
        event that the state no longer allows."""
        failpoint(self.record.role, event, "news")

        async def take() -> None:
            try:
                await self.apply(event, **changes)
            except DroverError as error:
                if error.reason is not Reason.WRONG_PHASE:
                    raise
                log.info("event dropped", migration=self.record.migration_id, event_name=event, error=error.message)

        await retry(self, f"recording {event}", take)

    async def note(self, **changes: Any) -> None:
        """Record changes that leave the state as it is, such as a failure or `waiting_for`."""
        await self.amend(lambda: changes)

    async def amend(self, late: _LateChanges) -> None:
        """As `note`, with what `late` returns under the lock."""
        await outlasting(self._amend(late))

    async def _amend(self, late: _LateChanges) -> None:
        async with self._lock:
            if changes := late():
                await self._put(self.record.changed(**changes))

    async def _put(self, record: AttemptRecord) -> None:
        await self._journal.put_attempt(record)
        record = msgspec.structs.replace(record, seen=self.record.seen)  # `saw` may have changed it meanwhile
        self._bus.publish(record.event(was=self.record.state))
        before, self.record = self.record, record
        self._on_put(self, before)
        self.wake()

    def wake(self) -> None:
        """Wake every waiter, also for what is not journalled, such as progress."""
        self._bell.ring()

    # ---- effects

    def start(self, name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run work as a task of this attempt, under a name that `running`, `stop` and `ended` take."""
        task = asyncio.create_task(work, name=f"{self.record.migration_id[:8]} {self.record.role} {name}")
        self._tasks[task] = name
        task.add_done_callback(self._effect_ended)
        return task

    def _effect_ended(self, task: asyncio.Task[None]) -> None:
        name = self._tasks.pop(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("effect failed", migration=self.record.migration_id, effect=name, exc_info=error)
        self.wake()
        self._on_done(self)

    @property
    def busy(self) -> bool:
        """A call, an event or an effect is under way."""
        return bool(self.in_use or self._tasks or self.opening is not None)

    @property
    def in_use(self) -> bool:
        """A call is under way, or an event is being taken whose caller may have gone away."""
        return bool(self.signs.calls or self._applying)

    def running(self, *names: str) -> list[asyncio.Task[None]]:
        return [task for task, name in self._tasks.items() if name in names]

    def stop(self, name: str) -> None:
        """Cancel a task that only observes."""
        for task in self.running(name):
            task.cancel()

    async def ended(self, *names: str) -> None:
        """Wait until none of these tasks runs, except the calling one."""
        if tasks := [task for task in self.running(*names) if task is not asyncio.current_task()]:
            await asyncio.wait(tasks)

    async def close(self) -> None:
        """Cancel the tasks and wait for their end: the agent stops. Its next start goes on from the journal and the hypervisor."""
        await asyncio.gather(*self.drop(), return_exceptions=True)

    def drop(self) -> "list[asyncio.Task[None]]":
        """Cancel every task and the timer. Return the tasks that have yet to end."""
        self.signs.end()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        return tasks

    # ---- waiting

    async def until(self, states: Collection[str], wait: float) -> AttemptRecord:
        """Return the record once it is in one of the states, or as it is after `wait` seconds."""
        if self.record.state in states:
            return self.record
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait):
                while self.record.state not in states:
                    await self._bell.next.wait()
        return self.record

    async def changes(self) -> AsyncIterator[AttemptRecord]:
        """Yield the record now and after each change, until it has ended. A slow reader skips records, never the last one."""
        while True:
            changed, record = self._bell.next, self.record
            yield record
            if record.final:
                return
            await changed.wait()

    # ---- calls

    @contextlib.asynccontextmanager
    async def called(self, call: str = "", request_id: str = "") -> AsyncIterator[None]:
        """Count a call for this attempt (or its driver's watch) as under way; see `SignsOfLife.called`."""
        try:
            with self.signs.called(request_id):
                yield
                failpoint(self.record.role, call or "watch", "reply")
        finally:
            self._on_done(self)


async def retry(attempt: Attempt, what: str, work: Callable[[], Awaitable[None]]) -> None:
    """Call `work` until it succeeds, with the pauses of `EFFECT`. Meanwhile `waiting_for` is `what` and the last error."""
    pauses = Pauses(EFFECT, attempt.clock)
    while True:
        try:
            async with attempt.reporting_wait(what):
                await work()
            break
        except Exception as error:
            log.warning("will be tried again", migration=attempt.record.migration_id, what=what, error=str(error))
            await waits_for(attempt, f"{what}: {error}")
            await pauses.pause()
    if pauses.failures:
        await waits_for(attempt, "")


async def waits_for(attempt: Attempt, what: str) -> None:
    """Record `waiting_for`. Ignores an error of the journal, which must not end the waiting."""
    with contextlib.suppress(DroverError):
        await attempt.note(waiting_for=what[:500])
