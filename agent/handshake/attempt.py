"""Runs one state machine for one attempt: journal first, then the effect, one event at a time.

The work belongs to the attempt, not to whoever asked: a caller that goes away cancels nothing.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Mapping
from typing import Any, Final

import msgspec
import structlog

from agent.bell import Bell
from agent.errors import DroverError, Reason
from agent.failpoints import failpoint
from agent.handshake.guest_fact import GuestFact
from agent.handshake.machine import Refused
from agent.handshake.records import MACHINES, AttemptRecord
from agent.handshake.stopwatch import Stopwatch
from agent.journal import Journal
from drover.agent.v1 import handshake_pb2 as pb

log = structlog.get_logger()


EffectRunner = Callable[["Attempt", str], Coroutine[Any, Any, None]]
"""Carries out one effect and reports what came of it with `Attempt.apply`."""

Look = Callable[["Attempt"], Awaitable[None]]
"""Asks the hypervisor what is true of the guest, within a deadline, and hands the answer to `Attempt.saw`. Raises nothing."""

Hindrance = Callable[["Attempt"], Awaitable[str]]
"""Why calls about the guest may get no answer from the hypervisor; empty: not known. Raises nothing."""

MAX_WAIT: Final = 30.0
"""Longest time in seconds for which a call waits; whoever wants to wait longer calls again."""

_DRIVERS: Final = 4
"""Names of drivers that are remembered, besides those in the record: one that was restarted has another."""

TELL_SECONDS: Final = 2.0
"""A call to the hypervisor that lasts longer is told as what is waited for."""

FRESH_SECONDS: Final = 0.1
"""A record that ends says what the hypervisor said of the guest at most so long ago."""

Told = Callable[[], Mapping[str, Any]]
"""What a request adds to the record, looked up when nothing else changes it; raises what is wrong with the request."""


class Attempt:
    """One attempt on this host. `record` is what is durable; `changed` wakes whoever waits for more."""

    def __init__(
        self,
        record: AttemptRecord,
        journal: Journal,
        run_effect: EffectRunner,
        look: Look,
        hindrance: Hindrance,
        on_final: Callable[["Attempt"], None],
        on_idle: Callable[["Attempt"], None],
    ) -> None:
        self.record = record
        self.progress: pb.Progress | None = None
        """The latest reading of the transfer; not journalled."""
        self.stopwatch: Stopwatch | None = None
        """Of the phase that makes this attempt known; not journalled."""
        self.opening: asyncio.Task[None] | None = None
        """What makes this attempt known, while that is under way."""
        self._journal = journal
        self._run_effect = run_effect
        self._look = look
        self._hindrance = hindrance
        self._seen_at = float("-inf")
        self._told = ""
        self._on_final = on_final
        self._on_idle = on_idle
        self._applying = 0
        self._machine = MACHINES[record.role]
        self._lock = asyncio.Lock()
        self._bell = Bell()
        self._tasks: dict[asyncio.Task[None], str] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._calls = 0
        self._silence: tuple[float, Callable[[], None]] | None = None
        self._silent_at = 0.0
        self._signs = 0
        """Of the calls that are under way: those of a driver of which one was taken before."""
        self._drivers: list[str] = []

    # ---- events

    async def apply(self, event: str, told: Told = dict, **changes: Any) -> None:
        """Take one event: step, make it durable, then start the effects. Survives the cancellation of its caller.

        Raises:
            DroverError: WRONG_PHASE for a call that has no place in this state; what `told` raises; JOURNAL_UNAVAILABLE. Nothing
                was done then.
        """
        await asyncio.shield(asyncio.ensure_future(self._apply(event, told, changes)))

    async def _apply(self, event: str, told: Told, changes: Mapping[str, Any]) -> None:
        self._applying += 1
        try:
            async with self._lock:
                await self._step(event, told, changes)
        finally:
            self._applying -= 1
            self._tell_idle()

    async def _step(self, event: str, told: Told, changes: Mapping[str, Any]) -> None:
        state = self.record.state or None
        try:
            transition = self._machine.step(state, event)
        except Refused as refused:
            raise wrong_phase(self.record, refused, self._machine.allowed(state)) from None
        if transition is None:
            log.debug("stale news", migration=self.record.migration_id, state=state, event_name=event)
            return
        changes = {**changes, **told()}
        if transition.state in self._machine.final and transition.state != state:
            await self._see_the_end()
        if transition.state != state or changes:
            failpoint(self.record.role, event, "journal.before")
            await self._put(self.record.changed(state=transition.state, **changes))
            failpoint(self.record.role, event, "journal.after")
        for effect in transition.effects:
            self.start(effect, self._carry_out(effect))

    def saw(self, fact: GuestFact | None, *, look_again: bool = False) -> None:
        """Remember what the hypervisor has said of the guest. `look_again`: it said so only by the success of a phase, and a record
        that ends with it asks once more.
        """
        changed = self._says(fact) != self._says(self.record.seen)
        self.record = msgspec.structs.replace(self.record, seen=fact)
        self._seen_at = float("-inf") if look_again else time.monotonic()
        if changed:
            self.wake()

    def tell(self, what: str) -> None:
        """Say what is waited for now (empty: nothing), or let it be said no more. Not journalled: it changes every second."""
        what = what[:500]
        if what != self.record.waiting_for and (what or self.record.waiting_for == self._told):
            self.record = msgspec.structs.replace(self.record, waiting_for=what)
            self._told = what
            self.wake()

    @contextlib.asynccontextmanager
    async def telling(self, what: str) -> AsyncIterator[None]:
        """Around a call to the hypervisor: one that lasts long is told, with how long, and why where that is known."""
        task = self.start("telling", self._tell_while(what))
        try:
            yield
        finally:
            task.cancel()
            self.tell("")

    async def _tell_while(self, what: str) -> None:
        began = time.monotonic()
        await asyncio.sleep(TELL_SECONDS)
        while True:
            why = await self._hindrance(self)
            because = f": {why}" if why else ""
            self.tell(f"{what}, asked {time.monotonic() - began:.0f} s ago{because}; asked again until it is answered")
            await asyncio.sleep(1.0)

    @staticmethod
    def _says(fact: GuestFact | None) -> tuple[str, ...]:
        return (fact.state, fact.reason, fact.silence) if fact is not None else ()

    async def _see_the_end(self) -> None:
        """What this record says last of the guest stays said: ask once more, unless the answer is as young as can be."""
        if self.record.domain_uuid and time.monotonic() - self._seen_at > FRESH_SECONDS:
            await self._look(self)

    async def _carry_out(self, effect: str) -> None:
        """The effect itself is told from what came of it: `report` stands between them."""
        failpoint(self.record.role, effect, "effect.before")
        await self._run_effect(self, effect)

    async def report(self, event: str, **changes: Any) -> None:
        """Take news of an effect; where the journal cannot be written, keep trying: the effect has happened. News that something
        newer has overtaken is dropped."""
        failpoint(self.record.role, event, "news")

        async def take() -> None:
            try:
                await self.apply(event, **changes)
            except DroverError as error:
                if error.reason is not Reason.WRONG_PHASE:
                    raise
                log.info("overtaken news", migration=self.record.migration_id, event_name=event, error=error.message)

        await retry(self, f"recording {event}", take)

    async def note(self, **changes: Any) -> None:
        """Record facts that change no state, such as a failure or what is waited for."""
        await asyncio.shield(asyncio.ensure_future(self._note(changes)))

    async def _note(self, changes: dict[str, Any]) -> None:
        async with self._lock:
            await self._put(self.record.changed(**changes))

    async def _put(self, record: AttemptRecord) -> None:
        await self._journal.put_attempt(record)
        record = msgspec.structs.replace(record, seen=self.record.seen)  # it may have been asked meanwhile
        log.info("record", migration=record.migration_id, role=record.role.value, state=record.state, was=self.record.state)
        ends, self.record = record.final and not self.record.final, record
        if ends:
            self._disarm()
            self._on_final(self)
        self.wake()

    def wake(self) -> None:
        """Tell every waiter to look again (progress is not journalled, but is worth a look)."""
        self._bell.ring()

    # ---- effects

    def start(self, name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run work that belongs to this attempt."""
        task = asyncio.create_task(work, name=f"{self.record.migration_id[:8]} {self.record.role} {name}")
        self._tasks[task] = name
        task.add_done_callback(self._effect_ended)
        return task

    def _effect_ended(self, task: asyncio.Task[None]) -> None:
        name = self._tasks.pop(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("effect failed", migration=self.record.migration_id, effect=name, exc_info=error)
        self.wake()

    @property
    def busy(self) -> bool:
        """A call or an effect is under way."""
        return bool(self._calls or self._tasks or self.opening is not None)

    @property
    def in_use(self) -> bool:
        """A call is under way, or an event is being taken whose caller may have gone away."""
        return bool(self._calls or self._applying)

    def _tell_idle(self) -> None:
        if not self.in_use:
            self._on_idle(self)

    def running(self, *names: str) -> list[asyncio.Task[None]]:
        return [task for task, name in self._tasks.items() if name in names]

    def stop(self, name: str) -> None:
        """Cancel an effect that only looks on."""
        for task in self.running(name):
            task.cancel()

    async def ended(self, *names: str) -> None:
        """Wait until none of these effects is under way; an effect never waits for itself."""
        current = asyncio.current_task()
        tasks = [task for task in self.running(*names) if task is not current]
        if tasks:
            await asyncio.wait(tasks)

    async def close(self) -> None:
        """The agent stops: let go of the tasks. What they did is found again from the journal and the facts."""
        await asyncio.gather(*self.drop(), return_exceptions=True)

    def drop(self) -> "list[asyncio.Task[None]]":
        """Nothing of this attempt goes on. What has to end for that."""
        self._disarm()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        return tasks

    # ---- waiting

    async def until(self, states: Collection[str], wait: float) -> AttemptRecord:
        """The record once it is in one of the states, or as it is after `wait` seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait):
                while self.record.state not in states:
                    await self._bell.next.wait()
        return self.record

    async def changes(self) -> AsyncIterator[AttemptRecord]:
        """The record now, and whenever it has changed since it was last looked at, until it has ended."""
        while True:
            changed, record = self._bell.next, self.record
            yield record
            if record.final:
                return
            await changed.wait()

    # ---- silence

    def on_silence(self, seconds: float, act: Callable[[], None]) -> None:
        """Call `act` once the driver of this attempt has given no sign of life for so long."""
        self._silence = (seconds, act)
        self._silent_at = time.monotonic() + seconds
        self._rearm()

    def _rearm(self) -> None:
        """A call that nobody knows yet may turn out to be the driver's: it is waited for as long as a call lasts, and no longer."""
        self._disarm()
        if self._silence is not None and not self._signs and not self.record.final:
            silent_at = self._silent_at + (MAX_WAIT if self._calls else 0.0)
            self._timer = asyncio.get_running_loop().call_later(silent_at - time.monotonic(), self._silence[1])

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    @contextlib.asynccontextmanager
    async def called(self, call: str = "", request_id: str = "") -> AsyncIterator[None]:
        """A call for this attempt (or its driver's watch) is under way. It is a sign of life of the driver if it is taken, or comes
        from a driver of which one was taken before: anybody may make calls that are refused.
        """
        driver = driver_of(request_id)
        is_known = is_sign = self.is_driver(driver)
        self._calls += 1
        self._signs += is_known
        self._rearm()
        try:
            yield
            failpoint(self.record.role, call or "watch", "reply")
            is_sign = True
            if driver:
                self._drivers = [*(other for other in self._drivers if other != driver), driver][-_DRIVERS:]
        finally:
            self._calls -= 1
            self._signs -= is_known
            if is_sign and self._silence is not None:
                self._silent_at = time.monotonic() + self._silence[0]
            self._rearm()
            self._tell_idle()

    def is_driver(self, driver: str) -> bool:
        """Whether a request of that driver was taken here. Its name is told to nobody."""
        return bool(driver) and (driver in self._drivers or driver in map(driver_of, self.record.request_ids.values()))


def driver_of(request_id: str) -> str:
    """The name of the driver that made a request, if it gave the request an id: that is its name, "-" and a number."""
    return request_id.rpartition("-")[0]


def wrong_phase(record: AttemptRecord, refused: Refused, allowed: list[str]) -> DroverError:
    """The error for a call that has no place in the record's state."""
    state = refused.state or "unknown here"
    return DroverError(
        Reason.WRONG_PHASE,
        f"{refused.event} has no place now: attempt {record.attempt} of migration {record.migration_id} is {state} on this "
        f"{record.role}; it takes {', '.join(allowed) if allowed else 'no call that changes it'}",
        metadata={"state": state, "event": refused.event, "allowed": ",".join(allowed), "role": record.role.value},
    )


async def retry(attempt: Attempt, what: str, work: Callable[[], Awaitable[None]]) -> None:
    """Do what must be done until it is done; the record says what is waited for. Backs off from 0.1 to 5 seconds."""
    pause, told = 0.1, False
    while True:
        try:
            async with attempt.telling(what):
                await work()
        except Exception as error:
            log.warning("will be tried again", migration=attempt.record.migration_id, what=what, error=str(error))
            await waits_for(attempt, f"{what}: {error}")
            told = True
            await asyncio.sleep(pause)
            pause = min(pause * 2, 5.0)
        else:
            if told:
                await waits_for(attempt, "")
            return


async def waits_for(attempt: Attempt, what: str) -> None:
    """Record what is waited for. A journal that cannot be written must not end the waiting."""
    with contextlib.suppress(DroverError):
        await attempt.note(waiting_for=what[:500])
