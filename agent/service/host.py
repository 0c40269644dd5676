"""The host as its agent reports it."""

import asyncio
import contextlib
import itertools
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from importlib.metadata import version
from typing import Final

import structlog

from agent.handshake.host.engine import Engine
from agent.hypervisor.base import HypervisorError, HypervisorInfo
from agent.hypervisor.features import PROTOCOL_VERSION
from agent.hypervisor.interface import Hypervisor
from agent.hypervisor.wire import features_to_proto
from agent.network.rules import own_sides
from agent.runtime.bell import first_of
from agent.runtime.events import Bus, HostChanged
from agent.runtime.seldom import Seldom
from agent.runtime.wire import cut
from drover.agent.v1 import host_pb2 as pb

log = structlog.get_logger()

REFRESH_SECONDS: Final = 5.0
"""Interval of queries for the hypervisor's features; each costs a few local reads."""
FIRST_READING_SECONDS: Final = 5.0
"""How long the start waits for the first reading of the interfaces."""
SHORTEST_REPEAT_SECONDS: Final = 0.1
"""Shortest interval of a watch's messages when nothing changes."""
CONFLATED_SECONDS: Final = 0.05
"""Shortest interval of a watch's messages: slots may change thousands of times in a second, and a message costs more than a slot."""
MAX_COORDINATORS: Final = 8
"""Coordinators that are reported: those with the oldest watches, so that no newcomer hides them."""


class AgentHost:
    """The description of this host, now and at every change."""

    def __init__(
        self,
        info: HypervisorInfo,
        hypervisor: Hypervisor,
        engine: Engine,
        bus: Bus,
        networks: Sequence[tuple[pb.Network, str]] = (),
    ) -> None:
        """`networks`: its own ones, each without an address, and the address that is configured, or an empty string."""
        self.hypervisor = hypervisor
        self.engine = engine
        self._bus = bus
        self._info = info
        self._coordinators: Counter[str] = Counter()
        """Open watches by coordinator, the oldest first."""
        self._warnings = Seldom()
        self._incarnation = str(uuid.uuid4())
        self._version = version("drover")
        self._networks = networks
        self._followed = asyncio.Event()

    @property
    def name(self) -> str:
        return self.engine.host.name

    def describe(self) -> pb.Host:
        local = self.engine.host
        host = pb.Host(
            name=local.name,
            host_uuid=self._info.host_uuid,
            driver=self._info.driver,
            hypervisor=self._info.hypervisor,
            library_version=self._info.library_version,
            agent_version=self._version,
            min_protocol_version=PROTOCOL_VERSION,
            max_protocol_version=PROTOCOL_VERSION,
            migration_features=features_to_proto(self._info.features),
            networks=local.networks,
            incarnation=self._incarnation,
            draining=local.draining,
            coordinators=self._reported_coordinators,
            interfaces=local.interfaces,
        )
        self.engine.desk.show(host)
        return host

    @property
    def _reported_coordinators(self) -> list[str]:
        return sorted(itertools.islice(self._coordinators, MAX_COORDINATORS))

    async def keep_current(self) -> None:
        """Query the hypervisor's features for ever: a sysctl may be set, a libvirtd may come back with another QEMU."""
        while True:
            await asyncio.sleep(REFRESH_SECONDS)
            with contextlib.suppress(HypervisorError):  # until it answers, its last answer holds
                info = await self.hypervisor.info()
                if info != self._info:
                    text = f"{info.hypervisor}, library {info.library_version}, host UUID {info.host_uuid}"
                    self._bus.publish(HostChanged(self.name, change="hypervisor", message=text))
                    self._info, self.engine.host.features = info, features_to_proto(info.features)
                    self.engine.changed.ring()

    @property
    def defined_networks(self) -> list[pb.Network]:
        """The networks of its configuration, without addresses."""
        return [network for network, _ in self._networks]

    async def followed(self) -> None:
        """Return once the interfaces were read, at the latest after `FIRST_READING_SECONDS`: then no network has an address yet."""
        await first_of(self._followed, timeout=FIRST_READING_SECONDS)

    async def follow(self, watch: Callable[[], AsyncIterator[tuple[pb.Interface, ...]]]) -> None:
        """Take every reading of the host's interfaces, for ever."""
        local = self.engine.host
        async for interfaces in watch():
            before, local.interfaces = local.networks, interfaces
            local.networks = tuple(side for network, address in self._networks for side in own_sides(network, address, interfaces))
            if local.networks != before or not self._followed.is_set():
                self._tell_networks()
            self._followed.set()
            self.engine.changed.ring()

    def _tell_networks(self) -> None:
        """Publish changes of own networks; log those that cannot be used, also at the start, which is no reason to refuse it."""
        sides = self.engine.host.networks
        states = [f"{n.name} {n.address} {'down' if n.down else 'up'}" for n in sides]
        absent = sorted({network.name for network in self.defined_networks} - {side.name for side in sides})
        text = ", ".join([*states, *(f"{name} without an address" for name in absent)])
        if absent or any(side.down for side in sides):
            log.warning("networks that cannot be used now (see `ip address`)", networks=text)
        if self._followed.is_set():
            self._bus.publish(HostChanged(self.name, change="networks", message=cut(text, 1024)))

    async def watch(self, coordinator: str = "", repeat_seconds: float = 0.0) -> AsyncGenerator[pb.Host, None]:
        """Yield this host now, after each change, and every `repeat_seconds` without one (unless 0), claimed by `coordinator`."""
        patience = max(repeat_seconds, SHORTEST_REPEAT_SECONDS) if repeat_seconds > 0 else None
        with self._claimed_by(coordinator) if coordinator else contextlib.nullcontext():
            while True:
                changed, sent_at = self.engine.changed.next, time.monotonic()
                yield self.describe()
                await first_of(changed, timeout=patience)
                await asyncio.sleep(sent_at + CONFLATED_SECONDS - time.monotonic())

    @contextlib.contextmanager
    def _claimed_by(self, coordinator: str) -> Iterator[None]:
        self._coordinators[coordinator] += 1
        if len(self._coordinators) > 1:
            self._warn()
        self.engine.changed.ring()
        try:
            yield
        finally:
            self._coordinators[coordinator] -= 1
            self._coordinators = +self._coordinators
            self.engine.changed.ring()

    def _warn(self) -> None:
        """Log that several coordinators claim this host; rate-limited, as anybody may claim it."""
        now = time.monotonic()
        if not self._warnings.due(now):
            self._warnings.held_back += 1
            return
        held_back = self._warnings.told(now)
        log.warning("more than one coordinator claims this host", coordinators=self._reported_coordinators, held_back=held_back)
