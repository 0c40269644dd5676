"""One migration on its source.

Finish is armed early, so a guest that was suspended for the switch-over may run at the destination at any moment after. libvirt
does not know that, and would resume it here whenever the transfer fails from then on:

- libvirtd dies and starts again: `guard` and `switchover` keep it from that;
- the transfer is aborted (seen: two copies, 21 times of 22): `abort` waits for the switch-over to end by itself;
- its stream breaks (3 of 22): `perform` pauses the guest again at once, and the destination decides.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

import libvirt

from agent.hypervisor.base import (
    Begun,
    DomainBusy,
    DomainEvent,
    DomainNotFound,
    DomainState,
    HypervisorError,
    HypervisorUnavailable,
    Incompatible,
    NoTransfer,
    Options,
    Performed,
    Progress,
    TransferFailed,
)
from agent.hypervisor.libvirt import connecting, leaving, phases, threads
from agent.hypervisor.libvirt import domain as domains
from agent.hypervisor.libvirt import options as words
from agent.hypervisor.libvirt.connection import Link, Pool, Session, unwrap
from agent.hypervisor.libvirt.events import QEMU_MIGRATION
from agent.hypervisor.libvirt.guard import Guard, hold, is_held, is_switching, settle, stopped_by_user
from agent.hypervisor.libvirt.removal import flow, in_postcopy, refuse_arrival, refuse_half_a_guest, remove, state_of
from agent.hypervisor.libvirt.stored import remove_leftovers
from agent.hypervisor.libvirt.switchover import CANCELLABLE

T = TypeVar("T")

RETRY_SECONDS = 0.01
"""Between Perform's call and the moment that its memory flows there is nothing to act upon yet: ask again so often."""

SWITCH_BEGINS_SECONDS = 0.05
"""QEMU begins the switch-over so soon after it has stopped the guest, unless a disk takes long to flush."""

SWITCH_SECONDS = 5.0
"""A guest that was stopped for the switch-over longer than this is stuck (its destination died without a word, or the line is
cut): far beyond any `maxdowntime`. Only then may it be aborted, and only to be held.
"""

CLOSE_SECONDS = 2.0
"""An aborted Perform returns well within this."""


