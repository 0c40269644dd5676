"""`SimHypervisor`: the driver of the simulated hypervisor, and the faults that tests inject."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import msgspec

from agent.hypervisor.base import (
    Domain,
    DomainBusy,
    DomainEvent,
    DomainState,
    HypervisorError,
    HypervisorInfo,
    HypervisorUnavailable,
    Job,
    Requirements,
    Stored,
)
from agent.hypervisor.guest_settings import GuestSettings
from agent.hypervisor.options import Options
from agent.hypervisor.sim.config import SimConfig
from agent.hypervisor.sim.control import serve
from agent.hypervisor.sim.definition import Definition
from agent.hypervisor.sim.guest import Guest
from agent.hypervisor.sim.host import CPUS_OF_THE_HOST, Host
from agent.hypervisor.sim.incoming import SimIncoming
from agent.hypervisor.sim.outgoing import SimOutgoing
from drover.agent.v1 import host_pb2

VERSION = "1"


def _listed(guest: Guest) -> Domain:
    version = VERSION if guest.active else ""
    return replace(guest.facts(), running_version=version, installed_version=version)


class SimHypervisor:
    """`interface.Hypervisor`, simulated. Its guests end with the process, as on a host that loses power; with
    `SimConfig.state_path` they outlive the process, as real guests outlive an agent.

    Must be created inside a running event loop.
    """

    def __init__(self, config: SimConfig) -> None:
        self._host = Host(config)
        self._control: asyncio.Server | None = None

    async def open(self) -> None:
        if not self._host.opened:
            self._host.load()
            if self._host.config.control_path:
                self._control = await serve(self._host)

    async def close(self) -> None:
        if self._control is not None:
            self._control.close()
        if self._host.opened:
            await self._host.shut()

    async def info(self) -> HypervisorInfo:
        await self._host.gate("info")
        config, profile = self._host.config, self._host.profile
        return HypervisorInfo(
            driver="sim",
            hypervisor=profile.hypervisor,
            library_version=f"drover-sim {VERSION}",
            host_uuid=config.host_uuid,
            features=profile.features(config.ports, config.forbidden),
        )

    async def list_domains(self) -> list[Domain]:
        await self._host.gate("list_domains")
        return sorted(map(_listed, self._host.guests.values()), key=lambda domain: domain.name)

    async def get_domain(self, uuid: str) -> Domain:
        await self._host.gate("get_domain")
        return (await self._answering(self._host.guest(uuid))).facts()

    async def get_named(self, name: str) -> Domain:
        await self._host.gate("get_domain")
        return (await self._answering(self._host.named(name))).facts()

    async def describe(self, reference: str) -> tuple[Domain, Requirements]:
        await self._host.gate("describe")
        guest = await self._answering(self._host.find(reference))
        given = self._host.config.host_cpu if guest.definition.guest.cpu in CPUS_OF_THE_HOST else ""
        return guest.facts(), replace(guest.requirements(), host_cpu=given)

    async def _answering(self, guest: Guest) -> Guest:
        """Return the guest if its process answers; else wait `call_timeout` and raise `HypervisorUnavailable`, as libvirt does."""
        if guest.silent_since is not None:
            await asyncio.sleep(self._host.config.call_timeout)
            raise HypervisorUnavailable(f"guest {guest.name} did not answer within {self._host.config.call_timeout:g} s")
        return guest

    async def check_leaving(self, uuid: str, options: Options, destination_name: str) -> None:
        guest = self._host.guest(uuid)
        if why := await self.why_unresponsive(guest.name):
            raise DomainBusy(why)
        await self._host.gate("check_leaving")
        await self._answering(guest)
        SimOutgoing(self._host, uuid).check(options)

    async def incompatibilities(self, requirements: Requirements) -> list[str]:
        await self._host.gate("incompatibilities")
        return self._host.incompatibilities(requirements)

    def check_document(self, uuid: str, domain_xml: str) -> None:
        Definition.parse(domain_xml).check(uuid)

    async def disown(self, uuid: str) -> None:
        await self._host.gate("disown")
        guest = self._host.guest(uuid)
        guest.autostart = False
        if guest.active:
            guest.stop("user")
        else:
            self._host.drop(guest, "disowned")

    async def why_unresponsive(self, name: str) -> str:
        return "" if self._host.thawed.is_set() else f"the simulated hypervisor of {name} is frozen"

    async def death(self, name: str) -> HypervisorError | None:
        return None  # simulated guests have no process

    async def stored(self, uuid: str) -> Stored | None:
        await self._host.gate("stored")
        guest = self._host.guest(uuid)
        return None if guest.stored is None else Stored(guest.stored.text(), guest.autostart)

    async def set_autostart(self, uuid: str, autostart: bool) -> None:
        await self._host.gate("set_autostart")
        guest = self._host.guest(uuid)
        if guest.job is not Job.NONE:
            raise DomainBusy(f"domain {guest.name} is being migrated")
        guest.autostart = autostart and guest.stored is not None
        self._host.save()

    async def set_settings(self, uuid: str, settings: GuestSettings) -> Domain:
        await self._host.gate("set_settings")
        guest = await self._answering(self._host.guest(uuid))
        if guest.job is not Job.NONE:
            raise DomainBusy(f"domain {guest.name} is being migrated")
        guest.set(settings)
        self._host.save()
        return guest.facts()

    async def suspend(self, uuid: str) -> None:
        await self._host.gate("suspend")
        if self._host.guest(uuid).state is DomainState.RUNNING:
            self.pause(uuid)

    def outgoing(self, uuid: str) -> SimOutgoing:
        return SimOutgoing(self._host, uuid)

    def incoming(self, uuid: str) -> SimIncoming:
        return SimIncoming(self._host, uuid)

    def events(self) -> AsyncIterator[DomainEvent]:
        return self._host.events.stream()

    async def watch_interfaces(self) -> AsyncIterator[tuple[host_pb2.Interface, ...]]:
        """Yield the interfaces that have an address, now and after each change."""
        while True:
            changed = self._host.interfaces_changed.next
            known = self._host.interfaces.values()
            yield tuple(host_pb2.Interface(**msgspec.structs.asdict(interface)) for interface in known if interface.addresses)
            await changed.wait()

    # --- actions of a guest's user ------------------------------------------------------------------------------------

    def pause(self, reference: str) -> None:
        """Pause a guest, as its user."""
        guest = self._host.find(reference)
        if guest.state is not DomainState.RUNNING or guest.postcopy:
            raise HypervisorError(f"domain {guest.name} is not running")
        guest.wants_run = False
        guest.stop("user")

    def redefine(self, reference: str, title: str) -> None:
        """Edit the guest's definition for the next boot, as its user."""
        guest = self._host.guest(reference)
        if guest.stored is None:
            raise HypervisorError(f"domain {guest.name} is transient")
        guest.stored = guest.stored.with_(title=title)
        self._host.save()

    def start(self, reference: str) -> None:
        """Boot a guest, or resume one that its user had paused, as its user."""
        guest = self._host.find(reference)
        if not guest.active:
            guest.boot()
        elif guest.reason == "user":
            guest.wants_run = True
            guest.run("unpaused")

    # --- faults -------------------------------------------------------------------------------------------------------

    def fail_next(self, method: str, message: str) -> None:
        """Make the next call of that method of the interface (on any handle) fail with that message."""
        self._host.fail_next[method] = message

    def freeze(self) -> None:
        """Answer no call until `thaw`; guests and transfers continue."""
        self._host.thawed.clear()

    def silence(self, reference: str) -> None:
        """Make that guest's process answer nothing from now on."""
        self._host.find(reference).silent_since = self._host.now()

    def thaw(self) -> None:
        self._host.thawed.set()

    def cut(self, uuid: str) -> None:
        """Break the guest's memory stream at this end (the other end sees a reset)."""
        for end in (self._host.senders.get(uuid), self._host.receivers.get(uuid)):
            if end is not None:
                end.cut()
