"""`base.Outgoing` of the simulator: one migration on its source."""

import asyncio
import json

from agent.hypervisor.base import (
    MAX_DOMAIN_XML,
    PAUSED_BY_USER,
    Begun,
    DomainBusy,
    DomainState,
    HypervisorError,
    Incompatible,
    Job,
    NoTransfer,
    Performed,
)
from agent.hypervisor.options import Options
from agent.hypervisor.sim.cookie import Cookie
from agent.hypervisor.sim.guest import Guest
from agent.hypervisor.sim.host import Host
from agent.hypervisor.sim.profiles import MIB
from agent.hypervisor.sim.sender import Assignment, Sender, sender_of
from agent.network.uri import MigrationUri
from agent.transfer.progress import Progress


class SimOutgoing:
    def __init__(self, host: Host, uuid: str) -> None:
        self._host = host
        self._uuid = uuid
        self._closed = False
        self._sender: Sender | None = None

    @property
    def paused_by_user(self) -> bool:
        return self._sender is not None and self._sender.paused_by_user

    # --- the phases ---------------------------------------------------------------------------------------------------

    async def begin(self, options: Options, destination_name: str) -> Begun:
        return await self._host.call("begin", lambda: self._begin(options))

    async def _begin(self, options: Options) -> Begun:
        guest = self.check(options)
        if self._effective(options, "change_protection") and not self._closed:
            self._host.holders[self._uuid] = self
            guest.job = Job.OUTGOING
        await asyncio.sleep(self._host.config.latencies.begin)
        described = guest.definition.described_as(persistent=guest.stored is not None)
        return Begun(described.text(), Cookie(host_uuid=self._host.config.host_uuid, uuid=self._uuid).encode())

    def check(self, options: Options) -> Guest:
        """Return the guest if `begin` would succeed; raise the error of `begin` otherwise."""
        guest = self._host.guest(self._uuid)
        self._host.check_options(options)
        self._host.refuse_busy(guest, self)
        self._check_movable(guest, offline=self._effective(options, "offline"))
        if guest.state is DomainState.PAUSED and guest.reason != PAUSED_BY_USER and not guest.left:
            raise Incompatible(f"the guest is paused ({guest.reason}), but not by its user, so it would arrive running")
        it = guest.definition.guest
        if it.disk and guest.state is DomainState.PAUSED and not guest.has_run:
            raise Incompatible("the guest has a disk, is paused, and has not run since it arrived here; let it run for a moment")
        if it.obstacle:
            raise Incompatible(it.obstacle)
        if it.unsafe and not self._effective(options, "unsafe"):
            raise Incompatible("Unsafe migration: a disk is not known to be shared; if it is shared, use --option unsafe=on")
        if (size := len(guest.definition.text().encode())) > MAX_DOMAIN_XML:
            raise Incompatible(f"the domain document has {size} bytes; at most {MAX_DOMAIN_XML} can be sent: shorten its metadata")
        return guest

    @staticmethod
    def _check_movable(guest: Guest, *, offline: bool) -> None:
        if guest.active and offline:
            raise Incompatible(f"domain {guest.name} is active, so it cannot be migrated offline: it would exist twice")
        if not guest.active and not offline:
            raise HypervisorError(f"domain {guest.name} is not running; only an offline migration can move it")
        recoverable = guest.postcopy and guest.left
        if guest.incoming or (guest.left and not recoverable) or (guest.postcopy and not recoverable):
            raise DomainBusy(f"domain {guest.name} is in another migration that has not ended")

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
            return await self._perform(uri, cookie, options, bandwidth, max_downtime)
        except Exception:
            if self._uuid not in self._host.senders:
                self._let_go()  # as in libvirt, a Perform that was refused or has failed leaves no job
            raise

    async def _perform(self, uri: str, cookie: bytes, options: Options, bandwidth: int, max_downtime: float) -> Performed:
        await self._host.gate("perform")
        guest = self._host.guest(self._uuid)
        self._host.check_options(options)
        self._host.refuse_busy(guest, self)
        offline = self._effective(options, "offline")
        self._check_movable(guest, offline=offline)
        if offline:
            return Performed(b"", Progress())
        sender = self._sender = Sender(self._host, guest, self._assignment(uri, cookie, options, bandwidth, max_downtime))
        self._host.holders[self._uuid] = self
        guest.job = Job.OUTGOING
        task = sender.begin()
        task.add_done_callback(self._after_perform)
        switch = self._host.spawn(sender.switched.wait())
        try:
            await asyncio.wait({task, switch}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            switch.cancel()
        final = task.result() if task.done() else sender.progress()  # as libvirt, Perform succeeds at the switch to post-copy
        return Performed(json.dumps({"downtime": final.downtime}).encode(), final)

    def _after_perform(self, _task: asyncio.Task[Progress]) -> None:
        if self._closed:
            self._let_go()

    def _assignment(self, uri: str, cookie: bytes, options: Options, bandwidth: int, max_downtime: float) -> Assignment:
        address = self._address(uri)
        return Assignment(
            address=address,
            token=Cookie.decode(cookie).token,
            live=self._effective(options, "live"),
            post_copy=self._effective(options, "post_copy"),
            auto_converge=self._effective(options, "auto_converge"),
            bandwidth=_in_units(bandwidth),
            max_downtime=max_downtime or self._host.config.max_downtime,
        )

    def _address(self, uri: str) -> MigrationUri:
        try:
            address = MigrationUri.parse(uri)
        except ValueError as error:
            raise HypervisorError(f"the migration URI {uri!r} is invalid: {error}") from error
        if address.scheme not in self._host.profile.uri_transports or not address.port:
            raise HypervisorError(f"the migration URI {uri!r} has no port, or a scheme that is not supported")
        return address

    def _effective(self, options: Options, name: str) -> bool:
        return self._host.profile.effective(options, name)

    # --- while it runs ------------------------------------------------------------------------------------------------

    async def abort(self) -> None:
        await self._host.gate("abort")
        sender = sender_of(self._host, self._uuid)
        if sender is not None:
            sender.abort()

    async def connect_retries(self, uri: str) -> int | None:
        return None  # a simulated transfer connects with its own deadline

    async def stop_connecting(self, uri: str) -> None: ...

    async def progress(self) -> Progress | None:
        await self._host.gate("progress")
        sender = sender_of(self._host, self._uuid)
        return None if sender is None else sender.progress()

    async def start_postcopy(self) -> None:
        await self._host.gate("start_postcopy")
        self._running().start_postcopy()

    async def set_bandwidth(self, bandwidth: int) -> int:
        await self._host.gate("set_bandwidth")
        return self._running().set_bandwidth(_in_units(bandwidth))

    async def set_max_downtime(self, seconds: float) -> float:
        await self._host.gate("set_max_downtime")
        return self._running().set_max_downtime(seconds)

    def _running(self) -> Sender:
        sender = sender_of(self._host, self._uuid)
        if sender is None:
            raise NoTransfer("no transfer is running")
        return sender

    # --- the end ------------------------------------------------------------------------------------------------------

    async def remove(self, cookie: bytes, options: Options) -> None:
        await self._host.call("remove", lambda: self._remove(keep=not self._effective(options, "undefine_source")))

    async def _remove(self, *, keep: bool) -> None:
        await asyncio.sleep(self._host.config.latencies.confirm)
        guest = self._host.guests.get(self._uuid)
        if guest is None:
            return
        if self._uuid in self._host.senders:
            raise DomainBusy(f"domain {guest.name} is being migrated")
        if guest.active and not guest.left:
            raise DomainBusy(f"the state of domain {guest.name} was not sent away, so the domain is not removed")
        self._host.release(guest)
        if not keep:
            guest.stored, guest.autostart = None, False
        self._host.drop(guest, "migrated")

    async def settle(self) -> None:
        """Do nothing: the simulated hypervisor never resumes a guest by its own judgement."""
        await self._host.gate("settle")

    async def resume(self) -> None:
        await self._host.call("resume", self._resume)

    async def _resume(self) -> None:
        guest = self._host.guest(self._uuid)
        if self._uuid in self._host.senders:
            raise DomainBusy(f"domain {guest.name} is being migrated")
        if guest.state is DomainState.RUNNING:
            return
        if not guest.active or guest.incoming or guest.reason.startswith("post-copy"):
            raise HypervisorError(f"domain {guest.name} is {guest.state.value} ({guest.reason}): nothing to resume")
        self._host.release(guest)
        if guest.reason == "migration":
            guest.give_back("unpaused")

    async def close(self) -> None:
        """Release the change protection of Begin. A running transfer continues."""
        self._closed = True
        if self._uuid not in self._host.senders:
            self._let_go()

    def _let_go(self) -> None:
        if self._host.holders.get(self._uuid) is self and (guest := self._host.guests.get(self._uuid)) is not None:
            self._host.release(guest)


def _in_units(bandwidth: int) -> int:
    """Return the limit rounded down to whole MiB/s. Raises `Incompatible` below that. As the libvirt driver does."""
    if bandwidth < 0 or 0 < bandwidth < MIB:
        raise Incompatible(f"a transfer cannot be limited to {bandwidth} bytes per second; the lowest limit is {MIB}")
    return bandwidth - bandwidth % MIB
