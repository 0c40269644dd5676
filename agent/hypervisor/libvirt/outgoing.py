"""One migration on its source.

Finish is armed early, so a guest that was suspended for the switch-over may run at the destination at any moment after. libvirt
does not know that, and would resume it here if the transfer fails from then on. Three cases:

- libvirtd dies and restarts: `guard` and `switchover` keep it from resuming the guest;
- the transfer is aborted (in tests two copies ran, 21 times of 22): `abort` waits for the switch-over to end by itself;
- its stream breaks (two copies 3 times of 22): `perform` pauses the guest again at once, and the destination decides.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

from agent.hypervisor.base import (
    Begun,
    DomainBusy,
    DomainEvent,
    DomainNotFound,
    HypervisorError,
    HypervisorUnavailable,
    Incompatible,
    NoTransfer,
    Performed,
    TransferFailed,
)
from agent.hypervisor.libvirt import connecting, job, leaving, phases, threads
from agent.hypervisor.libvirt import domain as domains
from agent.hypervisor.libvirt import options as option_flags
from agent.hypervisor.libvirt.connection import Link, Pool, Session, unwrap
from agent.hypervisor.libvirt.events import QEMU_MIGRATION
from agent.hypervisor.libvirt.guard import Guard, hold, is_switching, settle, stopped_by_user
from agent.hypervisor.libvirt.removal import in_postcopy, refuse_incomplete_postcopy, remove
from agent.hypervisor.libvirt.stored import remove_leftovers
from agent.hypervisor.libvirt.switchover import CANCELLABLE
from agent.hypervisor.options import Options
from agent.transfer.progress import Progress

T = TypeVar("T")

RETRY_SECONDS = 0.01
"""Interval of retries between the call of Perform and the start of its transfer, when libvirt has no job to act on yet."""
SWITCH_BEGINS_SECONDS = 0.05
"""QEMU begins the switch-over within this time after it has stopped the guest, unless a disk takes long to flush."""

SWITCH_SECONDS = 5.0
"""A guest that is stopped for the switch-over longer than this is stuck (its destination died without closing the connection, or
the line is cut): far beyond any `maxdowntime`. Only then may the transfer be aborted, and the guest must then be held.
"""

CLOSE_SECONDS = 2.0
"""An aborted Perform returns well within this time."""


class LibvirtOutgoing:
    """`interface.Outgoing` on libvirt. A new handle, after a restart of the agent, can do all that needs no live connection."""

    def __init__(
        self, uuid: str, session: Session, pool: Pool, guard: Guard, events: Callable[[], AsyncIterator[DomainEvent]]
    ) -> None:
        self._uuid = uuid
        self._session = session
        self._pool = pool
        self._guard = guard
        self._events = events
        self._name = ""
        self._has_stopped = False  # the guest was stopped since Perform began
        self._switches = asyncio.Event()  # QEMU has begun the switch-over
        self._paused_by_user = False
        self._stopped_at = 0.0  # when `abort` first found the guest stopped for the switch-over
        self._must_hold = False  # the transfer was aborted or failed after the guest was stopped
        self._begun: Link | None = None  # the connection that holds libvirt's migration job
        self._performed = False  # Perform succeeded on it: only now is there something to confirm
        self._performing: asyncio.Future[tuple[bytes, Progress] | HypervisorError] | None = None
        self._outcome_is_known = False  # libvirtd itself has reported how Perform ended, or `settle` has run
        self._remember("", Options(), "")

    async def begin(self, options: Options, destination_name: str) -> Begun:
        option_flags.flags(options)  # raises for an unsupported option before anything is done

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
        self,
        uri: str,
        domain_xml: str,
        cookie: bytes,
        options: Options,
        destination_name: str,
        bandwidth: int,
        max_downtime: float = 0.0,
    ) -> Performed:
        try:
            return await self._perform(uri, domain_xml, cookie, options, destination_name, bandwidth, max_downtime)
        except Exception:
            # A refused or failed Perform is not confirmed, so the job of Begin would hold the guest until this agent ends.
            if not self._must_hold and not self._is_performing:
                self._begun = None
                await self._session.close()
            raise

    async def _perform(
        self, uri: str, domain_xml: str, cookie: bytes, options: Options, destination_name: str, bandwidth: int, max_downtime: float
    ) -> Performed:
        flags = option_flags.flags_for(options, domain_xml)
        params = leaving.perform_params(uri, domain_xml, destination_name, option_flags.mebibytes(bandwidth), flags)

        def perform(connection: Any) -> tuple[bytes, Progress]:
            domain = domains.by_uuid(connection, self._uuid)
            self._guard.watch(domain.name())
            with job.max_downtime(domain, round(max_downtime * 1000)):
                out = phases.perform(domain, params, cookie, flags)
            self._performed = True  # in the thread, because the await may be cancelled
            return out, job.final(domain)

        self._remember(domain_xml, options, destination_name)
        link = self._begun = self._begun if self._begun and self._begun.alive else await self._session.open()

        live = option_flags.wants(options, "live") and "paused" not in option_flags.marks_of(domain_xml)
        stopping = asyncio.create_task(self._watch_for_stop(self._events(), live), name="libvirt-switch-over")
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

    async def _watch_for_stop(self, events: AsyncIterator[DomainEvent], live: bool) -> None:
        """Record when the guest is stopped. libvirt's event of a stop for the switch-over comes well before Perform fails."""
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
                        asking = asyncio.create_task(self._find_who_stopped_it(), name="libvirt-who-stopped-it")
        finally:
            if asking is not None:
                asking.cancel()

    async def _find_who_stopped_it(self) -> None:
        """Find out whether the guest's user stopped it: libvirt gives such a pause the same reason as that of the switch-over.

        QEMU begins the switch-over right after it has stopped the guest. Only where it does not, QEMU is asked why the guest is
        stopped, because a call to its monitor taints the domain.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SWITCH_BEGINS_SECONDS):
                await self._switches.wait()
                return
        with contextlib.suppress(HypervisorError):
            self._paused_by_user = await self._call(stopped_by_user)

    async def abort(self) -> None:
        """Abort the transfer. Does nothing within `SWITCH_SECONDS` of a stop for the switch-over: then the transfer is about to end,
        and only the destination knows how."""
        live = option_flags.wants(self._options, "live")
        idle = self._paused_by_user and not self._switches.is_set()
        if live and not idle and await self._call(is_switching):
            self._stopped_at = self._stopped_at or time.monotonic()
            if time.monotonic() - self._stopped_at < SWITCH_SECONDS:
                return
            self._must_hold = True

        def abort(domain: Any) -> bool | None:
            # Check this last: once Perform has ended, the running job may be the guest's next migration. In post-copy Perform
            # ends early, and libvirt itself refuses to abort.
            return (self._outcome_is_known and not in_postcopy(domain)) or job.abort(domain) or None

        await self._while_starting(abort)

    async def connect_retries(self, uri: str) -> int | None:
        with contextlib.suppress(OSError, HypervisorUnavailable):
            return await _in_thread(lambda: connecting.retransmits(uri))
        return None

    async def stop_connecting(self, uri: str) -> None:
        await _in_thread(lambda: connecting.end_unanswered(uri))

    async def progress(self) -> Progress | None:
        try:
            reading = await self._call(job.progress)
        except DomainNotFound:
            return None
        # libvirt reports the job as running until Confirm; after Perform, memory flows only in post-copy.
        return reading if reading is None or reading.postcopy or not self._performed else None

    async def start_postcopy(self) -> None:
        await self._change(lambda domain: job.start_postcopy(domain) or None)

    async def set_bandwidth(self, bandwidth: int) -> int:
        limit = option_flags.mebibytes(bandwidth)
        return await self._change(lambda domain: job.set_bandwidth(domain, limit)) * option_flags.MIB

    async def set_max_downtime(self, seconds: float) -> float:
        return await self._change(lambda domain: job.set_max_downtime(domain, round(seconds * 1000))) / 1000

    async def remove(self, cookie: bytes, options: Options) -> None:
        undefine = option_flags.wants(options, "undefine_source")
        with contextlib.suppress(DomainNotFound):
            if option_flags.wants(options, "post_copy"):
                await self._call(refuse_incomplete_postcopy)
            await self._confirm(cookie, options, cancelled=False)
            await self._call(lambda domain: None)  # raises DomainNotFound where Confirm has removed everything
            try:
                await self._session.call(lambda connection: remove(domains.by_uuid(connection, self._uuid), undefine))
            except BaseException:
                await self._session.close()  # ends a job that the `remove` of `removal` began
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
        await self._call(job.refuse_foreign)
        await self._confirm(b"", self._options, cancelled=True)
        await self._call(job.resume)

    async def close(self) -> None:
        if self._is_performing:
            with contextlib.suppress(HypervisorError):
                await self.abort()
            # libvirtd continues a transfer that cannot be aborted (post-copy); the connection closes at its end.
            await self._wait_for_perform(CLOSE_SECONDS)
        if not self._is_performing:
            await self._guard.forget()
        self._begun = None
        await self._session.close()

    def _remember(self, domain_xml: str, options: Options, destination_name: str) -> None:
        """Keep what Confirm needs: all phases must get the same flags and names."""
        self._domain_xml, self._options, self._destination_name = domain_xml, options, destination_name

    async def _call(self, function: Callable[[Any], T]) -> T:
        """Run a short call on this guest's domain, on a connection of the pool."""
        return await self._pool.call(lambda connection: function(domains.by_uuid(connection, self._uuid)))

    async def _change(self, act: Callable[[Any], T | None]) -> T:
        """Call `act` on the transfer while memory flows (after Perform: only in post-copy). Raises `NoTransfer`."""
        flows = lambda domain: act(domain) if not self._performed or in_postcopy(domain) else None  # noqa: E731
        if (result := await self._while_starting(flows)) is None:
            raise NoTransfer("no transfer is running that could be changed")
        return result

    async def _while_starting(self, act: Callable[[Any], T | None]) -> T | None:
        """Call `act`, which needs a running transfer, until it returns something; return None where no transfer runs.

        Right after the call of Perform, libvirt has no job to act on yet: a request at that time must not get lost.
        """
        while True:
            starting = self._is_performing
            if (result := await self._call(act)) is not None or not starting:
                return result
            await self._wait_for_perform(RETRY_SECONDS)

    async def _wait_for_perform(self, timeout: float) -> None:
        if self._performing is not None:
            await asyncio.wait({self._performing}, timeout=timeout)

    @property
    def _is_performing(self) -> bool:
        return self._performing is not None and not self._performing.done()

    async def _confirm(self, cookie: bytes, options: Options, cancelled: bool) -> None:
        """End libvirt's own migration job by Confirm, where this handle still has it. Errors are ignored: the caller reads the state
        afterwards, and does by plain calls what a Confirm that failed or could not be called has not done.
        """
        link = self._begun
        if not self._performed or link is None or not link.alive:
            return
        flags = option_flags.flags_for(options, self._domain_xml)
        params = leaving.params(self._destination_name)

        def confirm(connection: Any) -> None:
            phases.confirm(domains.by_uuid(connection, self._uuid), params, cookie, flags, cancelled)
            self._performed = False

        with contextlib.suppress(HypervisorError):
            await self._session.call(confirm, on=link)


async def _in_thread(function: Callable[[], T]) -> T:
    return await asyncio.wrap_future(threads.submit(function))
