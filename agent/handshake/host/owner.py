"""How a destination asks the source what became of its copy, when no driver does."""

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Collection
from typing import Any, Final

import structlog

from agent.handshake.host.attempt import Attempt
from agent.handshake.host.attempts import Attempts
from agent.handshake.host.peer import OtherHost
from agent.handshake.host.peer_record import NO_RECORD, differs
from agent.handshake.host.phases import LocalHost
from agent.handshake.host.records import AttemptRecord, Statement
from agent.handshake.machines.decision import yields_unrecorded
from agent.handshake.machines.destination import DestinationEvent, DestinationState
from agent.handshake.machines.facts import source_fact
from agent.handshake.machines.source import SourceEvent
from agent.hypervisor.base import Domain, DomainState, Job
from agent.runtime.backoff import STORE, Pauses
from agent.runtime.bell import Bell
from agent.runtime.errors import DroverError, Reason
from agent.runtime.failure import Failure
from drover.agent.v1 import handshake_pb2 as pb
from drover.agent.v1 import host_pb2

log = structlog.get_logger()

OWNER_SECONDS: Final = 5.0
"""Pause between two questions to a source whose record has not ended."""

LEAVING_SECONDS: Final = 2.0
"""How long a guest that is to leave again waits for the record of the source from which it came to end."""

UNTOLD_SECONDS: Final = 30 * 86400.0
"""How long a commit whose source cannot be asked must stay in the journal, so that a source that returns can read it. After that it
is trimmed like any other ended record."""

UNTOLD_LOOK_SECONDS: Final = 3600.0
"""How often to look for such commits while nothing else is to be asked."""

_ASK_AGAIN: Final = 0.1

_ENDED: Final = (pb.RECORD_STATE_REMOVED, pb.RECORD_STATE_KEPT)
_SENDS: Final = (pb.RECORD_STATE_PERFORMING, pb.RECORD_STATE_PERFORMED)
_KEEPS: Final = (pb.RECORD_STATE_RESUMING, pb.RECORD_STATE_KEPT)
_STATES: Final = {host_pb2.DomainState.Value(f"DOMAIN_STATE_{state.name}"): state for state in DomainState}


