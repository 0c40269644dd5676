"""`LibvirtHypervisor`: the QEMU guests of this host's libvirtd."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import libvirt
import structlog

from agent.hypervisor.base import (
    Domain,
    DomainBusy,
    DomainEvent,
    DomainState,
    Features,
    HypervisorError,
    HypervisorInfo,
    Requirements,
    Stored,
)
from agent.hypervisor.events import Fanout
from agent.hypervisor.guest_settings import GuestSettings
from agent.hypervisor.libvirt import domain as domains
from agent.hypervisor.libvirt import host, leaving, metadata, phases, postcopy, process, qemu_log, stored, threads
from agent.hypervisor.libvirt import options as option_flags
from agent.hypervisor.libvirt.connection import Link, Pool, Session
from agent.hypervisor.libvirt.guard import Guard
from agent.hypervisor.libvirt.hook import is_installed
from agent.hypervisor.libvirt.incoming import LibvirtIncoming
from agent.hypervisor.libvirt.outgoing import LibvirtOutgoing
from agent.hypervisor.libvirt.service import service_of
from agent.hypervisor.libvirt.versions import Versions
from agent.hypervisor.libvirt.watch import Watch
from agent.hypervisor.options import Options, Support

log = structlog.get_logger()

LIST_SECONDS = 1.0
"""A list of guests that takes longer is waiting for a guest that does not answer."""

CHECK_SECONDS = 1.5
"""Bound of the check whether a guest can leave. libvirt asks QEMU for some milliseconds; a longer call waits for something else.
It is below the 2 s after which a coordinator treats a host as silent."""

CPU_CACHE = 64
"""Most CPU comparisons kept: the guests of a fleet share a handful of CPU models."""


class LibvirtHypervisor:
    """`interface.Hypervisor` on libvirt. Short calls share a pool of connections; each migration has its own connection."""

    def __init__(self, uri: str, ports: tuple[int, int] = (49152, 49215), call_timeout: float = 30.0) -> None:
        """Store the settings; nothing is opened yet. `uri` is libvirt's, such as ``qemu:///system``. `ports` are those of its
        qemu.conf (`migration_port_min` and `_max`; the default is libvirt's own). `call_timeout` in seconds bounds every call but
        Perform and Finish.
        """
        self._uri = uri
        self._ports = ports
        self._pool = Pool(uri, call_timeout)
        self._fanout = Fanout()
        self._settings = metadata.Cache()
        self._watch = Watch(Session(self._pool), self._fanout, self._settings.forget)
        self._versions = Versions(service_of(uri).logs)
        self._known: _Known | None = None
        self._reading = asyncio.Lock()

    async def open(self) -> None:
        hook = service_of(self._uri).hook
        if hook is not None and not is_installed(hook):
            log.warning(
                "libvirt's hook is not installed, or is of another version of Drover; install it on this host with "
                "`python -m agent.hypervisor.libvirt.hook`",
                hook=str(hook),
            )
        await self._watch.start()
        await self._capabilities()  # read in advance: the first read is slow, and each migration needs them

    async def close(self) -> None:
        await self._watch.stop()
        self._fanout.close()
        await self._pool.close()

    async def info(self) -> HypervisorInfo:
        known = await self._capabilities()
        if await self._pool.call(_hypervisor) != known.hypervisor:  # libvirtd has noticed that QEMU was replaced
            self._known = None
            known = await self._capabilities()
        forbidden = postcopy.refusal(postcopy.read_sysctl(), known.capabilities.qemu_uid)
        reasons = {"post_copy": forbidden} if forbidden else {}
        return HypervisorInfo(
            driver="libvirt",
            hypervisor=known.hypervisor,
            library_version=known.library,
            host_uuid=known.capabilities.host_uuid,
            features=Features(
                bandwidth_unit=option_flags.MIB,
                options={**option_flags.SUPPORT, **dict.fromkeys(reasons, Support.UNSUPPORTED)},
                reasons=reasons,
                uri_transports=known.capabilities.uri_transports,
                ports=self._ports,
                bandwidth=True,
                split_phases=phases.available(),
            ),
        )

    async def list_domains(self) -> list[Domain]:
        installed = (await self._capabilities()).installed

        def read(connection: Any) -> list[Domain]:
            with_settings = ((each, self._with_settings(each, domain)) for each, domain in domains.read_all(connection))
            found = self._versions.add(with_settings, installed)
            return sorted(found, key=lambda domain: domain.name)

        try:
            async with asyncio.timeout(LIST_SECONDS):
                return await self._pool.call(read)
        except TimeoutError:  # a guest stopped answering during the read: from now on `silent_for` shows it before any wait
            return await self._pool.call(read)

    async def get_domain(self, uuid: str) -> Domain:
        return await self._pool.call(lambda connection: domains.read_one(connection, uuid))

    async def get_named(self, name: str) -> Domain:
        return await self._pool.call(lambda connection: domains.read(domains.by_name(connection, name)))

    async def describe(self, reference: str) -> tuple[Domain, Requirements]:
        return await self._pool.call(lambda connection: _describe(connection, domains.find(connection, reference)))

    async def check_leaving(self, uuid: str, options: Options, destination_name: str) -> None:
        service = service_of(self._uri)

        def check(connection: Any) -> None:
            domain = domains.by_uuid(connection, uuid)
            if why := process.stopped(domain.name(), service.run):
                raise DomainBusy(why)
            leaving.check(domain, service, options, destination_name)

        try:
            async with asyncio.timeout(CHECK_SECONDS):
                with leaving.refusals():
                    await self._pool.call(check)
        except TimeoutError:
            raise DomainBusy(
                f"libvirt waited {CHECK_SECONDS:g} s for another job of the guest (a save, a snapshot, a device change) or for its "
                f"QEMU; see `virsh domjobinfo {uuid}` and `virsh domcontrol {uuid}`"
            ) from None

    async def incompatibilities(self, requirements: Requirements) -> list[str]:
        known = await self._capabilities()
        found = host.incompatibilities(known.capabilities, requirements, known.hypervisor)
        if found:
            return found  # the CPU can be compared only for a machine type that exists
        cpu = await self._compare_cpu(known, requirements)
        return [cpu] if cpu else []

    def check_document(self, uuid: str, domain_xml: str) -> None:
        option_flags.check_document(domain_xml, uuid)

    async def disown(self, uuid: str) -> None:
        await self._pool.call(lambda connection: _disown(domains.by_uuid(connection, uuid)))

    async def why_unresponsive(self, name: str) -> str:
        with contextlib.suppress(HypervisorError):
            return await asyncio.wrap_future(threads.submit(lambda: process.stopped(name, service_of(self._uri).run)))
        return ""

    async def death(self, name: str) -> HypervisorError | None:
        with contextlib.suppress(HypervisorError):
            return await asyncio.wrap_future(threads.submit(lambda: qemu_log.death(name, service_of(self._uri).logs)))
        return None

    async def stored(self, uuid: str) -> Stored | None:
        return await self._pool.call(lambda connection: stored.read(domains.by_uuid(connection, uuid)))

    async def set_autostart(self, uuid: str, autostart: bool) -> None:
        await self._pool.call(lambda connection: stored.set_autostart(domains.by_uuid(connection, uuid), autostart))

    async def set_settings(self, uuid: str, settings: GuestSettings) -> Domain:
        def write(connection: Any) -> Domain:
            domain = domains.by_uuid(connection, uuid)
            return replace(domains.read(domain), settings=metadata.write(domain, settings))

        try:
            return await self._pool.call(write)
        finally:
            self._settings.forget(uuid)  # libvirt's event may come later than the answer

    def _with_settings(self, libvirts: Any, domain: Domain) -> Domain:
        return replace(domain, settings=self._settings.of(libvirts, domain.uuid))

    async def suspend(self, uuid: str) -> None:
        await self._pool.call(lambda connection: _suspend(domains.by_uuid(connection, uuid)))

    def outgoing(self, uuid: str) -> LibvirtOutgoing:
        return LibvirtOutgoing(uuid, Session(self._pool), self._pool, Guard(self._uri, uuid), self._fanout.stream)

    def incoming(self, uuid: str) -> LibvirtIncoming:
        return LibvirtIncoming(uuid, Session(self._pool), self._pool, self._ports, self._fanout.stream)

    def events(self) -> AsyncIterator[DomainEvent]:
        return self._fanout.stream()

    async def _capabilities(self) -> "_Known":
        """Return what the host can do, read once for each run of libvirtd: a restarted one may be upgraded."""
        async with self._reading:
            link = self._watch.link  # the connection that lasts as long as libvirtd runs
            if self._known is None or link is None or self._known.link is not link:
                self._known = _Known(link, *await self._pool.call(_read_host))
            return self._known

    async def _compare_cpu(self, known: "_Known", needs: Requirements) -> str:
        key = (needs.arch, needs.machine, needs.virt_type, needs.cpu, needs.host_cpu)
        if key not in known.cpus:
            verdict = await self._pool.call(lambda connection: host.compare_cpu(connection, needs))
            if len(known.cpus) >= CPU_CACHE:
                known.cpus.clear()
            known.cpus[key] = verdict
        return known.cpus[key]


class _Known:
    """Properties of the host, as one run of libvirtd reported them."""

    def __init__(self, link: Link | None, capabilities: host.Capabilities, hypervisor: str, library: str) -> None:
        self.link = link
        self.capabilities = capabilities
        self.hypervisor = hypervisor
        self.library = library
        self.cpus: dict[tuple[str, ...], str] = {}
        version = hypervisor.rpartition(" ")[2]
        self.installed = {arch.emulator: version for arch in capabilities.architectures.values()}
        """Version by QEMU binary, for the binaries that libvirt chooses by default."""


def _describe(connection: Any, domain: Any) -> tuple[Domain, Requirements]:
    xml = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_MIGRATABLE)
    needs = host.parse_requirements(xml)
    if host.has_cpu_of_the_host(needs):
        given = host.given_cpu(connection, needs.arch, needs.machine, needs.virt_type, host.emulator_of(xml))
        needs = replace(needs, host_cpu=given)
    return replace(domains.read(domain, domains.silent_for(domain)), settings=metadata.of_xml(xml)), needs


def _suspend(domain: Any) -> None:
    if domains.state_of(domain.state()[0]) is DomainState.RUNNING:
        domain.suspend()


def _disown(domain: Any) -> None:
    if domain.isActive():
        domain.suspend()
        stored.set_autostart(domain, False)
    else:
        domain.undefineFlags(domains.UNDEFINE)


def _read_host(connection: Any) -> tuple[host.Capabilities, str, str]:
    return (
        host.parse_capabilities(connection.getCapabilities()),
        _hypervisor(connection),
        f"libvirt {_version(connection.getLibVersion())}",
    )


def _hypervisor(connection: Any) -> str:
    return f"{connection.getType()} {_version(connection.getVersion())}"


def _version(number: int) -> str:
    """Format a version from libvirt's notation: major times 1,000,000 + minor times 1,000 + release."""
    return f"{number // 1_000_000}.{number // 1_000 % 1_000}.{number % 1_000}"
