"""One migration on its destination."""

import asyncio
import contextlib
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import libvirt

from agent.hypervisor.base import (
    RESUMED,
    Domain,
    DomainBusy,
    DomainNotFound,
    DomainState,
    Finished,
    HypervisorError,
    HypervisorUnavailable,
    Incompatible,
    Prepared,
    Stored,
    TransferFailed,
)
from agent.hypervisor.events import EventStream
from agent.hypervisor.libvirt import domain as domains
from agent.hypervisor.libvirt import options as option_flags
from agent.hypervisor.libvirt import phases, qemu_log, threads
from agent.hypervisor.libvirt.connection import Link, Pool, Session
from agent.hypervisor.libvirt.events import RECONNECTED
from agent.hypervisor.libvirt.process import stopped
from agent.hypervisor.libvirt.service import service_of
from agent.hypervisor.libvirt.stored import finish_cookie
from agent.hypervisor.options import Options
from agent.network.uri import MigrationUri

NEVER_RAN = frozenset({"failed", "daemon"})
"""libvirt's reasons of the shut-off state of a copy whose incoming migration failed, or was undone by a restarted libvirtd."""

_GONE = (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_OPERATION_INVALID, libvirt.VIR_ERR_OPERATION_FAILED)
"""Error codes of Finish(cancelled) when there is nothing to cancel any more: the caller must read the state again."""

ENDS_SECONDS = 15.0
"""Longest wait for a QEMU that is about to end: libvirt kills one that does not end within ten seconds."""

STOPPED_SECONDS = 2.0
"""When abandoning takes longer, check whether the QEMU of the copy is stopped. A running QEMU answers in milliseconds."""

TRANSPORTS = ("tcp",)
"""Schemes of a migration URI that this driver supports."""