class LibvirtOutgoing:
    """`base.Outgoing`. A fresh handle, after a restart of the agent, does all that needs no live connection."""

    def __init__(
        self, uuid: str, session: Session, pool: Pool, guard: Guard, events: Callable[[], AsyncIterator[DomainEvent]]
    ) -> None:
        self._uuid = uuid
        self._session = session
        self._pool = pool
        self._guard = guard
        self._events = events
        self._name = ""
        self._has_stopped = False  # the guest was, since Perform began
        self._switches = asyncio.Event()  # QEMU has begun the switch-over
        self._paused_by_user = False
        self._stopped_at = 0.0  # when `abort` first found the guest stopped for the switch-over
        self._must_hold = False  # it was aborted all the same
        self._begun: Link | None = None  # the connection that holds libvirt's migration job
        self._performed = False  # Perform succeeded on it: only now is there something to confirm
        self._performing: asyncio.Future[tuple[bytes, Progress] | HypervisorError] | None = None
        self._outcome_is_known = False  # libvirtd itself has said how Perform ended, or it was settled
        self._remember("", Options(), "")

    async def begin(self, options: Options, destination_name: str) -> Begun:
        words.flags(options)  # refuses what is not supported before anything is asked

        def begin(connection: Any) -> tuple[str, bytes]:
            domain = domains.by_uuid(connection, self._uuid)
            self._name = domain.name()
            return leaving.begin(domain, self._guard.service, options, destination_name)

        link = self._begun = await self._session.open()
        with leaving.refusals():
            xml, cookie = await self._session.call(begin, on=link)
        self._remember(xml, options, destination_name)
        return Begun(xml, cookie)

    async def perform(
        self, uri: str, domain_xml: str, cookie: bytes, options: Options, destination_name: str, bandwidth: int
    ) -> Performed:
        try:
            return await self._perform(uri, domain_xml, cookie, options, destination_name, bandwidth)
        except Exception:
            # Refused or failed, it will not be confirmed: the job that Begin opened would hold the guest until this agent ends.
            if not self._must_hold and not self._is_performing:
                self._begun = None
                await self._session.close()
            raise

    async def _perform(
        self, uri: str, domain_xml: str, cookie: bytes, options: Options, destination_name: str, bandwidth: int
    ) -> Performed:
        flags = words.flags_for(options, domain_xml)
        limit = words.mebibytes(bandwidth)
        params = {**leaving.params(destination_name)} | {
            libvirt.VIR_MIGRATE_PARAM_URI: uri,
            libvirt.VIR_MIGRATE_PARAM_DEST_XML: words.unmarked(domain_xml),
        }
        if limit:
            params[libvirt.VIR_MIGRATE_PARAM_BANDWIDTH] = limit
            if flags & libvirt.VIR_MIGRATE_POSTCOPY:
                params[libvirt.VIR_MIGRATE_PARAM_BANDWIDTH_POSTCOPY] = limit

        def perform(connection: Any) -> tuple[bytes, Progress]:
            domain = domains.by_uuid(connection, self._uuid)
            self._guard.watch(domain.name())
            out = phases.perform(domain, params, cookie, flags)
            self._performed = True  # here and not where it is awaited: an await may be cancelled, the fact stays
            return out, _final(domain)

        self._remember(domain_xml, options, destination_name)
        link = self._begun = self._begun if self._begun and self._begun.alive else await self._session.open()

        live = words.wants(options, "live") and "paused" not in words.marks_of(domain_xml)
        stopping = asyncio.create_task(self._see_it_stop(self._events(), live), name="libvirt-switch-over")
        self._performing = self._session.start(perform, link)
        try:
            out, final = unwrap(await asyncio.shield(self._performing))
        except HypervisorUnavailable:
            await self._guard.mend()
            raise
        except HypervisorError as error:
            self._outcome_is_known = True
            self._must_hold |= self._has_stopped
            if isinstance(error, (DomainNotFound, DomainBusy, Incompatible)) and not self._must_hold:
                raise  # refused before anything was done to the guest
            await self.settle()
            raise TransferFailed(str(error), error.native) from None
        finally:
            stopping.cancel()
        self._outcome_is_known = True
        return Performed(out, final)

    @property
    def paused_by_user(self) -> bool:
        return self._paused_by_user

    async def _see_it_stop(self, events: AsyncIterator[DomainEvent], live: bool) -> None:
        """libvirt tells that the guest was stopped for the switch-over well before it tells that Perform failed."""
        asking: asyncio.Task[None] | None = None
        try:
            async for event in events:
                if event.uuid != self._uuid:
                    continue
                if event.kind == QEMU_MIGRATION and event.detail not in CANCELLABLE - {"pre-switchover"}:
                    self._switches.set()
                if event.kind == "suspended":
                    self._has_stopped = True
                    if live and asking is None:
                        asking = asyncio.create_task(self._ask_who_stopped_it(), name="libvirt-who-stopped-it")
        finally:
            if asking is not None:
                asking.cancel()

    async def _ask_who_stopped_it(self) -> None:
        """libvirt gives a pause by the guest's user the same reason as that of the switch-over. QEMU begins the switch-over right
        after it stopped the guest, and knows why it did. It is asked only where the first does not hold: that taints the domain.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SWITCH_BEGINS_SECONDS):
                await self._switches.wait()
                return
        with contextlib.suppress(HypervisorError):
            self._paused_by_user = await self._call(stopped_by_user)

    async def abort(self) -> None:
        """Nothing, once the guest was stopped for the switch-over: the end is near, and it is the destination's to tell."""
        live = words.wants(self._options, "live")
        idle = self._paused_by_user and not self._switches.is_set()
        if live and not idle and await self._call(is_switching):
            self._stopped_at = self._stopped_at or time.monotonic()
            if time.monotonic() - self._stopped_at < SWITCH_SECONDS:
                return
            self._must_hold = True

        def abort(domain: Any) -> bool:
            # Looked at last of all: once Perform has ended, what is under way may be the guest's next migration. In post-copy it
            # ends early, and libvirt itself refuses.
            return (self._outcome_is_known and not in_postcopy(domain)) or _abort(domain)

        await self._while_starting(abort)

    async def unanswered(self, uri: str) -> int | None:
        with contextlib.suppress(OSError, HypervisorUnavailable):
            found = await _in_thread(lambda: connecting.unanswered(uri))
            return max((connection.retransmits for connection in found), default=None)
        return None

    async def stop_connecting(self, uri: str) -> None:
        try:
            await _in_thread(lambda: [connecting.end(connection) for connection in connecting.unanswered(uri)])
        except OSError as error:
            raise HypervisorError(error.strerror or str(error)) from None

    async def progress(self) -> Progress | None:
        try:
            reading = await self._call(_progress)
        except DomainNotFound:
            return None
        # libvirt shows the job as running until Confirm; after Perform, memory flows only in post-copy.
        return reading if reading is None or reading.postcopy or not self._performed else None

    async def start_postcopy(self) -> None:
        if not await self._while_starting(_start_postcopy):
            raise NoTransfer("there is no transfer to switch to post-copy")

    async def set_bandwidth(self, bandwidth: int) -> None:
        limit = words.mebibytes(bandwidth)
        if not await self._while_starting(lambda domain: _set_bandwidth(domain, limit)):
            raise NoTransfer("there is no transfer whose bandwidth could be limited")

    async def remove(self, cookie: bytes, options: Options) -> None:
        undefine = words.wants(options, "undefine_source")
        with contextlib.suppress(DomainNotFound):
            if words.wants(options, "post_copy"):
                await self._call(refuse_half_a_guest)
            await self._confirm(cookie, options, cancelled=False)
            await self._call(lambda domain: None)  # where Confirm has removed it, nothing is left to do
            try:
                await self._session.call(lambda connection: remove(domains.by_uuid(connection, self._uuid), undefine))
            except BaseException:
                await self._session.close()  # ends a job that `remove` began
                raise
        if undefine:
            await self._guard.forget_definition(lambda run: remove_leftovers(run, self._uuid, self._name))

    async def settle(self) -> None:
        with contextlib.suppress(DomainNotFound):
            if self._must_hold:
                await self._call(hold)
            elif not self._outcome_is_known:
                await self._call(settle)
            self._outcome_is_known, self._must_hold = True, False

    async def resume(self) -> None:
        await self._call(_refuse_foreign)
        await self._confirm(b"", self._options, cancelled=True)
        await self._call(_resume)

    async def close(self) -> None:
        if self._is_performing:
            with contextlib.suppress(HypervisorError):
                await self.abort()
            # A transfer that cannot be aborted (post-copy) is left to libvirtd; its connection closes at its end.
            await self._wait_for_perform(CLOSE_SECONDS)
        if not self._is_performing:
            await self._guard.forget()
        self._begun = None
        await self._session.close()

    def _remember(self, domain_xml: str, options: Options, destination_name: str) -> None:
        """What Confirm needs again: the same flags and names in all phases."""
        self._domain_xml, self._options, self._destination_name = domain_xml, options, destination_name

    async def _call(self, function: Callable[[Any], T]) -> T:
        """A short call about this guest, beside its phases."""
        return await self._pool.call(lambda connection: function(domains.by_uuid(connection, self._uuid)))

    async def _while_starting(self, act: Callable[[Any], bool]) -> bool:
        """Do what needs a transfer under way; False where there is none.

        Right after the call of Perform, libvirt has no job yet to act upon: what comes then must not get lost.
        """
        while True:
            starting = self._is_performing
            if await self._call(act):
                return True
            if not starting:
                return False
            await self._wait_for_perform(RETRY_SECONDS)

    async def _wait_for_perform(self, timeout: float) -> None:
        if self._performing is not None:
            await asyncio.wait({self._performing}, timeout=timeout)

    @property
    def _is_performing(self) -> bool:
        return self._performing is not None and not self._performing.done()

    async def _confirm(self, cookie: bytes, options: Options, cancelled: bool) -> None:
        """End libvirt's own migration job, where it is still ours to end. Who calls this looks at the facts afterwards:
        where Confirm failed, or could not be called, plain calls do what it would have done.
        """
        link = self._begun
        if not self._performed or link is None or not link.alive:
            return
        flags = words.flags_for(options, self._domain_xml)
        params = leaving.params(self._destination_name)

        def confirm(connection: Any) -> None:
            phases.confirm(domains.by_uuid(connection, self._uuid), params, cookie, flags, cancelled)
            self._performed = False

        with contextlib.suppress(HypervisorError):
            await self._session.call(confirm, on=link)


