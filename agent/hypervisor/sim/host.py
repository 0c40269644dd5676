"""State that the parts of a simulated host share: its guests, transfers and tasks, and the faults that tests inject."""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec

from agent.hypervisor.base import (
    PAUSED_BY_USER,
    DomainAmbiguous,
    DomainBusy,
    DomainEvent,
    DomainNotFound,
    HypervisorError,
    HypervisorUnavailable,
    Incompatible,
    Requirements,
    TransferFailed,
)
from agent.hypervisor.events import Fanout
from agent.hypervisor.names import ambiguity, is_uuid
from agent.hypervisor.options import Options
from agent.hypervisor.sim import serial
from agent.hypervisor.sim.config import SimConfig
from agent.hypervisor.sim.definition import Definition, requirements_of
from agent.hypervisor.sim.guest import Guest, GuestRecord
from agent.hypervisor.sim.link import Link
from agent.hypervisor.sim.profiles import PROFILES
from agent.runtime.bell import Bell

T = TypeVar("T")

CPUS_OF_THE_HOST = frozenset({"host-passthrough", "maximum"})
"""CPU models for which a guest gets its host's CPU."""
FLUSH = 0.05
"""Seconds between two writes to the serial logs of running guests."""
FAULTS: dict[str, type[HypervisorError]] = {"perform": TransferFailed, "finish": TransferFailed}
"""Error of an injected fault by method; all other methods raise `HypervisorError`."""


class TransferEnd(Protocol):
    """One end of a transfer, as its host sees it: a `sender.Sender` or a `receiver.Receiver`."""

    task: asyncio.Task[Any] | None
    """Sends the memory; None at the destination."""

    def end(self, reason: str) -> None: ...

    def cut(self) -> None: ...