class LibvirtIncoming:
    """`interface.Incoming` on libvirt. A new handle, after a restart of the agent, can still `abandon`.

    With PERSIST_DEST, libvirt stores the definition when Finish is *called*. A transfer that fails after an early Finish
    therefore leaves a definition behind. It is removed here, or the one that it replaced is restored. Only the handle that
    prepared knows what was here before Prepare; a new one treats the definition of a failed copy as the migration's own.

    A guest that ran here and ended before Finish returned (possible in post-copy) is no failed copy: its user's definition stays.
    """

    def __init__(self, uuid: str, session: Session, pool: Pool, ports: tuple[int, int], events: Callable[[], EventStream]) -> None:
        self._uuid = uuid
        self._session = session
        self._pool = pool
        self._ports = ports
        self._events = events
        self._prepared: Link | None = None  # the connection that owns the copy: closing it destroys a copy that never ran
        self._begin_cookie = b""
        self._before: str | None = None  # the definition that was here before Prepare
        self._arrives = False  # Prepare succeeded: the domain here is its copy, not one that was here before
        self._has_run = False  # an event showed that the copy started
        self._never_ran = False  # its process has ended, no event showed a start, and no event was missed
        self._ended = asyncio.Event()
        self._following: asyncio.Task[None] | None = None
        self._name = ""  # of the copy
        self._killed = False  # this handle destroyed the copy

    async def prepare(
        self, domain_xml: str, cookie: bytes, options: Options, destination_name: str, listen_address: str, uri: str
    ) -> Prepared:
        flags = option_flags.flags_for(options, domain_xml)
        asked = migration_uri(uri, listen_address, self._ports)
        params = _params(domain_xml, destination_name) | {
            libvirt.VIR_MIGRATE_PARAM_URI: str(asked),
            libvirt.VIR_MIGRATE_PARAM_LISTEN_ADDRESS: listen_address,
        }

        def prepare(connection: Any) -> tuple[str, bytes]:
            self._before = _definition(connection, self._uuid)
            prepared = phases.prepare(connection, params, cookie, flags)
            self._arrives = True  # in the thread, because the await may be cancelled
            return prepared

        self._begin_cookie, self._name = cookie, destination_name
        link = self._prepared = await self._session.open()
        self._following = asyncio.create_task(self._follow(self._events()), name="libvirt-copy")
        uri_out, out = await self._session.call(prepare, on=link)
        return Prepared(uri_out or str(asked), out)  # libvirt returns no URI where the port was given

    async def finish(
        self, domain_xml: str, cookie: bytes, options: Options, destination_name: str, stored: Stored | None = None
    ) -> Finished:
        flags = option_flags.flags_for(options, domain_xml)
        if flags & libvirt.VIR_MIGRATE_PERSIST_DEST:
            # A Finish after Perform gets Perform's cookie, which has the stored definition under its old name.
            cookie = finish_cookie(self._begin_cookie, stored, destination_name) or cookie
        params = _params(domain_xml, destination_name)
        # Use the connection that prepared: libvirtd 9.0 crashes when that one closes while Finish waits on another.
        link = self._prepared or await self._session.open()

        if self._following is None:
            self._following = asyncio.create_task(self._follow(self._events()), name="libvirt-copy")
        try:
            out = await self._session.call(lambda c: phases.finish(c, params, cookie, flags), on=link, bounded=False)
        except HypervisorUnavailable:
            raise
        except HypervisorError as error:
            raise await self._failure(error) from None
        return Finished(out)

    async def _follow(self, events: EventStream) -> None:
        """Learn from libvirt's events, in their order, whether the copy has run. The final state does not show it: a QEMU that a
        signal ended (its host shuts down) has the same reason as one whose guest was shut down after it had arrived.
        """
        begun = missed = False
        async for event in events:
            missed |= event.kind == RECONNECTED or events.lost
            if event.uuid != self._uuid:
                continue
            if event.kind == "started":
                begun = True
            elif event.kind == RESUMED:
                self._has_run = True
            elif event.kind == "stopped" and begun:
                self._never_ran = not (self._has_run or missed)
                self._ended.set()

    async def _wait_for_end(self) -> None:
        """Wait for libvirt's event of the end of the copy, which comes some time after the change of state."""
        if self._following is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ENDS_SECONDS):
                    await self._ended.wait()

    @property
    def never_ran(self) -> bool:
        return self._never_ran

    async def destroyed(self) -> HypervisorError | None:
        if self._prepared is None or not self._prepared.alive or self._killed:
            return None
        reading = threads.submit(lambda: qemu_log.destroyed(self._name, service_of(self._pool.uri).logs))
        with contextlib.suppress(HypervisorError):
            return await asyncio.wrap_future(reading)
        return None

    async def abandon(self) -> None:
        giving_up = asyncio.create_task(self._pool.call(self._abandon), name="libvirt-abandon")
        try:
            done, _ = await asyncio.wait({giving_up}, timeout=STOPPED_SECONDS)
            if not done:
                await self._pool.call(self._end_stopped)
            await giving_up
        except DomainBusy:
            if self._has_run:
                raise
            await self._wait_for_end()
            if not self._never_ran:
                raise
            await self._pool.call(self._abandon)
        finally:
            giving_up.cancel()

    async def close(self) -> None:
        """Release the connection; call `abandon` before. A waiting Finish continues in libvirtd and closes the connection last."""
        self._prepared = None
        if self._following is not None:
            self._following.cancel()
        await self._session.close()

    async def _failure(self, error: HypervisorError) -> HypervisorError:
        """Return the error of a failed Finish: `TransferFailed` if the copy is certainly gone, else `HypervisorUnavailable`."""
        try:
            domain = await self._pool.call(lambda connection: domains.read_one(connection, self._uuid))
            if domain.ending or (domain.has_run and not self._has_run):
                await self._wait_for_end()
                domain = await self._pool.call(lambda connection: domains.read_one(connection, self._uuid))
        except DomainNotFound:
            if self._has_run:
                return HypervisorUnavailable(f"{error}; the copy here has run and is gone now", error.native)
            return TransferFailed(str(error), error.native)
        if self._has_run or self._ran(domain) or domain.state is not DomainState.SHUTOFF:
            return HypervisorUnavailable(f"{error}; the copy here is {domain.state} ({domain.reason}) now", error.native)
        if self._prepared is not None:
            await self._pool.call(self._clear)
        return TransferFailed(str(error), error.native)

    def _ran(self, domain: Domain) -> bool:
        """Return whether a copy that is shut off has run here."""
        return domain.has_run and not self._never_ran

    # The methods below block: they run in a thread.

    def _abandon(self, connection: Any) -> None:
        if self._has_run:
            raise DomainBusy("the copy has run here, so it is not destroyed")
        try:
            domain = domains.read_one(connection, self._uuid)
            if domain.never_started:
                _cancel(connection, domain.name)
                domain = domains.read_one(connection, self._uuid)
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                return
            raise
        if domain.never_started or domain.ending:
            raise HypervisorUnavailable(f"the copy of {domain.name} still exists here: it is {domain.state} ({domain.reason})")
        if domain.state is not DomainState.SHUTOFF or (self._arrives and self._ran(domain)):
            raise DomainBusy(f"guest {domain.name} is {domain.state} ({domain.reason}) here and has run, so it is not destroyed")
        # A guest that has run, where this handle made no copy, ran before Prepare: its definition stays.
        if not self._ran(domain) and (self._prepared is not None or domain.reason in NEVER_RAN):
            self._clear(connection)

    def _end_stopped(self, connection: Any) -> None:
        """Destroy a copy whose QEMU is stopped (SIGSTOP, a debugger); do nothing to any other.

        Finish(cancelled) asks QEMU's monitor for its state before it destroys the copy, without a deadline, so it lasts as long as
        QEMU is stopped. `destroy` asks nothing: it sends SIGTERM, and SIGKILL ten seconds later. It cannot destroy a guest that has
        run: libvirtd starts an arriving guest through that monitor, and from then on does not report it as paused.
        """
        run = service_of(self._pool.uri).run
        try:
            domain = domains.by_uuid(connection, self._uuid)
            name, (code, reason) = domain.name(), domain.state()
            waits = domains.state_of(code) is DomainState.PAUSED and domains.reason_name(code, reason) == domains.MIGRATION
            if waits and not self._has_run and stopped(name, run) and arrives(name, run):
                self._killed = True
                domain.destroy()
        except libvirt.libvirtError as error:
            if error.get_error_code() not in (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_OPERATION_INVALID):
                raise

    def _clear(self, connection: Any) -> None:
        """Restore the stored definition that was here before Prepare; undefine where there was none."""
        if self._before is not None:
            connection.defineXML(self._before)
        else:
            try:
                domains.by_uuid(connection, self._uuid).undefineFlags(domains.UNDEFINE)
            except libvirt.libvirtError as error:  # `finish` and `abandon` both call this, perhaps at the same time
                if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
                    raise


