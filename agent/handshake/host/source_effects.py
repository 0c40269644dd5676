"""The effects of the source's machine: they act on the hypervisor and report the result as events."""

import asyncio
import contextlib
import time

import structlog

from agent.handshake.host.aftercare import pause_seen
from agent.handshake.host.attempt import Attempt, retry
from agent.handshake.host.peer_record import PeerRecords
from agent.handshake.host.phases import (
    LocalHost,
    failed,
    failure_of,
    follow_guest,
    look_up,
)
from agent.handshake.host.records import progress_to_proto
from agent.handshake.host.stopwatch import Stopwatch, timed
from agent.handshake.host.waits import Follower, report_broken_post_copy
from agent.handshake.machines.facts import loss_of, sends, source_fact
from agent.handshake.machines.source import SourceEffect, SourceEvent, SourceState
from agent.hypervisor.base import (
    POSTCOPY_FAILED,
    Domain,
    DomainNotFound,
    DomainState,
    HypervisorError,
)
from agent.hypervisor.guest_fact import GuestFact, GuestState, fact_of
from agent.hypervisor.interface import Outgoing
from agent.runtime.failure import Failure

log = structlog.get_logger()

_S, _E, _F = SourceState, SourceEvent, SourceEffect


class SourceEffects:
    """The runner of the effects. Keeps the hypervisor's handle for each attempt."""

    def __init__(self, host: LocalHost, peers: PeerRecords) -> None:
        self._host = host
        self._peers = peers
        self._sessions: dict[Attempt, Outgoing] = {}
        self._followers: dict[Attempt, Follower] = {}

    async def run(self, attempt: Attempt, effect: str) -> None:
        await {
            _F.BEGIN: self._begin,
            _F.PERFORM: self._perform,
            _F.ABORT: self._abort,
            _F.LOOK: self._look,
            _F.REMOVE: self._remove,
            _F.RESUME: self._resume,
            _F.RELEASE: self._release,
        }[SourceEffect(effect)](attempt)

    def session(self, attempt: Attempt) -> Outgoing:
        """Return the hypervisor's handle for this attempt."""
        if attempt not in self._sessions:
            self._sessions[attempt] = self._host.hypervisor.outgoing(attempt.record.domain_uuid)
        return self._sessions[attempt]

    async def _begin(self, attempt: Attempt) -> None:
        record = attempt.record
        try:
            watch = attempt.stopwatch or Stopwatch("begin")  # the attempt's also timed the checks before
            with watch.asking():
                if record.autostart:  # see `aftercare`
                    await self._host.hypervisor.set_autostart(record.domain_uuid, False)
                async with attempt.reporting_wait(f"the hypervisor of {self._host.name} to begin the migration"):
                    begun = await self.session(attempt).begin(record.user_options, record.destination_name)
        except Exception as error:
            await attempt.report(_E.BEGIN_FAILED, failure=await self._death(attempt) or failure_of(error, self._host.name))
            return
        attempt.start("peer", self._peers.follow(attempt))
        attempt.start("guest", follow_guest(self._host, attempt, lambda: self._guest_ended(attempt)))
        await attempt.report(
            _E.BEGIN_DONE,
            domain_xml=begun.domain_xml,
            cookies={"begin": begun.cookie},
            timings=(*attempt.record.timings, watch.timing),
        )

    async def _guest_ended(self, attempt: Attempt) -> None:
        """Give up an attempt whose guest has ended before its transfer: it may wait for long for the right to that."""
        if attempt.record.state == _S.BEGUN and (death := await self._death(attempt)) is not None:
            await attempt.report(_E.ABORT, failure=death)

    async def _death(self, attempt: Attempt) -> Failure | None:
        """Return the failure of a guest that has died meanwhile; None if it lives or the hypervisor does not answer."""
        try:
            domain = await self._host.hypervisor.get_domain(attempt.record.domain_uuid)
        except DomainNotFound:
            domain = None
        except HypervisorError:
            return None
        return self._lost(attempt, domain) if source_fact(domain) is _E.SAW_DEAD else None

    def _lost(self, attempt: Attempt, domain: Domain | None) -> Failure:
        return loss_of(attempt.record.domain_name, self._host.name, fact_of(domain))

    async def _perform(self, attempt: Attempt) -> None:
        record = attempt.record
        session = self.session(attempt)
        self._watch(attempt)
        try:
            with timed("perform") as watch:
                performed = await session.perform(
                    record.uri,
                    record.domain_xml,
                    record.cookies["prepare"],
                    record.user_options,
                    record.destination_name,
                    record.bandwidth,
                    record.max_downtime,
                )
        except Exception as error:
            why = failed(attempt, failure_of(error, self._host.name))
            await attempt.report(_E.PERFORM_FAILED, **why, **pause_seen(attempt, session))
            return
        attempt.progress = progress_to_proto(performed.final)
        attempt.saw(GuestFact(GuestState.PAUSED, "migration", time.time()))  # concluded from Perform's success
        await attempt.report(
            _E.PERFORM_DONE,
            cookies={**attempt.record.cookies, "perform": performed.cookie},
            timings=(*attempt.record.timings, watch.timing),
            **pause_seen(attempt, session),
        )

    def _watch(self, attempt: Attempt) -> None:
        """Watch the transfer and the guest until the transfer has ended. Does nothing if they are watched already."""
        if not attempt.running("progress"):
            attempt.start("progress", self._follower(attempt).run())
        if not attempt.running("guest"):
            attempt.start("guest", follow_guest(self._host, attempt))

    def _follower(self, attempt: Attempt) -> Follower:
        if attempt not in self._followers:
            self._followers[attempt] = Follower(self._host, attempt, self.session(attempt), lambda: _transfer(attempt))
        return self._followers[attempt]

    async def _abort(self, attempt: Attempt) -> None:
        """Abort the transfer, repeatedly: one that is only being set up cannot be aborted yet."""
        session = self.session(attempt)
        attempt.start("connecting", self._follower(attempt).stop_connecting_until_the_end())
        while attempt.record.state == _S.PERFORMING and (transfer := attempt.running(_F.PERFORM, _F.LOOK)):
            try:
                await session.abort()
            except HypervisorError as error:
                log.warning("abort failed; retrying", migration=attempt.record.migration_id, error=str(error))
            await asyncio.wait(transfer, timeout=0.1)

    async def _look(self, attempt: Attempt) -> None:
        """Ask until no job holds the guest, then report its state. A job that outlived the agent is watched to its end."""
        self._watch(attempt)
        await self._fact(attempt)
        # A hypervisor that was restarted may have resumed the guest by mistake: trust its state only after `settle`.
        await retry(attempt, "cleaning up what the hypervisor left of the transfer", self.session(attempt).settle)
        await attempt.report(await self._fact(attempt), waiting_for="")

    async def _fact(self, attempt: Attempt) -> SourceEvent:
        """Return the event for the guest's state, once no job holds it."""
        while True:
            domain = await look_up(self._host, attempt)
            fact = source_fact(domain)
            if fact is not None:
                return fact
            if domain is not None and domain.reason == POSTCOPY_FAILED:
                await report_broken_post_copy(attempt)
            await self._host.clock.sleep(0.1)  # libvirt has no event for the end of a job that failed

    async def _remove(self, attempt: Attempt) -> None:
        record = attempt.record

        async def remove() -> None:
            await self.session(attempt).remove(record.cookies.get("finish", b""), record.user_options)
            attempt.saw(GuestFact(GuestState.ABSENT, "migrated", time.time()))  # concluded from the success of `remove`

        if attempt.progress is None:  # after a restart of the agent
            await self._see_post_copy(attempt)
        with timed("confirm") as watch:
            await retry(attempt, "removing the copy at the source", remove)
        await attempt.report(_E.REMOVE_DONE, timings=(*attempt.record.timings, watch.timing))
        await self._let_go(attempt)

    async def _see_post_copy(self, attempt: Attempt) -> None:
        """Go on watching a transfer that was switched to post-copy: memory flows until the copy can be removed."""
        with contextlib.suppress(HypervisorError):
            reading = await self.session(attempt).progress()
            if reading is not None and reading.postcopy:
                attempt.progress = progress_to_proto(reading)
                self._watch(attempt)

    async def _resume(self, attempt: Attempt) -> None:
        changes: dict[str, object] = {}

        async def resume() -> None:
            domain = await look_up(self._host, attempt)
            if domain is None or not domain.postcopy:  # else the rest of its memory was lost with the destination's copy
                with contextlib.suppress(DomainNotFound):
                    await self.session(attempt).resume()
                domain = await look_up(self._host, attempt)
            if domain is None or domain.postcopy or domain.state in (DomainState.SHUTOFF, DomainState.CRASHED):
                changes["failure"] = self._lost(attempt, domain)

        with timed("confirm") as watch:
            await retry(attempt, "resuming the guest at the source", resume)
        await attempt.report(_E.RESUME_DONE, timings=(*attempt.record.timings, watch.timing), **changes)

    async def _release(self, attempt: Attempt) -> None:
        await attempt.ended(_F.BEGIN, _F.PERFORM, _F.RESUME, _F.ABORT)
        await self._let_go(attempt)

    async def _let_go(self, attempt: Attempt) -> None:
        attempt.stop("guest")
        attempt.stop("peer")
        self._followers.pop(attempt, None)
        if session := self._sessions.pop(attempt, None):
            await session.close()


def _transfer(attempt: Attempt) -> list[asyncio.Task[None]]:
    """Return the tasks that last as long as the transfer may; none once nothing is sent any more."""
    if not sends(attempt.record.state, attempt.progress):
        return []
    return attempt.running(*((_F.PERFORM, _F.LOOK) if attempt.record.state == _S.PERFORMING else ("guest",)))