class Host:
    def __init__(self, config: SimConfig) -> None:
        self.config = config
        self.profile = PROFILES[config.profile]
        self.guests: dict[str, Guest] = {}
        self.senders: dict[str, TransferEnd] = {}
        self.receivers: dict[str, TransferEnd] = {}
        self.holders: dict[str, object] = {}
        """By the guest's UUID: the handle whose Begin holds the guest."""
        self.link = Link(config.link_rate)
        self.incoming_link = Link(config.incoming_link_rate) if config.incoming_link_rate else None
        self.events = Fanout()
        self.interfaces = {interface.name: interface for interface in config.interfaces}
        self.interfaces_changed = Bell()
        self.fail_next = dict(config.fail_next)
        self.thawed = asyncio.Event()
        self.thawed.set()
        self.opened = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self._scribe: asyncio.Task[None] | None = None

    # --- time and tasks -----------------------------------------------------------------------------------------------

    @staticmethod
    def now() -> float:
        return asyncio.get_running_loop().time()

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start a task that belongs to the hypervisor, not to the caller that waits for it."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        return task

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # retrieved here, so that asyncio does not warn where nobody waited

    async def gate(self, method: str) -> None:
        """Raise for a hypervisor that is closed or frozen, and for an injected fault. Every interface method calls this first."""
        if not self.opened:
            raise HypervisorUnavailable("the simulated hypervisor is closed")
        if not self.thawed.is_set():
            try:
                async with asyncio.timeout(self.config.call_timeout):
                    await self.thawed.wait()
            except TimeoutError:
                raise HypervisorUnavailable(f"{method}: no answer within {self.config.call_timeout:g} s") from None
        message = self.fail_next.pop(method, None)
        if message is not None:
            raise FAULTS.get(method, HypervisorError)(message, {"fault": method})

    async def call(self, method: str, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run `work` within `call_timeout`. Cancelling the await does not stop the work."""
        await self.gate(method)
        return await self.wait(method, self.spawn(work()), self.config.call_timeout)

    @staticmethod
    async def wait(method: str, work: Awaitable[T], timeout: float | None) -> T:
        try:
            async with asyncio.timeout(timeout):
                return await asyncio.shield(work)
        except TimeoutError:
            raise HypervisorUnavailable(f"{method}: no answer within {timeout:g} s") from None

    def set_links(self, links: Mapping[str, bool]) -> None:
        """Take interfaces up or down."""
        if unknown := sorted(links.keys() - self.interfaces.keys()):
            raise HypervisorError(f"no interface {unknown[0]!r}; there are {', '.join(self.interfaces) or 'none'}")
        for name, up in links.items():
            self.interfaces[name] = msgspec.structs.replace(self.interfaces[name], up=up)
        self.interfaces_changed.ring()

    # --- guests -------------------------------------------------------------------------------------------------------

    def guest(self, uuid: str) -> Guest:
        return self._only([self.guests[uuid]] if uuid in self.guests else [], uuid)

    def named(self, name: str) -> Guest:
        return self._only([g for g in self.guests.values() if g.name == name], name)

    def find(self, reference: str) -> Guest:
        """Return the guest that a user means by a name or a UUID. Raises `DomainAmbiguous`, `DomainNotFound`."""
        found = [g for g in self.guests.values() if reference == g.name or (is_uuid(reference) and reference.lower() == g.uuid)]
        if text := ambiguity(reference, [(g.name, g.uuid) for g in found]):
            raise DomainAmbiguous(text)
        return self._only(found, reference)

    @staticmethod
    def _only(found: Sequence[Guest], reference: str) -> Guest:
        if not found:
            raise DomainNotFound(f"no domain {reference!r} on this host")
        return found[0]

    def add(self, definition: Definition, stored: Definition | None) -> Guest:
        guest = Guest(definition, self.now, self.notify, stored=stored)
        self.guests[guest.uuid] = guest
        return guest

    def drop(self, guest: Guest, reason: str) -> None:
        """End a copy. Only its stored definition stays, if there is one."""
        guest.shut_off(reason)
        if guest.stored is None:
            del self.guests[guest.uuid]
            self.save()

    async def end(self, uuid: str) -> None:
        """Destroy the guest and its definition, as its user, even during a migration. Does nothing where it is not here."""
        sender, receiver = self.senders.get(uuid), self.receivers.get(uuid)
        if sender is not None:
            sender.end("the guest was destroyed")
            await asyncio.wait([sender.task] if sender.task else [])
        if receiver is not None:
            receiver.end("the guest was destroyed")
        if (guest := self.guests.get(uuid)) is not None:
            guest.stored = None
            self.release(guest)
            self.drop(guest, "destroyed")

    def save_memory(self, uuid: str) -> None:
        """Save the memory of a persistent guest and end it, as its user. The saved image does not outlive the process."""
        guest = self.guest(uuid)
        guest.saved_image = guest.stored is not None
        self.drop(guest, "saved")

    def notify(self, guest: Guest, kind: str, detail: str) -> None:
        self.events.put(DomainEvent(guest.uuid, kind, detail, time.monotonic()))
        self.save()
        self._watch_logs()

    def release(self, guest: Guest) -> None:
        """End the migration job that holds a guest."""
        guest.job = guest.job.NONE
        self.holders.pop(guest.uuid, None)

    def refuse_busy(self, guest: Guest, who: object) -> None:
        if guest.uuid in self.senders:
            raise DomainBusy(f"domain {guest.name} is being migrated")
        if self.holders.get(guest.uuid, who) is not who:
            raise DomainBusy(f"domain {guest.name} is held by another migration job")

    # --- capabilities of this host ------------------------------------------------------------------------------------

    def check_options(self, options: Options) -> None:
        refusals = self.profile.refusals(options)
        if refusals:
            raise Incompatible("; ".join(refusals))

    def incompatibilities(self, needs: Requirements) -> list[str]:
        has = {
            "architecture": (needs.arch, self.config.archs),
            "machine type": (needs.machine, self.config.machine_types),
            "virtualization": (needs.virt_type, self.config.virt_types),
            "CPU model": (needs.cpu, {*self.config.cpu_models, *CPUS_OF_THE_HOST}),
        }
        if needs.cpu in CPUS_OF_THE_HOST and needs.host_cpu != self.config.host_cpu:
            return [
                f"the guest uses its host's CPU ({needs.cpu}), and that differs: {needs.host_cpu or 'unknown'} at the source, "
                f"{self.config.host_cpu} here"
            ]
        return [f"{what} {wanted} is not supported here" for what, (wanted, known) in has.items() if wanted not in known]

    def check_arrival(self, definition: Definition) -> None:
        # As in libvirt, Prepare does not know which CPU the source gave.
        wrong = self.incompatibilities(replace(requirements_of(definition), host_cpu=self.config.host_cpu))
        if wrong:
            raise Incompatible("; ".join(wrong))
        log = definition.guest.log
        if log and not serial.within(log, self.config.log_root):
            raise Incompatible(f"the serial log {log} is not below this host's log_root")
        twin = next((g for g in self.guests.values() if (g.name == definition.name) != (g.uuid == definition.uuid)), None)
        if twin is not None:
            raise HypervisorError(f"domain {twin.name} is already defined here with UUID {twin.uuid}")

    # --- serial logs: one task writes all of them; none runs while no guest has one -----------------------------------

    def _watch_logs(self) -> None:
        busy = self._scribe is not None and not self._scribe.done()
        if not busy and any(g.ticking and g.logs for g in self.guests.values()):
            self._scribe = self.spawn(self._write_logs())

    async def _write_logs(self) -> None:
        while writers := [g for g in self.guests.values() if g.ticking and g.logs]:
            for guest in writers:
                guest.flush()
            await asyncio.sleep(FLUSH)

    # --- start and end ------------------------------------------------------------------------------------------------

    def load(self) -> None:
        """Load the guests from the state file, or else from the configuration."""
        path = self.config.state_path
        self.opened = True
        if path and os.path.exists(path):
            for record in msgspec.json.decode(Path(path).read_bytes(), type=list[GuestRecord]):
                self._revive(record)
        elif not self.guests:
            for it in self.config.guests:
                self.create(Definition.of(it))
        self.save()

    def create(self, definition: Definition) -> None:
        it = definition.guest
        definition.check(definition.uuid)
        if definition.uuid in self.guests or any(g.name == it.name for g in self.guests.values()):
            raise HypervisorError(f"a guest named {it.name}, or with its UUID, already exists here")
        guest = self.add(definition, definition if it.persistent or it.state == "shutoff" else None)
        guest.autostart = it.autostart and guest.stored is not None
        if it.state != "shutoff":
            guest.boot()
        if it.state == "paused":
            guest.wants_run = it.pause_reason != PAUSED_BY_USER
            guest.stop(it.pause_reason)

    def _revive(self, record: GuestRecord) -> None:
        definition = record.running or record.stored
        if definition is not None and definition.uuid not in self.guests:
            self.add(definition, record.stored).revive(record)

    def save(self) -> None:
        """Write the state file, without copies that wait for a stream: these do not outlive the process."""
        path = self.config.state_path
        if not path or not self.opened:
            return
        records = [g.record() for g in self.guests.values()]
        kept = [r if not g.incoming else _definition_only(r) for g, r in zip(self.guests.values(), records, strict=True)]
        text = msgspec.json.encode([r for r in kept if r.running or r.stored])
        beside = Path(f"{path}.new")
        beside.write_bytes(text)
        beside.replace(path)

    async def shut(self) -> None:
        """Abort every transfer and end every task. Guests do not run from now on."""
        for sender in list(self.senders.values()):
            sender.end("the hypervisor is closing")
        for receiver in list(self.receivers.values()):
            receiver.end("the hypervisor is closing")
        if self._scribe is not None:
            self._scribe.cancel()
        await asyncio.gather(*[sender.task for sender in self.senders.values() if sender.task], return_exceptions=True)
        self.save()
        self.opened = False
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for guest in self.guests.values():
            guest.flush()
        self.events.close()
        await asyncio.sleep(0)  # lets the loop close the aborted connections


def _definition_only(record: GuestRecord) -> GuestRecord:
    return msgspec.structs.replace(record, running=None, state="shutoff", postcopy=False, left=False, owed=0)