class Owner:
    """The questions to the sources of guests that are coming, or came, to this host."""

    def __init__(self, host: LocalHost, attempts: Attempts, source_of: Callable[[Attempt], OtherHost | None]) -> None:
        self._host = host
        self._attempts = attempts
        self._source_of = source_of
        self._arrived = Bell()

    def arrived(self) -> None:
        """Take note that a guest was started here, so that its source is asked."""
        self._arrived.ring()

    async def may_still_arrive(self, attempt: Attempt) -> bool:
        """Return whether the memory of a copy whose driver is silent may still come: an armed copy always may, a prepared one only
        if the source's record says that it sends. Gives the copy up if the source's record says that it kept the guest, or, once
        it is armed, if the source has no record and its hypervisor has the guest as before.
        """
        record = None
        try:
            record = await self._source_record(attempt)
        except DroverError as error:
            log.info("the source's record cannot be read", migration=attempt.record.migration_id, error=error.message)
            if attempt.record.state == DestinationState.ARMED and error.reason in NO_RECORD and await self._stayed(attempt):
                peer = attempt.record.peer_host
                text = f"{peer} has no record of this migration any more, and its hypervisor has the guest as before"
                await attempt.report(DestinationEvent.ABANDON_SOURCE_KEPT, failure=Failure(Reason.GIVEN_UP, text))
        if record is not None and record.state == pb.RECORD_STATE_KEPT:
            await attempt.report(DestinationEvent.ABANDON_SOURCE_KEPT, **self._statement_in(record))
        return attempt.record.state == DestinationState.ARMED or (record is not None and record.state in _SENDS)

    async def _stayed(self, attempt: Attempt) -> bool:
        """Return whether the hypervisor of a source without a record has the guest as before."""
        source = self._source_of(attempt)
        if source is None:
            return False
        try:
            name = (await source.get_host(host_pb2.GetHostRequest())).host.name  # another agent may have got the address since
            found = await source.get_domain(host_pb2.GetDomainRequest(domain=attempt.record.domain_uuid))
        except DroverError as error:
            log.info("the source's guest cannot be read", migration=attempt.record.migration_id, error=error.message)
            return False
        is_its_guest = (name, found.domain.uuid) == (attempt.record.peer_host, attempt.record.domain_uuid)
        return is_its_guest and yields_unrecorded(_fact(found.domain))

    async def ask_before_leaving(self, domain_uuid: str) -> None:
        """Ask the source of a guest that came here, before it leaves again, whether an operator's statement gave the guest back to
        it: on a third host nobody could stop the copy. Waits `LEAVING_SECONDS` for the source's record to end; then it may leave.

        Raises:
            DroverError: DECLARED_DEAD if the guest is the source's again; JOURNAL_UNAVAILABLE.
        """
        came_by = await self._attempts.journal.arrival(domain_uuid)
        if came_by is None:
            return
        attempt = await self._attempts.find(pb.AttemptRef(migration_id=came_by[0], attempt=came_by[1]))
        try:
            async with asyncio.timeout(LEAVING_SECONDS):
                await self._until_settled(attempt)
        except (DroverError, TimeoutError) as error:
            log.warning("a guest leaves although its source has not confirmed its end", migration=came_by[0], error=str(error))
        if attempt.record.state != DestinationState.RUNNING and attempt.record.failure is not None:
            raise attempt.record.failure.error()

    async def _until_settled(self, attempt: Attempt) -> None:
        while _can_settle(attempt.record):
            await self._settle(attempt)
            if _can_settle(attempt.record):
                await self._host.clock.sleep(_ASK_AGAIN)

    async def run(self) -> None:
        """Ask the source of every commit, until its record has ended, whether an operator's statement gave the guest back to it.

        So a host that was declared dead, rightly or not, learns it however long it was away, and the journal learns which commits
        no source will ask for any more. A new commit is left to its driver for one round.
        """
        pauses = Pauses(STORE, self._host.clock)
        asked: Collection[tuple[str, int]] | None = None  # after a start all of them are due
        while True:
            arrived = self._arrived.next
            try:
                unsettled = [record for record in await self._attempts.journal.unsettled() if record.peer_agent or _outlived(record)]
            except DroverError as error:
                log.warning("the journal cannot be read; retrying", error=error.message)
                await pauses.pause()
                continue
            pauses.succeeded()
            await self._ask_all([record for record in unsettled if asked is None or record.key in asked])
            asked = {record.key for record in unsettled}
            if unsettled:
                await self._host.clock.sleep(OWNER_SECONDS)
            else:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(arrived.wait(), UNTOLD_LOOK_SECONDS)

    async def _ask_all(self, records: Collection[AttemptRecord]) -> None:
        """Ask all sources at once, but each source one question after the other."""
        by_source: dict[str, list[AttemptRecord]] = defaultdict(list)
        for record in records:
            by_source[record.peer_agent].append(record)
        await asyncio.gather(*(self._ask_source(of_one) for of_one in by_source.values()))

    async def _ask_source(self, records: Collection[AttemptRecord]) -> None:
        for record in records:
            try:
                attempt = await self._attempts.find(record.ref)
                if attempt.record.state == DestinationState.RUNNING:
                    await self._settle(attempt)
            except DroverError as error:
                log.info("the arrival is not settled yet", migration=record.migration_id, error=error.message)
                if error.reason is Reason.HOST_UNREACHABLE:
                    return
            except Exception:  # a bug, perhaps with this answer only: go on with the other guests
                log.exception("unexpected error (bug) while settling an arrival", migration=record.migration_id)

    async def _settle(self, attempt: Attempt) -> None:
        """Ask the source what became of its copy: it has ended (settled), or it kept the guest by a statement (disown)."""
        try:
            source = await self._source_record(attempt)
        except DroverError as error:
            if error.reason not in NO_RECORD:
                raise
            await attempt.note(settled=True)  # the source has no record that is still undecided
            return
        if source is None:
            if _outlived(attempt.record):
                await attempt.note(settled=True)
            return
        statement = self._statement_in(source)
        if statement and source.state in _KEEPS:
            # Shielded: the guest stays claimed until the record says that it is not this host's, also if the caller goes away.
            await asyncio.shield(attempt.start("disowning", self._disown(attempt, statement)))
        elif source.state in _ENDED:
            await attempt.note(settled=True)

    async def _disown(self, attempt: Attempt, statement: dict[str, Any]) -> None:
        record = attempt.record
        try:
            with self._attempts.claim(record.domain_uuid, record.domain_name):
                log.error("this host was declared dead, so its copy is removed", migration=record.migration_id)
                await attempt.report(DestinationEvent.DISOWNED, **statement)
        except DroverError as error:  # a later attempt to move the guest is under way and must end first
            log.info("a copy cannot be removed yet", migration=record.migration_id, error=error.message)

    async def _source_record(self, attempt: Attempt) -> pb.Record | None:
        """Return the source's record; None if the address of its agent is not known. Raises `DroverError` if it cannot be read."""
        source = self._source_of(attempt)
        if source is None:
            return None
        record = (await source.get_record(pb.GetRecordRequest(ref=attempt.record.ref))).record
        if wrong := differs(attempt.record, record, self._host.name, unnamed=True):
            raise DroverError(
                Reason.UNDECIDED, f"the record at the address of {attempt.record.peer_host} is not this attempt's: {wrong}"
            )
        return record

    def _statement_in(self, source: pb.Record) -> dict[str, Any]:
        """Return the changes by an operator's statement in the source's record that this host is dead; none without one."""
        if source.statement.dead_host != self._host.name:
            return {}
        statement = Statement.of(source.statement)
        return {"failure": statement.failure(), "statement": statement}


def _outlived(record: AttemptRecord) -> bool:
    """Return whether this is a commit whose source cannot be asked, as its agent's address is not known, and that is too old for
    the source to ask for it (`UNTOLD_SECONDS`)."""
    return not record.peer_agent and time.time() - max(record.created, record.updated) > UNTOLD_SECONDS


def _can_settle(record: AttemptRecord) -> bool:
    """Return whether this is a commit whose source can be asked and has not ended as far as is known."""
    return record.state == DestinationState.RUNNING and not record.settled and bool(record.peer_agent)


def _fact(guest: host_pb2.Domain) -> SourceEvent | None:
    """Return the source's event for a guest as the source's agent describes it."""
    here = Domain("", guest.uuid, _STATES.get(guest.state, DomainState.OTHER), guest.reason, 0, 0, persistent=guest.persistent)
    return source_fact(here) if guest.job == Job.NONE else None