async def _in_thread(function: Callable[[], T]) -> T:
    return await asyncio.wrap_future(threads.submit(function))


# What follows blocks: it runs in a thread, on libvirt's domain.


def _abort(domain: Any) -> bool:
    try:
        domain.abortJob()
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_OPERATION_INVALID and not in_postcopy(domain):
            return False  # no job, or none any more
        raise
    return True


def _progress(domain: Any) -> Progress | None:
    stats = flow(domain)
    return None if stats is None else domains.progress_of(stats, in_postcopy(domain))


def _final(domain: Any) -> Progress:
    """The figures of a transfer that has just ended; zeros where libvirt does not tell (they are not worth failing).

    They are those of the running job: it lasts until Confirm, and libvirt calls them completed only after it.
    """
    with contextlib.suppress(libvirt.libvirtError):
        return domains.progress_of(domain.jobStats(), in_postcopy(domain))
    return Progress()


def _start_postcopy(domain: Any) -> bool:
    if flow(domain) is None:
        return False
    domain.migrateStartPostCopy()
    return True


def _set_bandwidth(domain: Any, limit: int) -> bool:
    if flow(domain) is None:
        return False
    domain.migrateSetMaxSpeed(limit)
    domain.migrateSetMaxSpeed(limit, libvirt.VIR_DOMAIN_MIGRATE_MAX_SPEED_POSTCOPY)
    return True


def _refuse_foreign(domain: Any) -> None:
    """What must not be resumed here: a guest that runs at the destination, and a copy that arrives."""
    if in_postcopy(domain):
        raise DomainBusy("the guest was switched to post-copy: it runs at the destination")
    refuse_arrival(domain)


def _resume(domain: Any) -> None:
    """Resume a guest that a migration paused. One that its user paused stays so; one that runs is left alone."""
    state, reason = state_of(domain)
    if (state is DomainState.PAUSED and reason == domains.MIGRATION) or is_held(domain):
        domain.resume()
