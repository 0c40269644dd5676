"""The destination of a migration: ReserveSlot, Prepare, Finish, Abandon, and what they do to the hypervisor."""

import asyncio
import contextlib
import time
from typing import Final

import structlog

from agent.admission.slots import Slots
from agent.errors import DroverError, Reason
from agent.features import settled
from agent.handshake.arrival import check_arrival, never_here
from agent.handshake.attempt import Attempt, Told, retry
from agent.handshake.attempts import Attempts
from agent.handshake.copy_watch import CopyWatch
from agent.handshake.destination import DestinationEffect, DestinationEvent, DestinationState
from agent.handshake.facts import destination_fact
from agent.handshake.guest_fact import GuestFact, GuestState
from agent.handshake.owner import Owner
from agent.handshake.path import PathProbes
from agent.handshake.peer_record import PeerRecords
from agent.handshake.phases import (
    MAX_WAIT,
    LocalHost,
    check_same,
    check_word,
    failed,
    failure_of,
    look_up,
    overtaken,
    phase_changes,
    stated_changes,
    wait_of,
)
from agent.handshake.records import Failure, Role, options_from_proto
from agent.handshake.stopwatch import Stopwatch, timed
from agent.handshake.stored import changes_of, check_documents
from agent.hypervisor.base import RESUMED, DomainBusy, DomainNotFound, DomainState, TransferFailed
from agent.hypervisor.interface import Incoming
from agent.networks import listen_on
from drover.agent.v1 import handshake_pb2 as pb

log = structlog.get_logger()

_S, _E, _F = DestinationState, DestinationEvent, DestinationEffect

_AFTER_PREPARE: Final = frozenset(_S) - {_S.RESERVED, _S.PREPARING, _S.ABANDONING}
_FINISH_ENDS_WITHIN: Final = 5.0
"""Seconds after its copy was given up within which a waiting Finish ends."""

_DECIDED: Final = frozenset({_S.RUNNING, _S.GONE})


