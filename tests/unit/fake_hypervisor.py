"""A hypervisor under a test's control: each call can be held or made to fail, and is recorded in a list.

Guests are facts in `domains`. Two fakes that share a `Wire` move a guest as libvirt does: Perform sends until it is told that
all was sent, Finish (armed early) starts the copy at that moment. The jobs belong to the hypervisor, not to who waits for them.
"""

import asyncio
import dataclasses
from collections import defaultdict
from collections.abc import AsyncIterator, Coroutine
from typing import Any

from agent.hypervisor.base import (
    Begun,
    Domain,
    DomainBusy,
    DomainEvent,
    DomainNotFound,
    DomainState,
    Features,
    Finished,
    HypervisorError,
    HypervisorInfo,
    Job,
    Performed,
    Prepared,
    Requirements,
    Stored,
    TransferFailed,
)
from agent.hypervisor.guest_settings import GuestSettings
from agent.hypervisor.options import Options, Support
from agent.transfer.progress import Progress

UUID = "8b2f4f7e-0d5c-4a57-9c55-3c1f5a9e0001"
DOCUMENT = f"<domain><uuid>{UUID}</uuid></domain>"
"""The stored definition of every guest."""

FEATURES = Features(
    options={"post_copy": Support.SUPPORTED, "live": Support.ALWAYS_ON, "auto_converge": Support.SUPPORTED},
    uri_transports=("tcp",),
    ports=(49152, 49215),
    bandwidth=True,
    split_phases=True,
)


def guest(uuid: str = UUID, name: str = "web1", **facts: Any) -> Domain:
    return Domain(
        **{
            "name": name,
            "uuid": uuid,
            "state": DomainState.RUNNING,
            "reason": "booted",
            "memory_bytes": 1 << 20,
            "vcpus": 1,
            "persistent": True,
            **facts,
        }
    )


class Wire:
    """The stream between two hosts. `all_sent` and `starts` are set at first, so that a move ends at once.

    Clear `all_sent` to hold the transfer, `starts` to hold the copy back that has arrived.
    """

    def __init__(self) -> None:
        self.all_sent = asyncio.Event()
        self.all_sent.set()
        self.starts = asyncio.Event()
        self.starts.set()
        self.arrived = asyncio.Event()
        self.broken = asyncio.Event()

    async def first(self, *events: asyncio.Event) -> None:
        tasks = [asyncio.ensure_future(event.wait()) for event in events]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()


