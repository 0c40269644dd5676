"""The effects of a destination: what its machine does to the hypervisor, and the news of it."""

import asyncio
import contextlib
import time
from typing import Final

import structlog

from agent.handshake.attempt import Attempt, retry
from agent.handshake.copy_watch import CopyWatch
from agent.handshake.destination import DestinationEffect, DestinationEvent, DestinationState
from agent.handshake.facts import destination_fact
from agent.handshake.guest_fact import GuestFact, GuestState
from agent.handshake.phases import (
    LocalHost,
    failed,
    failure_of,
    look_up,
)
from agent.handshake.stopwatch import Stopwatch, timed
from agent.hypervisor.base import RESUMED, DomainBusy, DomainNotFound, DomainState, TransferFailed
from agent.hypervisor.interface import Incoming
from agent.journal import Journal

log = structlog.get_logger()

_S, _E, _F = DestinationState, DestinationEvent, DestinationEffect

_FINISH_ENDS_WITHIN: Final = 5.0
"""Seconds after its copy was given up within which a waiting Finish ends."""


class DestinationEffects:
    """Carries them out, by the hypervisor's handle for each attempt."""

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
                if record.had_definition:  # what a migration left behind does not start by itself; see `aftercare`
                    with contextlib.suppress(DomainNotFound):
                        await self._host.hypervisor.set_autostart(record.domain_uuid, False)
                async with attempt.telling(f"the hypervisor of {self._host.name} to prepare"):
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
                    arrival.cancel()  # Finish tells it all now
        except TransferFailed as error:
            cause = await self._copies.cause(attempt, error)
            await attempt.report(_E.FINISH_FAILED, **(failed(attempt, cause) if cause else {}))
        except Exception as error:
            await attempt.report(
                _E.FINISH_UNKNOWN, waiting_for=f"Finish gave no answer: {failure_of(error, self._host.name).message}"[:500]
            )
        else:
            if attempt.record.state == _S.ARMED:
                attempt.saw(GuestFact(GuestState.RUNNING, "migrated", time.time()), look_again=True)  # or it arrived paused
            await attempt.report(
                _E.FINISH_DONE,
                cookies={**attempt.record.cookies, "finish": finished.cookie},
                timings=(*attempt.record.timings, watch.timing),
                failure=None,
            )
            if attempt.record.cookies.get("finish") != finished.cookie:  # the event of its start was quicker
                await attempt.note(cookies={**attempt.record.cookies, "finish": finished.cookie})

    async def _arrival(self, attempt: Attempt, finish: Stopwatch) -> None:
        """Finish returns some time after the guest has started here (in post-copy long after): the start is the commit, so
        look for it.
        """
        async for event in self._host.hypervisor.events():
            started = event.uuid == attempt.record.domain_uuid and event.kind == RESUMED
            if started and destination_fact(await look_up(self._host, attempt)) is _E.SAW_RUNNING:
                await attempt.report(_E.SAW_RUNNING, timings=(*attempt.record.timings, finish.timing), failure=None)
                return

    async def _look(self, attempt: Attempt) -> None:
        """Ask until the copy runs or is absent. One that waits for its stream is waited for: libvirtd may still start it."""
        self._copies.start(attempt)
        fact: DestinationEvent | None = None
        while fact is None and attempt.record.state == _S.ARMED:
            domain = await look_up(self._host, attempt)
            fact = destination_fact(domain)
            if domain is not None and domain.has_run and self._session(attempt).never_ran:
                fact = _E.SAW_ABSENT  # a signal ended it, as a shutdown of this host sends it
            if fact is None:
                await asyncio.sleep(0.1)  # no event tells that an incoming copy has gone away with its daemon
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
            """A definition that Finish stored, where there was none before; a guest that has run here has a right to its own."""
            domain = await look_up(self._host, attempt)
            if domain is not None and domain.state in (DomainState.SHUTOFF, DomainState.CRASHED) and not domain.has_run:
                await self._host.hypervisor.disown(domain.uuid)

        await retry(attempt, "giving up the copy at the destination (a process that is stopped is killed within 15 s)", abandon)
        with contextlib.suppress(TimeoutError):  # its call to the hypervisor must not outlive the attempt and meet the next one
            async with asyncio.timeout(_FINISH_ENDS_WITHIN):
                await attempt.ended(_F.FINISH)
        if not ran and not attempt.record.had_definition:
            await retry(attempt, "removing what the copy left at the destination", clear)
        if ran:
            log.critical("a copy that was to be given up runs", migration=attempt.record.migration_id)
        word = attempt.record.operator_word
        if ran and word is not None and word.dead_host == self._host.name:
            await self._disown(attempt)  # it was under way when this agent was restarted
            return
        if ran:
            await attempt.report(_E.ABANDON_REFUSED, failure=None)
        else:
            await attempt.report(_E.ABANDON_DONE, **await self._copies.explain(attempt))

    async def _disown(self, attempt: Attempt) -> None:
        async def disown() -> None:
            with contextlib.suppress(DomainNotFound):
                await self._host.hypervisor.disown(attempt.record.domain_uuid)

        if await self._brought(attempt):  # else it has left, or came again by a later attempt, which the word is not about
            await retry(attempt, "removing the copy that an operator's word took from this host", disown)
        else:
            log.critical(
                "a guest that a statement took from this host has left since; it may run twice",
                migration=attempt.record.migration_id,
            )
        await attempt.report(_E.ABANDON_DONE)

    async def _brought(self, attempt: Attempt) -> bool:
        brought = True

        async def ask() -> None:
            nonlocal brought
            brought = await self._journal.brought(attempt.record)

        await retry(attempt, "reading by which attempt the guest came here", ask)
        return brought

    async def close(self, attempt: Attempt) -> None:
        """An attempt has ended: let go of its hypervisor once nothing is under way there."""
        self._copies.stop(attempt)
        await attempt.ended(_F.PREPARE, _F.FINISH, _F.ABANDON, _F.LOOK)
        if session := self._sessions.pop(attempt, None):
            await session.close()