class DestinationSide:
    """Serves the destination's calls."""

    def __init__(self, host: LocalHost, attempts: Attempts, slots: Slots, owner: Owner, peers: PeerRecords) -> None:
        self._host = host
        self._attempts = attempts
        self._slots = slots
        self._owner = owner
        self._copies = CopyWatch(host)
        self._peers = peers
        self._probes = PathProbes(host)
        self._sessions: dict[Attempt, Incoming] = {}
        self._held_since: dict[Attempt, float] = {}
        """When a slot was taken, in this life of the agent, by the monotonic clock."""

    # ---- calls

    async def reserve_slot(self, request: pb.ReserveSlotRequest) -> pb.ReserveSlotResponse:
        attempt = await self._attempts.of(request.ref, Role.DESTINATION)
        async with attempt.called(_E.RESERVE):
            if attempt.record.state:
                self._joined(attempt, request)  # another migration with this id learns that, whatever may be called now
                await attempt.apply(_E.RESERVE, expires=self._expiry())
            else:
                await self._attempts.open(attempt, lambda: self._open(attempt, request))
                self._joined(attempt, request)  # it may have been another one that opened it meanwhile
            probe = await self._probes.of(attempt) if attempt.record.state == _S.RESERVED else None
            return pb.ReserveSlotResponse(record=self._host.show(attempt.record), probe=probe)

    def _joined(self, attempt: Attempt, request: pb.ReserveSlotRequest) -> dict[str, object]:
        """What a ReserveSlot of a known attempt adds to the record: nothing. It must be about the same migration."""
        changes = phase_changes(attempt, "reserve", request)
        check_same(
            attempt,
            self._host.name,
            agent=request.source_agent,
            peer_host=request.source_host,
            domain_uuid=request.requirements.uuid,
            destination_name=request.destination_name or request.requirements.name,
            options=options_from_proto(request.options),
        )
        return changes

    async def _open(self, attempt: Attempt, request: pb.ReserveSlotRequest) -> None:
        self._check_room(attempt)
        with self._attempts.claim(request.requirements.uuid, request.requirements.name):
            with timed("reserve") as watch:
                had_definition = await check_arrival(self._host, request)
            listen = listen_on(self._host.networks, self._host.features, request.network, request.uri_in)
            self._host.check_listens_on(listen.address)
            await self._probes.open(attempt, listen.address)
            await attempt.apply(
                _E.RESERVE,
                lambda: phase_changes(attempt, "reserve", request),
                epoch=self._attempts.journal.next_epoch(),
                had_definition=had_definition,
                expires=self._expiry(),
                domain_name=request.destination_name or request.requirements.name,
                domain_uuid=request.requirements.uuid,
                destination_name=request.destination_name or request.requirements.name,
                peer_host=request.source_host,
                peer_agent=request.source_agent,
                options=options_from_proto(settled(request.options, self._host.features)),
                uri=listen.uri,
                listen=listen.address,
                timings=(watch.timing,),
            )
            if not attempt.record.final:
                self._held_since[attempt] = time.monotonic()
        self.recover(attempt)

    def _expiry(self) -> float:
        return time.time() + self._host.lease_seconds

    def _check_room(self, newcomer: Attempt) -> None:
        now = time.monotonic()
        others = [a for a in self._attempts.active(Role.DESTINATION) if a is not newcomer]
        self._slots.check([now - self._held_since.get(a, now) for a in others])

    async def prepare(self, request: pb.PrepareRequest) -> pb.PrepareResponse:
        attempt = await self._attempts.of(request.ref, Role.DESTINATION)
        async with attempt.called(_E.PREPARE):
            await self._known(attempt, _E.PREPARE, lambda: self._prepared(attempt, request))
            record = await attempt.until(_AFTER_PREPARE, MAX_WAIT)
            if record.state == _S.GONE and record.failure is not None:
                raise record.failure.error()
            uri = record.uri if record.state != _S.PREPARING else ""  # its port is not known yet
            return pb.PrepareResponse(record=self._host.show(record), cookie_out=record.cookies.get("prepare", b""), uri_out=uri)

    def _prepared(self, attempt: Attempt, request: pb.PrepareRequest) -> dict[str, object]:
        """What the first Prepare adds to the record."""
        changes = phase_changes(attempt, "prepare", request)
        if attempt.record.state != _S.RESERVED:
            return {}
        self._check_lease(attempt, request.slot_epoch)
        stored = check_documents(self._host, attempt.record.domain_uuid, request)
        cookies = {**attempt.record.cookies, "begin": request.cookie_in}
        if request.network or request.uri_in:
            listen = listen_on(self._host.networks, self._host.features, request.network, request.uri_in)
            self._host.check_listens_on(listen.address)
            changes |= {"uri": listen.uri, "listen": listen.address}
        changes |= {"domain_xml": request.domain_xml, "cookies": cookies, "expires": self._expiry()}
        return changes | changes_of(stored, arrives=True)

    @staticmethod
    def _check_lease(attempt: Attempt, epoch: int) -> None:
        if epoch != attempt.record.epoch:
            raise DroverError(
                Reason.STALE_LEASE,
                f"slot epoch {epoch} is not the one of this lease ({attempt.record.epoch}); reserve the slot again",
                metadata={"epoch": str(attempt.record.epoch)},
            )

    async def finish(self, request: pb.FinishRequest) -> pb.FinishResponse:
        attempt = await self._attempts.of(request.ref, Role.DESTINATION)
        async with attempt.called(_E.FINISH):
            await self._known(attempt, _E.FINISH, lambda: self._finished(attempt, request))
            record = await attempt.until(_DECIDED, wait_of(request.wait, unset=0.0))
            return pb.FinishResponse(record=self._host.show(record), cookie_out=record.cookies.get("finish", b""))

    @staticmethod
    def _finished(attempt: Attempt, request: pb.FinishRequest) -> dict[str, object]:
        """What the first Finish adds to the record."""
        changes = phase_changes(attempt, "finish", request)
        if attempt.record.state != _S.PREPARED:
            return {}
        return changes | {"cookies": {**attempt.record.cookies, "perform": request.cookie_in}}

    async def abandon(self, request: pb.AbandonRequest) -> pb.AbandonResponse:
        attempt = await self._attempts.of(request.ref, Role.DESTINATION)
        event = _E.ABANDON_SOURCE_KEPT if request.source_kept else _E.ABANDON
        stated = request.HasField("operator_word")
        async with attempt.called(event), self._attempts.forgotten_unless_known(attempt):
            check_same(attempt, self._host.name, domain_uuid=request.domain_uuid, peer_host=request.source_host)
            told: dict[str, object] = {"failure": Failure(Reason.GIVEN_UP, "the copy was given up before its commit")}
            if stated:
                check_word(attempt, request.operator_word)
            if asked := event is _E.ABANDON_SOURCE_KEPT and attempt.record.state == _S.ARMED:
                by_word = await self._peers.check_nothing_flows(attempt, request.source_record, stated_dead=stated)
                told = stated_changes(attempt, request.operator_word) if by_word else told
            elif not attempt.record.domain_uuid and request.domain_uuid:
                told = await never_here(self._host, request)

            def changes() -> dict[str, object]:
                record = attempt.record
                if record.state == _S.ARMED and not asked:
                    raise overtaken(attempt)
                explained = record.failure is not None or record.final  # why it ended, or it will not be changed any more
                return {} if told.keys() <= {"failure"} and explained else told

            await attempt.apply(event, changes)
            record = await attempt.until(_DECIDED, MAX_WAIT)
            return pb.AbandonResponse(record=self._host.show(record))

    async def _known(self, attempt: Attempt, event: DestinationEvent, told: Told) -> None:
        """Apply a call; an attempt that was made for a call that was refused is forgotten again."""
        try:
            await attempt.apply(event, told)
        finally:
            self._attempts.forget_unless_known(attempt)

    # ---- the lease

    def recover(self, attempt: Attempt) -> None:
        """The lease runs from now on, and is renewed by every call. It has no say over a copy that is armed."""
        attempt.on_silence(self._host.lease_seconds, lambda: self._expired(attempt))

    def _expired(self, attempt: Attempt) -> None:
        attempt.start("lease", self._end_or_renew(attempt))

    async def _end_or_renew(self, attempt: Attempt) -> None:
        """A silent driver ends no transfer: a copy whose source sends keeps its slot."""
        if attempt.record.state in (_S.PREPARED, _S.ARMED) and await self._owner.may_come(attempt):
            self.recover(attempt)
            return
        text = f"nobody asked for the next phase within {self._host.lease_seconds:g} s; the slot is free again"
        await attempt.report(_E.LEASE_EXPIRED, failure=Failure(Reason.LEASE_EXPIRED, text))

    def on_final(self, attempt: Attempt) -> None:
        since = self._held_since.pop(attempt, None)
        if since is not None and attempt.record.state == _S.RUNNING:
            self._slots.arrived(time.monotonic() - since)
        attempt.start("close", self._close(attempt))
        if attempt.record.state == _S.RUNNING:
            self._owner.arrived()

    # ---- effects

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
            fact = destination_fact(await look_up(self._host, attempt))
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
            brought = await self._attempts.journal.brought(attempt.record)

        await retry(attempt, "reading by which attempt the guest came here", ask)
        return brought

    async def _close(self, attempt: Attempt) -> None:
        self._copies.stop(attempt)
        await attempt.ended(_F.PREPARE, _F.FINISH, _F.ABANDON, _F.LOOK)
        await self.let_go(attempt)

    async def let_go(self, attempt: Attempt) -> None:
        """See `attempt.LetGo`."""
        if session := self._sessions.pop(attempt, None):
            await session.close()
