"""The attempts of this host by migration: finds, makes and fences them."""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterator, Mapping
from typing import Any, Final

from agent.bell import Bell
from agent.errors import DroverError, Reason, invalid_field
from agent.handshake.attempt import Attempt, EffectRunner, Hindrance, Look
from agent.handshake.destination import DestinationState
from agent.handshake.records import AttemptRecord, Role
from agent.handshake.source import SourceEffect, SourceState
from agent.journal import Journal
from drover.agent.v1 import handshake_pb2 as pb

AFTERCARE: Final = "aftercare"
"""Name of the work that `aftercare` does for an attempt that has ended."""

AFTERCARE_WITHIN: Final = 5.0
"""Seconds for which a guest's next migration waits for that."""

_HOLDS: Final = (SourceEffect.ABORT, SourceEffect.BEGIN, SourceEffect.RELEASE)
"""What may still be on its way to the hypervisor when an attempt has ended: it would end the guest's next transfer, or holds it."""

_KEEP_ENDED: Final = 256
"""Ended attempts in memory; older ones are read from the journal again."""


_MOVED: Final = (DestinationState.RUNNING, SourceState.REMOVED)


class Attempts:
    """Every attempt that has not ended, and some that have."""

    def __init__(self, journal: Journal, look: Look, hindrance: Hindrance, on_final: Callable[[Attempt], None]) -> None:
        self.journal = journal
        self.effects: Mapping[Role, EffectRunner] = {}
        self._look = look
        self._hindrance = hindrance
        self._on_final = on_final
        self.changed = Bell()
        """Rings whenever an attempt begins or ends here."""
        self._by_id: dict[str, Attempt] = {}
        self._claimed: set[str] = set()
        """Guests (UUIDs) whose first record is being written."""
        self._claimed_names: set[str] = set()
        """Names under which a guest is to arrive whose first record is being written."""
        self._lock = asyncio.Lock()

    def adopt(self, record: AttemptRecord) -> Attempt:
        """Make the attempt of a record."""
        attempt = Attempt(
            record,
            self.journal,
            self.effects[record.role],
            self._look,
            self._hindrance,
            self._on_final,
            self._forget_unless_known,
        )
        self._by_id.pop(record.migration_id, None)
        self._by_id[record.migration_id] = attempt
        self._trim()
        return attempt

    def _trim(self) -> None:
        """What somebody still works with stays, or a second attempt would be made of the same record."""
        over = {key: attempt for key, attempt in self._by_id.items() if attempt.record.final and not attempt.record.aftercare}
        ended = [key for key, attempt in over.items() if not attempt.busy]
        for key in ended[: max(0, len(ended) - _KEEP_ENDED)]:
            del self._by_id[key]

    async def open(self, attempt: Attempt, first: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Do what makes an attempt known (checks, then its first event), once, however many ask and whoever goes away."""
        if attempt.opening is None:
            attempt.opening = asyncio.create_task(self._open(attempt, first()))
            attempt.opening.add_done_callback(_seen)
        await asyncio.shield(attempt.opening)

    async def _open(self, attempt: Attempt, first: Coroutine[Any, Any, None]) -> None:
        try:
            await first
            self.changed.ring()
        finally:
            attempt.opening = None
            self._forget_unless_known(attempt)

    def _forget_unless_known(self, attempt: Attempt) -> None:
        """One that `of` made for a call, and that is not known when nobody uses it any more, never was."""
        is_used = bool(attempt.record.state) or attempt.opening is not None or attempt.in_use
        if not is_used and self._by_id.get(attempt.record.migration_id) is attempt:
            del self._by_id[attempt.record.migration_id]
            attempt.drop()

    @contextlib.contextmanager
    def claim(self, uuid: str, name: str) -> Iterator[None]:
        """While an attempt at this guest is opened: no other one may be under way here, in either role. What is left to do for
        it (a copy to remove, or to give up) would strike the guest of the new one.

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
        """While an arrival at this host under that name is opened: no other one may be under way here. Its copy is unknown to the
        hypervisor before Prepare, so only the records can tell.

        Raises:
            DroverError: DOMAIN_EXISTS.
        """
        arrivals = [a.record for a in self.active(Role.DESTINATION) if a.record.destination_name == name]
        if arrivals or name in self._claimed_names:
            by = f"migration {arrivals[0].migration_id} of guest {arrivals[0].domain_uuid}" if arrivals else "another migration"
            text = f"a guest is to arrive on {host} under the name {name} already, by {by}: choose another name with --name"
            metadata = {"host": host, "domain": name} | ({"migration_id": arrivals[0].migration_id} if arrivals else {})
            raise DroverError(Reason.DOMAIN_EXISTS, f"{text}. Nothing was done to the guest", metadata=metadata)
        self._claimed_names.add(name)
        try:
            yield
        finally:
            self._claimed_names.discard(name)

    def check_free(self, uuid: str, name: str) -> None:
        """Raises DOMAIN_BUSY where an attempt at this guest is under way here, with its migration's id."""
        unfinished = [a for a in self._by_id.values() if a.busy or not a.record.final]
        here = [a for a in unfinished if a.record.domain_uuid == uuid]
        others = sorted((a for a in here if not a.record.final or a.running(*_HOLDS)), key=lambda a: a.record.final)
        if others:
            raise _busy(name, others[0])
        if uuid in self._claimed:
            text = f"guest {name} is being migrated already, by another migration that begins at this moment; try again in a moment"
            raise DroverError(Reason.DOMAIN_BUSY, text)

    async def cared_for(self, uuid: str, name: str) -> None:
        """Waits until nothing is left to put right of this guest by attempts that have ended here.

        Raises:
            DroverError: DOMAIN_BUSY.
        """
        here = [attempt for attempt in self._by_id.values() if attempt.record.domain_uuid == uuid and attempt.record.aftercare]
        try:
            async with asyncio.timeout(AFTERCARE_WITHIN):
                for attempt in here:
                    if attempt.record.final:
                        await attempt.ended(AFTERCARE)
        except TimeoutError:
            raise _busy(name, next((a for a in here if a.running(AFTERCARE)), here[0])) from None

    def active(self, role: Role) -> list[Attempt]:
        """Those that have not ended. One that is made for a call that has no place yet is none."""
        known = (a for a in self._by_id.values() if a.record.state or a.opening is not None)
        return [a for a in known if a.record.role is role and not a.record.final]

    def all(self) -> list[Attempt]:
        return list(self._by_id.values())

    async def find(self, ref: pb.AttemptRef) -> Attempt:
        """The attempt that was named; attempt 0 means the newest.

        Raises:
            DroverError: RECORD_NOT_FOUND, STALE_ATTEMPT.
        """
        current = await self._current(ref.migration_id)
        if current is None or not current.record.state or ref.attempt > current.record.attempt:
            raise DroverError(Reason.RECORD_NOT_FOUND, f"this host knows no attempt {ref.attempt} of migration {ref.migration_id}")
        if ref.attempt and ref.attempt < current.record.attempt:
            raise _stale(ref, current.record)
        return current

    async def of(self, ref: pb.AttemptRef, role: Role) -> Attempt:
        """The attempt that was named, made when it is not known here (in memory only, with no state).

        Raises:
            DroverError: STALE_ATTEMPT, WRONG_PHASE (no attempt may follow the older one), MIGRATION_EXISTS, INVALID_FIELD.
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
                    f"this host is the {current.record.role} of migration {ref.migration_id}, and cannot be its {role} too; nothing "
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
    """A later attempt takes the place of one that moved no guest and left nothing to do here: what is still to be done for an
    attempt (the copy of a host that was declared dead, autostart) is done for the newest only. Raises WRONG_PHASE.
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
        f"attempt {record.attempt} of migration {ref.migration_id} {problem}: it is {record.state}",
        metadata={"state": record.state},
    )


