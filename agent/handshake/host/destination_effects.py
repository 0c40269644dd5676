"""The effects of the destination's machine: they act on the hypervisor and report the result as events."""

import asyncio
import contextlib
import time
from typing import Final

import structlog

from agent.handshake.host.attempt import Attempt, retry
from agent.handshake.host.copy_watch import CopyWatch
from agent.handshake.host.journal import Journal
from agent.handshake.host.phases import (
    LocalHost,
    failed,
    failure_of,
    look_up,
)
from agent.handshake.host.stopwatch import Stopwatch, timed
from agent.handshake.machines.destination import DestinationEffect, DestinationEvent, DestinationState
from agent.handshake.machines.facts import destination_fact
from agent.hypervisor.base import RESUMED, DomainBusy, DomainNotFound, DomainState, TransferFailed
from agent.hypervisor.guest_fact import GuestFact, GuestState
from agent.hypervisor.interface import Incoming

log = structlog.get_logger()

_S, _E, _F = DestinationState, DestinationEvent, DestinationEffect

_FINISH_ENDS_WITHIN: Final = 5.0
"""Seconds for which the end of a waiting Finish is awaited after its copy was given up."""


class DestinationEffects:
    """The runner of the effects. Keeps the hypervisor's handle for each attempt."""

    def __init__(self, host: LocalHost, journal: Journal) -> None:
        self._host = host
        self._journal = journal
        self._copies = CopyWatch(host, self._session)
        self._sessions: dict[Attempt, Incoming] = {}

    async def run(self, attempt: Attempt, effect: str) -> None:
        await {
            _F.PREPARE: self._prepare,
            _F.FINISH: self._finish,
            _F.ABANDON: self._abandon,
            _F.LOOK: self._look,
            _F.DISOWN: self._disown,
        }[DestinationEffect(effect)](attempt)

    def _session(self, attempt: Attempt) -> Incoming:
        if attempt not in self._sessions:
            self._sessions[attempt] = self._host.hypervisor.incoming(attempt.record.domain_uuid)
        return self._sessions[attempt]

    async def _prepare(self, attempt: Attempt) -> None:
        record = attempt.record
        try:
            with timed("prepare") as watch:
                if record.had_definition:  # it must not start with the host before the decision; see `aftercare`
                    with contextlib.suppress(DomainNotFound):
                        await self._host.hypervisor.set_autostart(record.domain_uuid, False)
                async with attempt.reporting_wait(f"the hypervisor of {self._host.name} to prepare the copy"):
                    prepared = await self._session(attempt).prepare(
                        record.domain_xml,
                        record.cookies["begin"],
                        record.user_options,
                        record.destination_name,
                        record.listen,
                        record.uri,
                    )
        except Exception as error:
            await attempt.report(_E.PREPARE_FAILED, failure=failure_of(error, self._host.name))
            return
        attempt.saw(GuestFact(GuestState.WAITING, "migration", time.time()))
        self._copies.start(attempt)
        await attempt.report(
            _E.PREPARE_DONE,
            uri=prepared.uri,
            cookies={**attempt.record.cookies, "prepare": prepared.cookie},
            timings=(*attempt.record.timings, watch.timing),
        )

    async def _finish(self, attempt: Attempt) -> None:
        record, cookie = attempt.record, attempt.record.cookies.get("perform", b"")
        session = self._session(attempt)
        try:
            with timed("finish") as watch:
                arrival = attempt.start("arrival", self._arrival(attempt, watch))
                try:
                    finished = await session.finish(
                        record.domain_xml, cookie, record.user_options, record.destination_name, record.stored
                    )
                finally:
                    arrival.cancel()  # Finish has returned and reports the result
        except TransferFailed as error:
            cause = await self._copies.cause(attempt, error)
            await attempt.report(_E.FINISH_FAILED, **(failed(attempt, cause) if cause else {}))
        except Exception as error:
            await attempt.report(
                _E.FINISH_UNKNOWN,
                waiting_for=f"the copy to run or end, as Finish gave no answer: {failure_of(error, self._host.name).message}"[:500],
            )
        else:
            if attempt.record.state == _S.ARMED:
                attempt.saw(GuestFact(GuestState.RUNNING, "migrated", time.time()), look_again=True)  # it may have arrived paused
            await attempt.report(
                _E.FINISH_DONE,
                cookies={**attempt.record.cookies, "finish": finished.cookie},
                timings=(*attempt.record.timings, watch.timing),
                failure=None,
            )
            if attempt.record.cookies.get("finish") != finished.cookie:  # `_arrival` reported the start first
                await attempt.note(cookies={**attempt.record.cookies, "finish": finished.cookie})

    async def _arrival(self, attempt: Attempt, finish: Stopwatch) -> None:
        """Report the start of the copy as soon as the hypervisor's event shows it. The start is the commit, and Finish returns
        later (in post-copy much later).
        """
        async for event in self._host.hypervisor.events():
            started = event.uuid == attempt.record.domain_uuid and event.kind == RESUMED
            if started and destination_fact(await look_up(self._host, attempt)) is _E.SAW_RUNNING:
                await attempt.report(_E.SAW_RUNNING, timings=(*attempt.record.timings, finish.timing), failure=None)
                return

    async def _look(self, attempt: Attempt) -> None:
        """Ask until the copy runs or is absent, and report it. Waits for a copy that waits for its stream: libvirtd may still start
        it."""
        self._copies.start(attempt)
        fact: DestinationEvent | None = None
        while fact is None and attempt.record.state == _S.ARMED:
            domain = await look_up(self._host, attempt)
            fact = destination_fact(domain)
            if domain is not None and domain.has_run and self._session(attempt).never_ran:
                fact = _E.SAW_ABSENT  # a signal ended it before it ran, as a shutdown of this host does
            if fact is None:
                await self._host.clock.sleep(0.1)  # libvirt has no event for an incoming copy that ended with its daemon
        if fact is not None:
            await attempt.report(fact, waiting_for="")

    async def _abandon(self, attempt: Attempt) -> None:
        await attempt.ended(_F.PREPARE)
        ran = False

        async def abandon() -> None:
            nonlocal ran
            try:
                await self._session(attempt).abandon()
            except DomainBusy:
                ran = True

        async def clear() -> None:
            """Remove a definition that Finish stored where there was none before, unless the guest has run here."""
            domain = await look_up(self._host, attempt)
            if domain is not None and domain.state in (DomainState.SHUTOFF, DomainState.CRASHED) and not domain.has_run:
                await self._host.hypervisor.disown(domain.uuid)

        await retry(attempt, "destroying the copy at the destination (a process that is stopped is killed within 15 s)", abandon)
        with contextlib.suppress(TimeoutError):  # its call must not outlive the attempt and hit the guest's next one
            async with asyncio.timeout(_FINISH_ENDS_WITHIN):
                await attempt.ended(_F.FINISH)
        if not ran and not attempt.record.had_definition:
            await retry(attempt, "removing what the copy left at the destination", clear)
        if ran:
            log.critical("a copy that was to be destroyed has run", migration=attempt.record.migration_id)
        statement = attempt.record.statement
        if ran and statement is not None and statement.dead_host == self._host.name:
            await self._disown(attempt)  # the agent was restarted during a disown
            return
        if ran:
            await attempt.report(_E.ABANDON_REFUSED, failure=None)
        else:
            await attempt.report(_E.ABANDON_DONE, **await self._copies.explain(attempt))

    async def _disown(self, attempt: Attempt) -> None:
        async def disown() -> None:
            with contextlib.suppress(DomainNotFound):
                await self._host.hypervisor.disown(attempt.record.domain_uuid)

        if await self._brought(attempt):  # else it has left, or came again by a later attempt, which the statement is not about
            await retry(attempt, "removing the copy here, as an operator stated that this host was dead", disown)
        else:
            log.critical(
                "a guest that was resumed elsewhere by an operator's statement has already left this host; two copies may run",
                migration=attempt.record.migration_id,
            )
        await attempt.report(_E.ABANDON_DONE)

    async def _brought(self, attempt: Attempt) -> bool:
        """Return whether it is this attempt by which the guest is here."""
        brought = True

        async def ask() -> None:
            nonlocal brought
            brought = await self._journal.brought(attempt.record)

        await retry(attempt, "reading from the journal by which attempt the guest came here", ask)
        return brought

    async def close(self, attempt: Attempt) -> None:
        """Close the hypervisor's handle of an attempt that has ended, once its effects have ended."""
        self._copies.stop(attempt)
        await attempt.ended(_F.PREPARE, _F.FINISH, _F.ABANDON, _F.LOOK)
        if session := self._sessions.pop(attempt, None):
            await session.close()
