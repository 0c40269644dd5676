"""Agents that are real gRPC servers on unix sockets, for the coordinator's registry of hosts."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from agent.runtime.errors import DroverError, Reason
from agent.runtime.events import Bus
from agent.service.server import Server, start_server
from coordinator.hosts.host_table import PREFIX
from coordinator.hosts.hosts import HostRegistry
from coordinator.store import Changes, MemoryStore, SqliteStore
from drover.agent.v1 import host_pb2 as agent_pb
from drover.agent.v1 import host_pb2_grpc as agent_rpc
from drover.coordinator.v1 import host_pb2 as pb
from tests.unit.clocks import QuickClock

UP, UNREACHABLE = pb.HOST_STATE_UP, pb.HOST_STATE_UNREACHABLE
AGENT_SERVICE = agent_pb.DESCRIPTOR.services_by_name["HostService"].full_name


class Clock(QuickClock):
    """A clock that the test moves (`now`); sleeps are short, or never end (`stopped`)."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.stopped = False

    def monotonic(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        if self.stopped:
            await asyncio.Event().wait()
        await super().sleep(seconds)


class Active:
    """A fake of the part of `Migrations` that the service uses."""

    def __init__(self, active: dict[str, list[str]]) -> None:
        self._active = active

    def active_at(self, host: str) -> list[str]:
        return self._active.get(host, [])


class FakeAgent(agent_rpc.HostServiceServicer):
    """An agent whose host can be changed, and that can hang."""

    def __init__(self, directory: Path, name: str, uuid: str = "") -> None:
        self.host = agent_pb.Host(name=name, host_uuid=uuid or f"uuid-{name}", incarnation="1", incoming_limit=2)
        self.domains = [agent_pb.Domain(name=f"vm-{name}", uuid=f"u-{name}", state=agent_pb.DOMAIN_STATE_RUNNING)]
        self.address = f"unix:{directory}/{name}.sock"
        self.older = False
        """It behaves as an older version, without repeated reports and send times."""
        self.hangs = False
        self.watches = 0
        self.watches_ever = 0
        self.words = 0
        self.updates: list[agent_pb.UpdateHostRequest | agent_pb.UpdateDomainRequest] = []
        self.clock: Callable[[], float] | None = None
        self.all_left = asyncio.Event()
        self._changed = asyncio.Event()
        self._server: Server | None = None

    async def start(self) -> None:
        self._server = await start_server(
            [self.address], lambda server: agent_rpc.add_HostServiceServicer_to_server(self, server), [AGENT_SERVICE], Bus()
        )

    async def stop(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            await server.stop(0)

    def change(self, **fields: Any) -> None:
        for name, value in fields.items():
            setattr(self.host, name, value)
        self._changed.set()
        self._changed = asyncio.Event()

    async def WatchHost(self, request: Any, context: Any) -> AsyncIterator[agent_pb.WatchHostResponse]:  # noqa: N802
        self.watches += 1
        self.watches_ever += 1
        try:
            while self.hangs:
                await self._changed.wait()
            while True:
                changed = self._changed
                response = agent_pb.WatchHostResponse(host=self.host)
                if not self.older:
                    response.send_time.FromNanoseconds(int((self.clock or time.time)() * 1e9))
                yield response
                self.words += 1
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(None if self.older else request.repeat_interval.ToNanoseconds() / 1e9 or None):
                        await changed.wait()
                while self.hangs:
                    await self._changed.wait()
        finally:
            self.watches -= 1
            if not self.watches:
                self.all_left.set()

    async def GetHost(self, request: Any, context: Any) -> agent_pb.GetHostResponse:  # noqa: N802
        return agent_pb.GetHostResponse(host=self.host)

    async def GetDomain(self, request: agent_pb.GetDomainRequest, context: Any) -> agent_pb.GetDomainResponse:  # noqa: N802
        await self._hang()
        for domain in self.domains:
            if request.domain in (domain.name, domain.uuid):
                return agent_pb.GetDomainResponse(domain=domain)
        raise DroverError(Reason.DOMAIN_NOT_FOUND, "no such guest", metadata={"domain": request.domain})

    async def UpdateHost(self, request: agent_pb.UpdateHostRequest, context: Any) -> agent_pb.UpdateHostResponse:  # noqa: N802
        await self._hang()
        self.updates.append(request)
        after = agent_pb.Host()
        after.CopyFrom(self.host)
        after.settings.MergeFrom(request.settings)
        after.settings_change.CopyFrom(request.change)
        return agent_pb.UpdateHostResponse(host=after)

    async def UpdateDomain(self, request: agent_pb.UpdateDomainRequest, context: Any) -> agent_pb.UpdateDomainResponse:  # noqa: N802
        self.updates.append(request)
        after = agent_pb.Domain(name=request.domain, settings=request.settings)
        return agent_pb.UpdateDomainResponse(domain=after)

    async def ListDomains(self, request: Any, context: Any) -> agent_pb.ListDomainsResponse:  # noqa: N802
        await self._hang()
        return agent_pb.ListDomainsResponse(domains=self.domains)

    async def _hang(self) -> None:
        while self.hangs:
            await self._changed.wait()


async def until(store: MemoryStore | SqliteStore, name: str, true: Callable[[pb.ClusterHost], bool]) -> pb.ClusterHost:
    """Wait until `true` holds for the store's entry of the host."""
    watch = store.watch(PREFIX + name)
    async with asyncio.timeout(10):
        item = await store.get(PREFIX + name)
        while True:
            known = pb.ClusterHost.FromString(item.value) if item is not None else pb.ClusterHost()
            if true(known):
                return known
            changes: Changes = await anext(watch)
            item = changes.events[-1].now


async def register(registry: HostRegistry, agent: FakeAgent) -> None:
    await registry.register(agent.host, agent.address)


async def names(registry: HostRegistry) -> dict[str, int]:
    return {known.host.name: known.state for known in await registry.list_hosts()}