def _seen(task: asyncio.Task[None]) -> None:
    """Whoever asked has been told; nobody may be left."""
    if not task.cancelled():
        task.exception()


def _busy(domain: str, attempt: Attempt) -> DroverError:
    """What helps depends on whether that migration has ended: then there is nothing to cancel."""
    record, migration = attempt.record, attempt.record.migration_id
    if record.final:
        calls = bool(attempt.running(*_HOLDS))
        left = "its last call to the hypervisor has not returned" if calls else "what it left of the guest is still being put right"
        waits = f" ({record.waiting_for})" if record.waiting_for else ""
        text = (
            f"migration {migration} of guest {domain} has ended, but {left}{waits}. Try again in a moment; if it stays so, see "
            f"whether the hypervisor answers there: `virsh domjobinfo {domain}`"
        )
    else:
        text = (
            f"guest {domain} is being migrated already, by migration {migration}: "
            f"`drover migration watch {migration}` or `drover migration cancel {migration}`"
        )
    return DroverError(Reason.DOMAIN_BUSY, text, metadata={"migration_id": migration})


def _new(ref: pb.AttemptRef, role: Role) -> AttemptRecord:
    return AttemptRecord(migration_id=ref.migration_id, attempt=ref.attempt, role=role, state="")


def _stale(ref: pb.AttemptRef, known: AttemptRecord) -> DroverError:
    return DroverError(
        Reason.STALE_ATTEMPT,
        f"attempt {ref.attempt} of migration {ref.migration_id} is over: this host knows attempt {known.attempt}",
        metadata={"attempt": str(known.attempt)},
    )
