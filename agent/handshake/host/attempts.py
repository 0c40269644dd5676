"""Holds the attempts of this host: finds and creates them, and refuses calls for stale attempts and for guests in use."""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterator, Mapping
from typing import Any, Final

from agent.handshake.host.attempt import Attempt, EffectRunner, Look, WhyUnresponsive
from agent.handshake.host.journal import Journal
from agent.handshake.host.records import AttemptRecord, Role
from agent.handshake.machines.destination import DestinationState
from agent.handshake.machines.source import SourceEffect, SourceState
from agent.runtime.backoff import Clock
from agent.runtime.bell import Bell
from agent.runtime.errors import DroverError, Reason, invalid_field
from agent.runtime.events import Bus
from drover.agent.v1 import handshake_pb2 as pb

AFTERCARE: Final = "aftercare"
"""Task name of the work that `Aftercare` does for an attempt that has ended."""

AFTERCARE_WITHIN: Final = 5.0
"""Seconds for which a guest's next migration waits for that work."""

_HOLDS: Final = (SourceEffect.ABORT, SourceEffect.BEGIN, SourceEffect.RELEASE)
"""Effects whose hypervisor call may still run after an attempt has ended: it would end or block the guest's next transfer."""

_KEEP_ENDED: Final = 256
"""How many ended attempts stay in memory, and up to twice as many between two trims; older ones are read from the journal again."""


_MOVED: Final = (DestinationState.RUNNING, SourceState.REMOVED)


