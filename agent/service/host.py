"""The host as its agent reports it."""

import asyncio
import contextlib
import itertools
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from importlib.metadata import version
from typing import Final

import structlog

from agent.handshake.host.engine import Engine
from agent.hypervisor.base import HypervisorError, HypervisorInfo
from agent.hypervisor.features import PROTOCOL_VERSION
from agent.hypervisor.interface import Hypervisor
from agent.hypervisor.wire import features_to_proto
from agent.runtime.events import Bus, HostChanged
from agent.runtime.seldom import Seldom
from drover.agent.v1 import host_pb2 as pb

log = structlog.get_logger()

REFRESH_SECONDS: Final = 5.0
"""Interval of queries for the hypervisor's features; each costs a few local reads."""
SHORTEST_REPEAT_SECONDS: Final = 0.1
"""Shortest interval of a watch's messages when nothing changes."""
MAX_COORDINATORS: Final = 8
"""Coordinators that are reported: those with the oldest watches, so that no newcomer hides them."""


class AgentHost:
    """The description of this host, now and at every change."""

    def __init__(self, info: HypervisorInfo, hypervisor: Hypervisor, engine: Engine, bus: Bus) -> None:
        self.hypervisor = hypervisor
        self.engine = engine
        self._bus = bus
        self._info = info
        self._coordinators: Counter[str] = Counter()
        """Open watches by coordinator, the oldest first."""
        self._warnings = Seldom()
        self._incarnation = str(uuid.uuid4())
        self._version = version("drover")

    @property
    def name(self) -> str:
        return self.engine.host.name

    def describe(self) -> pb.Host:
        local = self.engine.host
        return pb.Host(
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
            incoming_limit=self.engine.slots.limit,
            incoming_in_use=self.engine.incoming_in_use,
            incarnation=self._incarnation,
            draining=local.draining,
            coordinators=self._reported_coordinators,
        )

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

    async def watch(self, coordinator: str = "", repeat_seconds: float = 0.0) -> AsyncGenerator[pb.Host, None]:
        """Yield this host now, after each change, and every `repeat_seconds` without one (unless 0), claimed by `coordinator`."""
        patience = max(repeat_seconds, SHORTEST_REPEAT_SECONDS) if repeat_seconds > 0 else None
        with self._claimed_by(coordinator) if coordinator else contextlib.nullcontext():
            while True:
                changed = self.engine.changed.next
                yield self.describe()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(patience):
                        await changed.wait()

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