def arrives(name: str, run: Path | None) -> bool:
    """Return whether libvirt's status file shows the copy of an incoming migration. A call to libvirt would need the job lock, which
    is not free while QEMU is stopped. `run` is libvirt's run folder.
    """
    try:
        job = ElementTree.parse(run / "qemu" / f"{name}.xml").find("job") if run else None
    except (OSError, ElementTree.ParseError):
        return False
    return job is not None and job.get("async") == "migration in"


def _definition(connection: Any, uuid: str) -> str | None:
    """Return the stored definition; None where there is none."""
    try:
        domain = domains.by_uuid(connection, uuid)
        if not domain.isPersistent():
            return None
        xml: str = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE)
        return xml
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
            return None
        raise


def _cancel(connection: Any, name: str) -> None:
    """Call Finish(cancelled): libvirt destroys the copy, or refuses if its migration has ended by now.

    `destroy` would also kill a guest that has started since its state was read. Finish(cancelled) also ends a Finish that
    waits on any connection. libvirt reports its success as the error "migration successfully aborted".
    """
    try:
        phases.finish(connection, {libvirt.VIR_MIGRATE_PARAM_DEST_NAME: name}, b"", 0, cancelled=True)
    except libvirt.libvirtError as error:
        if error.get_error_code() not in (libvirt.VIR_ERR_MIGRATE_FINISH_OK, *_GONE):
            raise


def migration_uri(uri: str, listen_address: str, ports: tuple[int, int]) -> MigrationUri:
    """Return the URI for Prepare: the given one, or one without a port, for which libvirt picks a free port.

    Raises `Incompatible` for a scheme, host or port that this host does not serve.
    """
    try:
        own = ip_address(listen_address)
        asked = MigrationUri.parse(uri) if uri else MigrationUri(TRANSPORTS[0], own)
    except ValueError as error:
        raise Incompatible(f"the migration URI {uri!r} at {listen_address!r} cannot be used: {error}") from None
    if asked.scheme not in TRANSPORTS:
        raise Incompatible(f"the migration URI {uri} has the scheme {asked.scheme}; supported: {', '.join(TRANSPORTS)}")
    if asked.host != own:
        raise Incompatible(f"the migration URI {uri} does not name the listen address {listen_address}")
    if asked.port and not ports[0] <= asked.port <= ports[1]:
        raise Incompatible(f"the migration URI {uri} has a port outside the range {ports[0]} to {ports[1]}")
    return asked


def _params(domain_xml: str, destination_name: str) -> dict[str, str | int]:
    params: dict[str, str | int] = {libvirt.VIR_MIGRATE_PARAM_DEST_XML: option_flags.unmarked(domain_xml)}
    if destination_name:
        params[libvirt.VIR_MIGRATE_PARAM_DEST_NAME] = destination_name
    return params