class Attempts:
    """Every attempt that has not ended, and the last ones that have."""

    def __init__(
        self,
        journal: Journal,
        effects: Mapping[Role, EffectRunner],
        look: Look,
        why_unresponsive: WhyUnresponsive,
        on_put: Callable[[Attempt, AttemptRecord], None],
        clock: Clock,
        bus: Bus,
        changed: Bell,
    ) -> None:
        self.journal = journal
        self._clock = clock
        self._bus = bus
        self._effects = effects
        self._look = look
        self._why_unresponsive = why_unresponsive
        self._on_put = on_put
        self.changed = changed
        """Rings whenever an attempt starts or ends here."""
        self._by_id: dict[str, Attempt] = {}
        self._unended: dict[Attempt, None] = {}
        """Those that have not ended, or for which something is still done: all that have to be looked through."""
        self._trim_at = _KEEP_ENDED
        self._claimed: set[str] = set()
        """Guests (UUIDs) whose first record is being written."""
        self._claimed_names: set[str] = set()
        """Names of arriving guests whose first record is being written."""
        self._lock = asyncio.Lock()

    def adopt(self, record: AttemptRecord) -> Attempt:
        """Create the attempt for a record and keep it."""
        attempt = Attempt(
            record,
            self.journal,
            self._effects[record.role],
            self._look,
            self._why_unresponsive,
            self._put,
            self._sort,
            self._clock,
            self._bus,
        )
        self._remove(self._by_id.get(record.migration_id))
        self._by_id[record.migration_id] = attempt
        if not record.final or record.aftercare:
            self._unended[attempt] = None
        if len(self._by_id) > self._trim_at:
            self._trim()
        return attempt

    def _trim(self) -> None:
        """Drop the oldest ended attempts. Busy ones stay, or a second `Attempt` would be created for the same record."""
        ended = [attempt for attempt in self._by_id.values() if attempt not in self._unended and not attempt.busy]
        for attempt in ended[: max(0, len(ended) - _KEEP_ENDED)]:
            self._remove(attempt)
        self._trim_at = len(self._by_id) + _KEEP_ENDED

    async def open(self, attempt: Attempt, first: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run `first` (the checks and the first event of an attempt) once for all concurrent callers, also if they go away."""
        if attempt.opening is None:
            attempt.opening = asyncio.create_task(self._open(attempt, first()))
            attempt.opening.add_done_callback(_retrieve_exception)
        await asyncio.shield(attempt.opening)

    async def _open(self, attempt: Attempt, first: Coroutine[Any, Any, None]) -> None:
        try:
            await first
            self.changed.ring()
        finally:
            attempt.opening = None
            self._sort(attempt)

    def _remove(self, attempt: Attempt | None) -> None:
        if attempt is not None:
            del self._by_id[attempt.record.migration_id]
            self._unended.pop(attempt, None)

    def _sort(self, attempt: Attempt) -> None:
        """Take note whether anything is still done for an attempt. One that `of` created for a call is dropped if it has no record
        and nobody uses it any more."""
        record = attempt.record
        if self._by_id.get(record.migration_id) is not attempt:
            return
        if not record.state:
            if attempt.opening is None and not attempt.in_use:
                self._remove(attempt)
                attempt.drop()
        elif attempt.busy or record.aftercare or not record.final:
            self._unended[attempt] = None
        else:
            self._unended.pop(attempt, None)

    def _put(self, attempt: Attempt, before: AttemptRecord) -> None:
        self._sort(attempt)
        self._on_put(attempt, before)

    @contextlib.contextmanager
    def claim(self, uuid: str, name: str) -> Iterator[None]:
        """Reserve a guest while an attempt to move it is opened: no other one may be under way here, in either role. Its remaining
        work (a copy to remove or give up) would hit the guest of the new one.

        Raises:
            DroverError: DOMAIN_BUSY.
        """
        self.check_free(uuid, name)
        self._claimed.add(uuid)
        try:
            yield
        finally:
            self._claimed.discard(uuid)

    @contextlib.contextmanager
    def claim_name(self, name: str, host: str) -> Iterator[None]:
        """Reserve a name while an arrival under it is opened: no other arrival may use it. The hypervisor does not know the copy
        before Prepare, so only the records show it.

        Raises:
            DroverError: DOMAIN_EXISTS.
        """
        named = [a for a in self._unended if a.record.destination_name == name]
        arrivals = [a.record for a in named if a.record.role is Role.DESTINATION and not a.record.final]
        if arrivals or name in self._claimed_names:
            by = f"migration {arrivals[0].migration_id} of guest {arrivals[0].domain_uuid}" if arrivals else "another migration"
            text = f"another guest is already arriving on {host} under the name {name}, by {by}; choose another name with --name"
            metadata = {"host": host, "domain": name} | ({"migration_id": arrivals[0].migration_id} if arrivals else {})
            raise DroverError(Reason.DOMAIN_EXISTS, f"{text}. Nothing was done to the guest", metadata=metadata)
        self._claimed_names.add(name)
        try:
            yield
        finally:
            self._claimed_names.discard(name)

    def check_free(self, uuid: str, name: str) -> None:
        """Raise DOMAIN_BUSY, with the migration's id, if an attempt to move this guest is under way here."""
        here = [a for a in self._unended if a.record.domain_uuid == uuid]
        others = sorted((a for a in here if not a.record.final or a.running(*_HOLDS)), key=lambda a: a.record.final)
        if others:
            raise _busy(name, others[0])
        if uuid in self._claimed:
            text = f"guest {name} is already being migrated, by another migration that is just starting; try again in a moment"
            raise DroverError(Reason.DOMAIN_BUSY, text)

    async def wait_for_aftercare(self, uuid: str, name: str) -> None:
        """Wait until the aftercare of attempts that have ended here is done for this guest.

        Raises:
            DroverError: DOMAIN_BUSY after `AFTERCARE_WITHIN` seconds.
        """
        here = [attempt for attempt in self._unended if attempt.record.domain_uuid == uuid and attempt.record.aftercare]
        try:
            async with asyncio.timeout(AFTERCARE_WITHIN):
                for attempt in here:
                    if attempt.record.final:
                        await attempt.ended(AFTERCARE)
        except TimeoutError:
            raise _busy(name, next((a for a in here if a.running(AFTERCARE)), here[0])) from None

    def active(self, role: Role) -> list[Attempt]:
        """Return the attempts that have not ended, without those that were only created for a call and have no record yet."""
        known = (a for a in self._unended if a.record.state or a.opening is not None)
        return [a for a in known if a.record.role is role and not a.record.final]

    def newest(self, migration_id: str) -> Attempt | None:
        """Return the attempt of a migration that is in memory: every one that has not ended is."""
        return self._by_id.get(migration_id)

    def all(self) -> list[Attempt]:
        return list(self._by_id.values())

    async def find(self, ref: pb.AttemptRef) -> Attempt:
        """Return the attempt named by `ref`; attempt 0 means the newest.

        Raises:
            DroverError: RECORD_NOT_FOUND, STALE_ATTEMPT.
        """
        current = await self._current(ref.migration_id)
        if current is None or not current.record.state or ref.attempt > current.record.attempt:
            which = f"attempt {ref.attempt} of " if ref.attempt else ""
            raise DroverError(Reason.RECORD_NOT_FOUND, f"this host has no record of {which}migration {ref.migration_id}")
        if ref.attempt and ref.attempt < current.record.attempt:
            raise _stale(ref, current.record)
        return current

    async def of(self, ref: pb.AttemptRef, role: Role) -> Attempt:
        """Return the attempt named by `ref`. One that is not known here is created, in memory only and without a state.

        Raises:
            DroverError: STALE_ATTEMPT, WRONG_PHASE (the older attempt may not be followed yet), MIGRATION_EXISTS, INVALID_FIELD.
        """
        if ref.attempt < 1:
            raise invalid_field("ref.attempt", "must be 1 or more")
        async with self._lock:
            current = await self._current(ref.migration_id)
            if current is None:
                return self.adopt(_new(ref, role))
            if current.record.role is not role:
                raise DroverError(
                    Reason.MIGRATION_EXISTS,
                    f"this host is the {current.record.role} of migration {ref.migration_id}, so it cannot be its {role}; nothing "
                    "was done. Choose a new UUID for a new migration",
                    metadata={"migration_id": ref.migration_id},
                )
            if ref.attempt < current.record.attempt:
                raise _stale(ref, current.record)
            if ref.attempt == current.record.attempt:
                return current
            _check_followed(ref, current)
            return self.adopt(_new(ref, role))

    async def _current(self, migration_id: str) -> Attempt | None:
        if migration_id in self._by_id:
            return self._by_id[migration_id]
        record = await self.journal.get_attempt(migration_id)
        return self._by_id.get(migration_id) or (self.adopt(record) if record is not None else None)


def _check_followed(ref: pb.AttemptRef, older: Attempt) -> None:
    """Raise WRONG_PHASE unless the older attempt has ended, moved no guest and left no work here: remaining work (the copy of a
    host that was declared dead, autostart) is done for the newest attempt only.
    """
    record = older.record
    if not record.final or record.aftercare or older.running(*_HOLDS):
        problem = "has not ended here"
    elif record.state in _MOVED:
        problem = "moved the guest"
    else:
        return
    raise DroverError(
        Reason.WRONG_PHASE,
        f"attempt {ref.attempt} of migration {ref.migration_id} cannot start: attempt {record.attempt} {problem} ({record.state})",
        metadata={"state": record.state},
    )


def _retrieve_exception(task: asyncio.Task[None]) -> None:
    """Mark the exception as retrieved: the callers got it, or all of them have gone away."""
    if not task.cancelled():
        task.exception()


def _busy(domain: str, attempt: Attempt) -> DroverError:
    """Return DOMAIN_BUSY. The advice depends on whether that migration has ended: then there is nothing to cancel."""
    record, migration = attempt.record, attempt.record.migration_id
    if record.final:
        calls = bool(attempt.running(*_HOLDS))
        left = "its last call to the hypervisor has not returned" if calls else "the guest's settings are still being restored"
        waits = f" (waiting for {record.waiting_for})" if record.waiting_for else ""
        text = (
            f"migration {migration} of guest {domain} has ended, but {left}{waits}. Try again in a moment; if that does not help, "
            f"check whether the hypervisor answers there: `virsh domjobinfo {domain}`"
        )
    else:
        text = (
            f"guest {domain} is already being migrated, by migration {migration}: "
            f"`drover migration watch {migration}` or `drover migration cancel {migration}`"
        )
    return DroverError(Reason.DOMAIN_BUSY, text, metadata={"migration_id": migration})


def _new(ref: pb.AttemptRef, role: Role) -> AttemptRecord:
    return AttemptRecord(migration_id=ref.migration_id, attempt=ref.attempt, role=role, state="")


def _stale(ref: pb.AttemptRef, known: AttemptRecord) -> DroverError:
    return DroverError(
        Reason.STALE_ATTEMPT,
        f"attempt {ref.attempt} of migration {ref.migration_id} is stale: this host is at attempt {known.attempt}",
        metadata={"attempt": str(known.attempt)},
    )