class FakeHypervisor:
    """`agent.hypervisor.base.Hypervisor`."""

    def __init__(self, name: str, wire: Wire | None = None, calls: list[str] | None = None) -> None:
        self.name = name
        self.domains: dict[str, Domain] = {}
        self.hindrances: dict[str, str] = {}
        """By guest: the answer of `hindrance`."""
        self.stands_still = False
        """If set, nothing more is sent."""
        self.connect_retries: int | None = None
        """How often a connection request was repeated without an answer; None: there is an answer."""
        self.deaths: dict[str, HypervisorError] = {}
        """By guest: how its process died."""
        self.destructions: dict[str, HypervisorError] = {}
        """By guest (UUID): the error of a copy that others destroyed."""
        self.wire = wire or Wire()
        self.calls: list[str] = calls if calls is not None else []
        """Every call with an effect, in order; a test's journal may write here too."""
        self.told: list[tuple[str, int]] = []
        """The limits that it was told, in order."""
        self.reports: int | None = None
        """The limit that it reports after a change. None: as it was told."""
        self.arguments: dict[str, tuple[Any, ...]] = {}
        """By call: the arguments of the last one."""
        self.fails: dict[str, list[Exception]] = defaultdict(list)
        """By call: the errors of the next calls."""
        self.fails_always: dict[str, Exception] = {}
        self.held: dict[str, asyncio.Event] = {}
        """By call: it waits for this event before it does anything."""
        self.problems: list[str] = []
        self.autostarts: set[str] = set()
        """Guests with autostart on."""
        self.closed_sessions = 0
        self.unrun: set[str] = set()
        """Copies whose process has ended and that never ran."""
        self._jobs: set[asyncio.Task[Any]] = set()
        self._news: list[asyncio.Queue[DomainEvent]] = []

    async def called(self, call: str, *arguments: Any, quiet: bool = False) -> None:
        if not quiet:
            self.calls.append(call)
        self.arguments[call] = arguments
        if call in self.held:
            await self.held[call].wait()
        if self.fails[call]:
            raise self.fails[call].pop(0)
        if call in self.fails_always:
            raise self.fails_always[call]

    def put(self, domain: Domain) -> None:
        self.domains[domain.uuid] = domain
        for queue in self._news:
            queue.put_nowait(DomainEvent(domain.uuid, "changed"))

    @property
    def heard(self) -> bool:
        """Whether anybody gets its events."""
        return bool(self._news)

    def tell(self, kind: str, detail: str, uuid: str = UUID) -> None:
        """Send an event of a guest."""
        for queue in self._news:
            queue.put_nowait(DomainEvent(uuid, kind, detail))

    def change(self, uuid: str, **facts: Any) -> None:
        self.put(dataclasses.replace(self.domains[uuid], **facts))

    async def job(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Make a call that goes on if its caller is cancelled."""
        task = asyncio.create_task(work)
        self._jobs.add(task)
        task.add_done_callback(self._job_ended)
        return await asyncio.shield(task)

    def _job_ended(self, task: "asyncio.Task[Any]") -> None:
        self._jobs.discard(task)
        if not task.cancelled():
            task.exception()  # its caller may have gone away

    # ---- the interface

    async def open(self) -> None: ...

    async def close(self) -> None:
        for job in self._jobs:
            job.cancel()
        await asyncio.gather(*self._jobs, return_exceptions=True)

    async def info(self) -> HypervisorInfo:
        return HypervisorInfo("fake", "fake 1", "fake 1", f"uuid of {self.name}", FEATURES)

    async def list_domains(self) -> list[Domain]:
        return sorted(self.domains.values(), key=lambda domain: domain.name)

    async def get_domain(self, uuid: str) -> Domain:
        await self.called("get_domain", uuid, quiet=True)
        if uuid not in self.domains:
            raise DomainNotFound(f"no domain {uuid}")
        return self.domains[uuid]

    async def get_named(self, name: str) -> Domain:
        await self.called("get_domain", name, quiet=True)
        return await self.get_domain(next((uuid for uuid, domain in self.domains.items() if domain.name == name), name))

    async def describe(self, reference: str) -> tuple[Domain, Requirements]:
        domain = await self.get_named(reference)
        return domain, Requirements(domain.name, domain.uuid, domain.memory_bytes, domain.vcpus, "x86_64", "pc", "kvm", "")

    async def check_leaving(self, uuid: str, options: Options, destination_name: str) -> None:
        if why := await self.why_unresponsive(self.domains[uuid].name):
            raise DomainBusy(why)
        await self.called("check_leaving", uuid, options, destination_name, quiet=True)

    async def incompatibilities(self, requirements: Requirements) -> list[str]:
        await self.called("incompatibilities", requirements, quiet=True)
        return self.problems

    def check_document(self, uuid: str, domain_xml: str) -> None:
        """Accept every document."""

    async def disown(self, uuid: str) -> None:
        await self.called("disown")
        if (await self.get_domain(uuid)).state is DomainState.RUNNING:
            self.change(uuid, state=DomainState.PAUSED, reason="disowned")
        else:
            del self.domains[uuid]

    async def why_unresponsive(self, name: str) -> str:
        return self.hindrances.get(name, "")

    async def death(self, name: str) -> HypervisorError | None:
        return self.deaths.get(name)

    async def stored(self, uuid: str) -> Stored | None:
        domain = await self.get_domain(uuid)
        return Stored(DOCUMENT, uuid in self.autostarts) if domain.persistent else None

    async def set_autostart(self, uuid: str, autostart: bool) -> None:
        await self.called(f"autostart {'on' if autostart else 'off'}", quiet=autostart is (uuid in self.autostarts))
        await self.get_domain(uuid)
        (self.autostarts.add if autostart else self.autostarts.discard)(uuid)

    async def set_settings(self, uuid: str, settings: GuestSettings) -> Domain:
        await self.called("set_settings", uuid, settings)
        self.change(uuid, settings=settings or None)
        return self.domains[uuid]

    async def suspend(self, uuid: str) -> None:
        await self.called("suspend")
        self.change(uuid, state=DomainState.PAUSED, reason="user")

    def outgoing(self, uuid: str) -> "FakeOutgoing":
        return FakeOutgoing(self, uuid)

    def incoming(self, uuid: str) -> "FakeIncoming":
        return FakeIncoming(self, uuid)

    async def events(self) -> AsyncIterator[DomainEvent]:
        queue: asyncio.Queue[DomainEvent] = asyncio.Queue()
        self._news.append(queue)
        while True:
            yield await queue.get()


class FakeOutgoing:
    """`agent.hypervisor.base.Outgoing`."""

    def __init__(self, host: FakeHypervisor, uuid: str) -> None:
        self._host = host
        self._uuid = uuid
        self._aborted = asyncio.Event()
        self._sent = 0
        self._began = False

    user_pauses = False
    """Whether the guest's user pauses it as soon as its memory flows."""

    @property
    def paused_by_user(self) -> bool:
        return self.user_pauses and self._began

    async def begin(self, options: Options, destination_name: str) -> Begun:
        await self._host.called("begin", self._uuid, options, destination_name)
        return Begun(f"<domain><uuid>{self._uuid}</uuid></domain>", b"begun")

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
        await self._host.called("perform", uri, domain_xml, cookie, options, destination_name, bandwidth, max_downtime)
        self._began = True
        performed: Performed = await self._host.job(self._send())
        return performed

    async def _send(self) -> Performed:
        host, wire = self._host, self._host.wire
        host.change(self._uuid, job=Job.OUTGOING)
        await wire.first(wire.all_sent, wire.broken, self._aborted)
        if self._aborted.is_set() or wire.broken.is_set():
            host.change(self._uuid, job=Job.NONE)
            wire.broken.set()
            raise TransferFailed("aborted" if self._aborted.is_set() else "the stream broke")
        host.change(self._uuid, job=Job.NONE, state=DomainState.PAUSED, reason="migration")
        wire.arrived.set()
        return Performed(b"performed", Progress(elapsed=1.0, total_bytes=1 << 20, downtime=0.01))

    async def abort(self) -> None:
        await self._host.called("abort")
        self._aborted.set()

    async def progress(self) -> Progress | None:
        await self._host.called("progress", quiet=True)
        self._sent += 1
        sent = 0 if self._host.stands_still else self._sent
        return Progress(iteration=1, total_bytes=1 << 20, processed_bytes=sent, remaining_bytes=1 << 19, rate=1 << 18)

    async def connect_retries(self, uri: str) -> int | None:
        return self._host.connect_retries

    async def stop_connecting(self, uri: str) -> None:
        await self._host.called("stop_connecting", uri, quiet=True)
        if self._host.connect_retries is not None:
            self._host.connect_retries = None
            self._aborted.set()

    async def start_postcopy(self) -> None:
        await self._host.called("start_postcopy")

    async def set_bandwidth(self, bandwidth: int) -> int:
        await self._host.called("set_bandwidth", bandwidth)
        self._host.told.append(("set_bandwidth", bandwidth))
        return bandwidth if self._host.reports is None else self._host.reports

    async def set_max_downtime(self, seconds: float) -> float:
        await self._host.called("set_max_downtime", seconds)
        return seconds

    async def remove(self, cookie: bytes, options: Options) -> None:
        await self._host.called("remove", cookie, options)
        self._host.domains.pop(self._uuid, None)

    async def settle(self) -> None:
        await self._host.called("settle")

    async def resume(self) -> None:
        await self._host.called("resume")
        if self._uuid not in self._host.domains:
            raise DomainNotFound("its process died")
        self._host.change(self._uuid, state=DomainState.RUNNING, reason="migration-canceled")

    async def close(self) -> None:
        self._host.closed_sessions += 1


class FakeIncoming:
    """`agent.hypervisor.base.Incoming`."""

    def __init__(self, host: FakeHypervisor, uuid: str) -> None:
        self._host = host
        self._uuid = uuid

    async def prepare(
        self, domain_xml: str, cookie: bytes, options: Options, destination_name: str, listen_address: str, uri: str
    ) -> Prepared:
        await self._host.called("prepare", domain_xml, cookie, options, destination_name, listen_address, uri)
        self._host.put(
            guest(self._uuid, destination_name, state=DomainState.PAUSED, reason="migration", job=Job.INCOMING, incoming=True)
        )
        return Prepared(f"tcp://{listen_address}:49152", b"prepared")

    async def finish(
        self, domain_xml: str, cookie: bytes, options: Options, destination_name: str, stored: Stored | None = None
    ) -> Finished:
        await self._host.called("finish", domain_xml, cookie, options, destination_name, stored)
        finished: Finished = await self._host.job(self._receive())
        return finished

    async def _receive(self) -> Finished:
        host, wire = self._host, self._host.wire
        await wire.first(wire.arrived, wire.broken)
        await wire.first(wire.starts, wire.broken)
        if wire.broken.is_set():
            host.domains.pop(self._uuid, None)
            raise TransferFailed("the stream broke: the copy is gone")
        host.change(self._uuid, state=DomainState.RUNNING, reason="migrated", job=Job.NONE, incoming=False)
        return Finished(b"finished")

    @property
    def never_ran(self) -> bool:
        return self._uuid in self._host.unrun

    async def destroyed(self) -> HypervisorError | None:
        return self._host.destructions.get(self._uuid)

    async def abandon(self) -> None:
        await self._host.called("abandon")
        domain = self._host.domains.get(self._uuid)
        if domain is not None and not domain.incoming and not self.never_ran:
            raise DomainBusy("it has run")
        self._host.domains.pop(self._uuid, None)
        self._host.wire.broken.set()

    async def close(self) -> None:
        self._host.closed_sessions += 1
