"""`base.Incoming` of the simulator: one migration on its destination."""

import asyncio
from dataclasses import replace
from ipaddress import ip_address

from agent.hypervisor.base import (
    DomainBusy,
    DomainState,
    Finished,
    HypervisorError,
    Incompatible,
    Job,
    Prepared,
    Stored,
    TransferFailed,
)
from agent.hypervisor.options import Options
from agent.hypervisor.sim.cookie import Cookie
from agent.hypervisor.sim.definition import Definition
from agent.hypervisor.sim.guest import Guest
from agent.hypervisor.sim.host import Host
from agent.hypervisor.sim.receiver import Receiver, receiver_of
from agent.network.uri import MigrationUri


class SimIncoming:
    def __init__(self, host: Host, uuid: str) -> None:
        self._host = host
        self._uuid = uuid
        self._closed = False
        self._finishing: asyncio.Task[Finished] | None = None

    # --- Prepare ------------------------------------------------------------------------------------------------------

    async def prepare(
        self, domain_xml: str, cookie: bytes, options: Options, destination_name: str, listen_address: str, uri: str
    ) -> Prepared:
        definition = Definition.parse(domain_xml).renamed(destination_name)
        offline = self._host.profile.effective(options, "offline")
        self._check(definition, Cookie.decode(cookie), options)
        work = self._prepare_offline if offline else lambda d: self._prepare(d, listen_address, uri)
        return await self._host.call("prepare", lambda: work(definition))

    def _check(self, definition: Definition, cookie: Cookie, options: Options) -> None:
        self._host.check_options(options)
        definition.check(self._uuid)
        if cookie.host_uuid == self._host.config.host_uuid:
            raise Incompatible("the guest is already on this host, so it cannot be migrated here")
        effective = self._host.profile.effective
        for option, why in self._host.config.forbidden.items():
            if effective(options, option):  # as QEMU reports for post-copy when it is started as a destination
                raise HypervisorError(f"{option} is not supported: {why}")
        if effective(options, "offline") and not effective(options, "persist_destination"):
            raise Incompatible("an offline migration moves only the definition, so persist_destination cannot be off")
        self._host.check_arrival(definition)

    async def _prepare(self, definition: Definition, listen_address: str, uri: str) -> Prepared:
        ask = self._asked(listen_address, uri)
        receiver = Receiver(self._host, self._copy(definition), self)
        try:
            await asyncio.sleep(self._host.config.latencies.prepare)
            port = await receiver.listen(listen_address, self._ports(ask.port))
        except (HypervisorError, asyncio.CancelledError) as error:
            receiver.end(str(error))
            raise
        if self._closed or receiver.gone:
            receiver.end("the connection that prepared it was closed")
            raise TransferFailed("the copy is gone: the connection that prepared it was closed")
        out = replace(ask, port=port)
        return Prepared(str(out), Cookie(host_uuid=self._host.config.host_uuid, token=receiver.token).encode())

    def _copy(self, definition: Definition) -> Guest:
        """Create a copy that waits for its memory, or return the one whose post-copy broke, which waits for the rest."""
        there = self._host.guests.get(self._uuid)
        if self._uuid in self._host.receivers:
            raise DomainBusy(f"domain {definition.name} is already being migrated here")
        if there is not None and there.active:
            if there.reason != "post-copy failed" or there.left:
                raise DomainBusy(f"domain {there.name} is already active")
            there.job = Job.INCOMING
            return there
        copy = self._host.add(definition, there.stored if there else None)
        copy.job, copy.incoming = Job.INCOMING, True
        copy.stop("migration", "started")
        return copy

    def _asked(self, listen_address: str, uri: str) -> MigrationUri:
        """Return the URI for the source to connect to: the given one, which must name the listen address, or one made from that."""
        schemes = self._host.profile.uri_transports
        try:
            listening = ip_address(listen_address)
            asked = MigrationUri.parse(uri) if uri else MigrationUri(schemes[0], listening)
        except ValueError as error:
            raise Incompatible(f"the migration URI {uri!r} at {listen_address!r} cannot be used: {error}") from None
        if asked.scheme not in schemes:
            raise Incompatible(f"the migration URI {uri} has the scheme {asked.scheme}; supported: {', '.join(schemes)}")
        if asked.host != listening and not listening.is_unspecified:
            raise Incompatible(f"the migration URI {uri} does not name the listen address {listen_address}")
        return asked

    def _ports(self, port: int) -> range:
        first, last = self._host.config.ports
        if port and not first <= port <= last:
            raise Incompatible(f"the migration URI has a port, {port}, outside the range {first} to {last}")
        return range(port, port + 1) if port else range(first, last + 1)

    async def _prepare_offline(self, definition: Definition) -> Prepared:
        there = self._host.guests.get(self._uuid)
        if self._uuid in self._host.receivers or (there is not None and there.active):
            raise DomainBusy(f"domain {definition.name} is already active")
        await asyncio.sleep(self._host.config.latencies.prepare)
        return Prepared("", Cookie(host_uuid=self._host.config.host_uuid).encode())

    # --- Finish -------------------------------------------------------------------------------------------------------

    async def finish(
        self, domain_xml: str, cookie: bytes, options: Options, destination_name: str, stored: Stored | None = None
    ) -> Finished:
        await self._gate_finish()
        if self._finishing is None or (self._finishing.done() and self._failed(self._finishing)):
            self._finishing = self._host.spawn(self._finish(domain_xml, options, destination_name, stored))
        return await self._host.wait("finish", self._finishing, None)

    async def _gate_finish(self) -> None:
        try:
            await self._host.gate("finish")
        except TransferFailed as error:  # an injected fault; this error means that the copy is gone
            receiver = receiver_of(self._host, self._uuid)
            if receiver is not None:
                receiver.end(str(error))
            raise

    @staticmethod
    def _failed(task: asyncio.Task[Finished]) -> bool:
        return task.cancelled() or task.exception() is not None

    async def _finish(self, domain_xml: str, options: Options, destination_name: str, stored: Stored | None) -> Finished:
        effective = self._host.profile.effective
        if effective(options, "offline"):
            return self._define(Definition.parse(domain_xml).renamed(destination_name))
        receiver = self._arm(arrive_paused=effective(options, "paused"))
        await asyncio.shield(receiver.arrived)
        await asyncio.sleep(0 if receiver.guest.postcopy else self._host.config.latencies.finish)
        if receiver.gone:
            raise TransferFailed(f"the copy of {receiver.guest.name} is gone")
        receiver.settle(self._to_store(domain_xml, options, destination_name, stored))
        return Finished(b"")

    def _to_store(self, domain_xml: str, options: Options, name: str, stored: Stored | None) -> Definition | None:
        """Return the definition for the next boot; None for a guest that is to be transient here."""
        running = Definition.parse(domain_xml).renamed(name)
        if not running.guest.persistent:
            options = {"persist_destination": False, **options}
        if not self._host.profile.effective(options, "persist_destination"):
            return None
        return Definition.parse(stored.definition).renamed(name) if stored is not None and stored.definition else running

    def _arm(self, *, arrive_paused: bool) -> Receiver:
        receiver = receiver_of(self._host, self._uuid)
        if receiver is None:
            guest = self._host.guests.get(self._uuid)
            if guest is not None and guest.active:
                raise HypervisorError(f"domain {guest.name} is active, but it is not being migrated here")
            raise TransferFailed("no copy of the guest waits here")
        receiver.arrive_paused = arrive_paused
        if not receiver.armed:
            receiver.armed = True
            if receiver.guest.postcopy and not receiver.recovering:
                receiver.run_postcopy()
        return receiver

    def _define(self, definition: Definition) -> Finished:
        there = self._host.guests.get(self._uuid)
        if there is not None and there.active:
            raise DomainBusy(f"domain {definition.name} is already active")
        guest = self._host.add(definition, definition)
        guest.shut_off("migrated")
        return Finished(b"")

    # --- the end ------------------------------------------------------------------------------------------------------

    @property
    def never_ran(self) -> bool:
        return False  # never needed: a simulated copy that has not run leaves no guest in the state shut off

    async def destroyed(self) -> HypervisorError | None:
        return None  # the error of Finish reports it

    async def abandon(self) -> None:
        await self._host.gate("abandon")
        receiver = receiver_of(self._host, self._uuid)
        guest = self._host.guests.get(self._uuid)
        if guest is None or not guest.active:
            return
        if receiver is None or guest.postcopy or guest.state is DomainState.RUNNING:
            raise DomainBusy(f"domain {guest.name} has run here, so it is not destroyed")
        receiver.end("abandoned")

    async def close(self) -> None:
        """Remove a copy that never ran, unless Finish was called: like libvirt, the simulator completes a Finish that has begun."""
        self._closed = True
        receiver = receiver_of(self._host, self._uuid)
        if receiver is not None and receiver.owner is self and not receiver.armed:
            receiver.end("the connection that prepared it was closed")
