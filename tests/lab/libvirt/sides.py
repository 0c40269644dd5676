"""Two sides of the libvirt driver, and a migration between them phase by phase."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field

from agent.hypervisor.base import Begun, Domain, DomainNotFound, Finished, HypervisorError, Performed, Prepared
from agent.hypervisor.interface import Incoming, Outgoing
from agent.hypervisor.libvirt import LibvirtHypervisor
from agent.hypervisor.options import Options
from tests.kit.lab import Guest, Lab
from tests.kit.lab.guestlog import judge_file

SLOW = 8 << 20
"""Bytes per second at which the 64 MiB guest takes some 8 s: long enough to act while memory flows."""


@dataclass
class Side:
    """A host with its driver."""

    lab: Lab
    name: str
    driver: LibvirtHypervisor

    @property
    def address(self) -> str:
        return self.lab[self.name].addresses["mig1"]

    async def state(self, guest: Guest) -> tuple[str, str]:
        """The domain's state and reason; ("absent", "") when there is none."""
        try:
            domain = await self.driver.get_domain(str(guest.stable_uuid))
        except DomainNotFound:
            return "absent", ""
        return domain.state.value, domain.reason


def assert_perfect(guest: Guest) -> None:
    guest.wait_lines(20)
    verdict = judge_file(guest.serial_log)
    assert verdict.perfect, verdict.problems()


@dataclass
class Migration:
    """The phases with what each needs of the one before."""

    source: Side
    destination: Side
    guest: Guest
    options: Options = field(default_factory=Options)
    bandwidth: int = 0
    name: str = ""
    max_downtime: float = 0.0

    def __post_init__(self) -> None:
        self.uuid = str(self.guest.stable_uuid)
        self.name = self.name or self.guest.name
        self.outgoing: Outgoing = self.source.driver.outgoing(self.uuid)
        self.incoming: Incoming = self.destination.driver.incoming(self.uuid)
        self.tasks: list[asyncio.Task[object]] = []

    async def prepare(self) -> None:
        self.stored = await self.source.driver.stored(self.uuid)
        self.begun: Begun = await self.outgoing.begin(self.options, self.name)
        self.prepared: Prepared = await self.incoming.prepare(
            self.begun.domain_xml, self.begun.cookie, self.options, self.name, self.destination.address, ""
        )

    def arm(self) -> "asyncio.Task[Finished]":
        task = asyncio.create_task(self.incoming.finish(self.begun.domain_xml, b"", self.options, self.name, self.stored))
        self.tasks.append(task)
        return task

    def perform(self) -> "asyncio.Task[Performed]":
        prepared, begun = self.prepared, self.begun
        task = asyncio.create_task(
            self.outgoing.perform(
                prepared.uri, begun.domain_xml, prepared.cookie, self.options, self.name, self.bandwidth, self.max_downtime
            )
        )
        self.tasks.append(task)
        return task

    async def run(self) -> Domain:
        """All of it; the guest as it arrived."""
        await self.prepare()
        armed = self.arm()
        await self.perform()
        finished = await armed
        await self.outgoing.remove(finished.cookie, self.options)
        await self.close()
        return await self.destination.driver.get_domain(self.uuid)

    async def close(self) -> None:
        await self.outgoing.close()
        await self.incoming.close()
        for task in self.tasks:
            task.cancel()
            with suppress(HypervisorError, asyncio.CancelledError):
                await task

    async def flowing(self, at_least: int = 1 << 20) -> None:
        """Wait until so many bytes have been sent."""
        async with asyncio.timeout(10):
            while (reading := await self.outgoing.progress()) is None or reading.processed_bytes < at_least:  # noqa: ASYNC110
                await asyncio.sleep(0.02)


Start = Callable[..., Migration]


async def becomes(question: Callable[[], Awaitable[object]], wanted: object, within: float = 5.0) -> None:
    """Wait until a question about the hosts has this answer."""
    answer = None
    with suppress(TimeoutError):
        async with asyncio.timeout(within):
            while (answer := await question()) != wanted:  # noqa: ASYNC110 - another process is asked
                await asyncio.sleep(0.02)
    assert answer == wanted
