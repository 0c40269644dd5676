"""One migration of this process: its message, its driver, and its row in the log."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from copy import deepcopy
from typing import Any, Final, Protocol, TypeVar

import structlog

from agent.handshake.drive.driver import Driver
from agent.handshake.machines.destination import DestinationState
from agent.migration.settings import bound_rates, settings_of
from agent.migration.tuning import Tuner
from agent.migration.uptime import age_of, seconds_since
from agent.runtime.backoff import STORE, Clock, Pauses
from agent.runtime.bell import Bell
from agent.runtime.errors import DroverError, Reason
from agent.runtime.events import MigrationChanged
from agent.runtime.failure import Failure
from agent.runtime.wire import enum_name
from drover.agent.v1 import handshake_pb2, host_pb2
from drover.agent.v1 import migration_pb2 as pb

log = structlog.get_logger()

T = TypeVar("T")

FINAL: Final = frozenset({pb.MIGRATION_STATE_SUCCEEDED, pb.MIGRATION_STATE_FAILED, pb.MIGRATION_STATE_CANCELLED})


def event_of(migration: pb.Migration) -> MigrationChanged:
    """Return the event of a change to this state; equal for two states that differ only in readings and texts."""
    return MigrationChanged(
        migration.migration_id,
        migration.attempt,
        state=enum_name(pb.MigrationState, migration.state),
        phase=migration.phase,
        source_host=migration.source_host,
        destination_host=migration.destination_host,
        domain_uuid=migration.domain_uuid,
        wait_reason=enum_name(pb.WaitReason, migration.wait_reason) if migration.wait_reason else "",
        reason=migration.failure.reason,
    )


class MigrationLog(Protocol):
    """Storage of migrations. Every method is durable when it returns, and raises JOURNAL_UNAVAILABLE."""

    async def save(self, migration_id: str, body: bytes, *, ended: bool) -> None: ...

    async def remove(self, migration_id: str) -> None:
        """Remove a migration, if there is one."""

    async def load(self) -> list[bytes]: ...

    async def next_life(self, above: int) -> int:
        """Return a number greater than `above`, and than every number returned before, also before restarts."""


class Entry:
    """One migration, with its driver and tasks."""

    def __init__(self, migration: pb.Migration, kept: MigrationLog, *, recovered: bool = False) -> None:
        bound_rates(migration)
        if not (migration.HasField("settings") or migration.state in FINAL):  # an older version has made it, or it was taken over
            migration.settings.CopyFrom(settings_of(migration.spec, host_pb2.DomainSettings()))
            if migration.HasField("slot_wait"):
                migration.settings.slot_wait.CopyFrom(migration.slot_wait)
        self.migration = migration
        self.recovered = recovered
        """An earlier life of this process has started it."""
        self._kept = kept
        self.driver: Driver | None = None
        self.task: asyncio.Task[None] | None = None
        self.fencing: asyncio.Task[None] | None = None
        self.fenced_side = ""
        """The side that is being fenced; empty: none."""
        self.gave_up = False
        """Its driver has stopped although it has not ended: its records contradict each other."""
        self.slot_asked = False
        """A call for the slot has had no answer: the destination may hold it."""
        self.asks_others = False
        """Its wait for slots is over, and it asks whether another driver has begun it."""
        self.follows = False
        """Another driver has begun it: what this one took or asked for at the hosts meanwhile is given back at the end."""
        self.unsuitable: dict[str, float] = {}
        """Until when a migration to any host does not try a host, by the clock's monotonic time."""
        self.advised_until = float("-inf")
        """Until when the hosts that could take it need not be looked for again, by the clock's monotonic time."""
        self.planned_at = 0.0
        """When its driver was made, by the clock's monotonic time."""
        self.planned_links: tuple[tuple[bytes, ...], ...] | None = None
        """The networks of both hosts by which it was planned; see `links`. None: it was not."""
        self.links_changed = Bell()
        """Rings when these have changed while it waits for its slot."""
        self.parked = False
        """It has no slot yet, and its driver has stopped with the process: the next life goes on."""
        self.saved_statements = {statement.dead_host for statement in migration.statements}
        """Hosts that were declared dead, by the log."""
        self.saving: asyncio.Task[None] | None = None
        """A write that nobody waits for."""
        self.telling: asyncio.TimerHandle | None = None
        """Publishes what its driver has learned; None: there is nothing new."""
        self.changed = Bell()
        self.cancel_asked = asyncio.Event()
        if migration.HasField("cancel_time"):
            self.cancel_asked.set()
        self.settled = asyncio.Event()
        """Set once the migration has its slot, or has ended without one."""
        self.ending = False
        """It ends without a slot, and that is (or will be) saved or removed: nothing else may be saved."""
        self.tuner: Tuner | None = None
        """Applies its settings to its transfer, while its driver runs."""
        self.updating = asyncio.Lock()
        self.settings_changed = Bell()
        """Rings when its settings have changed, durably: a wait for a slot has another deadline or importance."""
        self.refusal: DroverError | None = None
        """The error of its start, which leaves no migration."""
        if migration.state not in (pb.MIGRATION_STATE_PENDING, pb.MIGRATION_STATE_CANCELLING):
            self.settled.set()
        self._taken_up = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds since it was requested; if that cannot be measured, since this process has driven it."""
        measured = seconds_since(self.migration.create_uptime)
        return time.monotonic() - self._taken_up if measured is None else measured

    @property
    def wall(self) -> float | None:
        """Unix time if `elapsed` cannot begin with the request (another machine, or an earlier boot); else None."""
        return time.time() if seconds_since(self.migration.create_uptime) is None else None

    @property
    def slot_wait(self) -> float:
        """Seconds that it may wait for its slot, from the request on; 0: fail-fast."""
        return self.migration.slot_wait.ToNanoseconds() / 1e9

    @property
    def slot_wait_set(self) -> float:
        """The same by its settings, which may have been changed."""
        return self.migration.settings.slot_wait.ToNanoseconds() / 1e9

    @property
    def slot_wait_left(self) -> float:
        """How many of the seconds by its settings are left; 0 or less: none."""
        return self.slot_wait_set - age_of(self.migration)[0]

    @property
    def may_wait(self) -> bool:
        """Whether it waits where its slots do not let it transfer. One that was taken over does: its record does not say."""
        return bool(self.slot_wait) or self.migration.spec.wait_mode == pb.WAIT_MODE_WAIT

    @property
    def any_host(self) -> bool:
        """Whether its destination was chosen, and may change until it has its slot."""
        return not self.migration.spec.destination_host

    @property
    def ref(self) -> handshake_pb2.AttemptRef:
        return handshake_pb2.AttemptRef(migration_id=self.migration.migration_id, attempt=self.migration.attempt)

    @property
    def unbegun(self) -> bool:
        """Whether it may wait for its slot and has none, so that this process has certainly not touched the guest, in no life: when
        the slot is taken, that is saved first."""
        return bool(self.slot_wait) and not self.migration.HasField("slot_duration") and not self.final

    @property
    def needs_slot(self) -> bool:
        """Whether the guest is untouched and the slot has yet to be reserved, or again, as the migration may wait for it."""
        untouched = self.driver is not None and self.driver.view.untouched
        return untouched or (self.slot_wait_left > 0 and self.lost_its_slot)

    @property
    def lost_its_slot(self) -> bool:
        """Whether the destination's lease has ended before the source had a record: this attempt is over."""
        view = self.driver.view if self.driver is not None else None
        if view is None or view.destination_record is None or view.ref.attempt != self.migration.attempt:
            return False
        if view.source_record is not None or view.overtaken or "source" in view.silent_since:
            return False
        expired = view.destination_record.failure.reason == Reason.LEASE_EXPIRED
        return expired and view.destination_state is DestinationState.GONE

    async def accepted(self) -> pb.Migration:
        """Return the migration; if this life has started it and it is fail-fast, once it has its slot. Raises `refusal`."""
        if not (self.slot_wait or self.recovered):
            await self.settled.wait()
        if self.refusal is not None:
            raise self.refusal
        return self.migration

    @property
    def final(self) -> bool:
        return self.migration.state in FINAL

    @property
    def busy(self) -> bool:
        """Whether this process must drive it to an end that will come soon."""
        return not (self.final or self.gave_up or self.parked or self.waits)

    @property
    def waits(self) -> bool:
        """Whether it waits for its slot, and may do so."""
        return bool(self.slot_wait) and not (self.settled.is_set() or self.ending)

    @property
    def cancelled(self) -> Failure | None:
        """The failure by which it ends if its cancellation was requested, else None."""
        if not self.migration.HasField("cancel_time"):
            return None
        return Failure(Reason.CANCELLED, "cancelled on request")

    def side(self, host: str) -> str:
        """Return ``source``, ``destination``, or an empty string for a host that takes no part."""
        return {self.migration.destination_host: "destination", self.migration.source_host: "source"}.get(host, "")

    def changed_to(self, **fields: Any) -> pb.Migration:
        """Return a copy of the migration with these fields changed."""
        copy = deepcopy(self.migration)
        for name, value in fields.items():
            setattr(copy, name, value)
        return copy

    def as_stored(self) -> pb.Migration:
        """Return the migration without what changes while it waits."""
        stored = self.changed_to(revision=0, waiting_for="", wait_reason=pb.WAIT_REASON_UNSPECIFIED)
        if stored.state == pb.MIGRATION_STATE_OUTCOME_UNKNOWN:
            stored.state = pb.MIGRATION_STATE_ACTIVE  # unknown to this driver, while a host is silent
        stored.ClearField("wait")
        del stored.silent_hosts[:]
        return stored

    def not_in_doubt(self, host: str) -> DroverError:
        """Return the error for a statement about a host that is not in doubt."""
        migration_id = self.migration.migration_id
        if self.final:
            why = f"migration {migration_id} has ended"
        elif self.gave_up:
            why = f"migration {migration_id} was given up: {self.migration.failure.message}"
        elif self.unbegun:
            why = f"migration {migration_id} waits for its slot, and the guest was not touched: cancel it instead"
        elif self.driver is None:
            why = f"migration {migration_id} is being resumed, and {host} was not asked yet; try again in a moment"
        elif self.driver.view.is_reported_alive(self.side(host)):
            why = f"{host} does not answer here, but it answers the other host of the migration, so it is not dead"
        else:
            why = f"{host} answers, so it is not dead"
        return DroverError(Reason.NOT_IN_DOUBT, f"{why}. Nothing was changed", metadata={"host": host})

    # ---- its row in the log

    async def save(self, migration: pb.Migration | None = None) -> None:
        """Save it as it is, or as it is about to be. Raises JOURNAL_UNAVAILABLE."""
        written = migration or self.migration
        await self._kept.save(written.migration_id, written.SerializeToString(), ended=written.state in FINAL)
        self.saved_statements = {statement.dead_host for statement in written.statements}

    async def save_changed(self, change: Callable[[pb.Migration], None]) -> pb.Migration:
        """Save the migration with a change; return it, to be published at once. What else changes meanwhile is kept.

        Raises MIGRATION_ENDED, JOURNAL_UNAVAILABLE, and what `change` raises."""
        before, changed = None, self.migration
        while self.migration is not before:
            if self.final or self.ending or self.gave_up:
                text = f"migration {self.migration.migration_id} has ended, so nothing of it can be changed"
                raise DroverError(Reason.MIGRATION_ENDED, text)
            before, changed = self.migration, self.changed_to()
            change(changed)
            await self.save(changed)
        return changed

    async def until_saved(
        self, write: Callable[[], Awaitable[T]], clock: Clock, failed: Callable[[DroverError], None] = lambda _: None
    ) -> T:
        """Return what `write` returns, which is tried again as long as the log cannot be written. `failed` gets each error."""
        pauses = Pauses(STORE, clock)
        while True:
            try:
                return await write()
            except DroverError as error:
                log.error("a migration was not saved", migration=self.migration.migration_id, error=error.message)
                failed(error)
            await pauses.pause()

    async def remove(self) -> None:
        """Remove its row. Raises JOURNAL_UNAVAILABLE."""
        await self._kept.remove(self.migration.migration_id)

    async def save_if_possible(self) -> None:
        try:
            await self.save()
        except DroverError as error:
            log.error("a migration was not saved", migration=self.migration.migration_id, error=error.message)

    def forget_refuted(self) -> None:
        """Save the migration if a host that was declared dead has answered: its statement must not count again after a restart."""
        refuted = self.saved_statements - {statement.dead_host for statement in self.migration.statements}
        if refuted and (self.saving is None or self.saving.done()):
            self.saving = asyncio.create_task(self.save_if_possible(), name=f"save {self.migration.migration_id[:8]}")
