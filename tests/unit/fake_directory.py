"""A `Directory` of two fake agents, and a place that keeps migrations."""

import asyncio
from collections.abc import Sequence

from agent.handshake.drive.ends import Candidate, Ends, Side
from agent.hypervisor.base import HypervisorInfo
from agent.migration.fencing import FencingConfig
from agent.migration.migrations import Migrations
from agent.migration.placement import rank
from agent.runtime.bell import Bell
from agent.runtime.errors import DroverError, Reason
from agent.service.host import AgentHost
from agent.service.host_service import get_domain
from agent.service.peers import leaving_request
from drover.agent.v1 import host_pb2
from drover.agent.v1 import migration_pb2 as pb
from tests.unit.asking import PATIENCE
from tests.unit.clocks import QUICK
from tests.unit.fake_hypervisor import FEATURES
from tests.unit.two_agents import Agent, Line, Pair


class FakeDirectory:
    """`agent.handshake.drive.ends.Directory`."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.held: asyncio.Event | None = None
        self.fails: list[Exception] = []
        self.guest_fails: DroverError | None = None
        self.asked = 0
        self.changed = Bell()
        self.hosts: dict[str, host_pb2.Host] = {}
        """What `known` returns in place of what the agents describe."""
        self.others: list[pb.Migration] = []

    def known(self, host: str) -> host_pb2.Host | None:
        described = {side.host.name: side.host for side in self._sides()}
        return self.hosts.get(host) or described.get(host)

    def foreign(self) -> list[pb.Migration]:
        return self.others

    async def _wait(self) -> None:
        self.asked += 1
        if self.held is not None:
            await self.held.wait()
        if self.fails:
            raise self.fails.pop(0)

    async def find(self, spec: pb.MigrationSpec) -> Ends:
        await self._wait()
        guest = await get_domain(_host(self.pair.source), leaving_request(spec))
        return Ends(*self._sides(), guest)

    async def ends(self, migration: pb.Migration) -> tuple[Side, Side]:
        await self._wait()
        return self._sides()

    async def guest(self, spec: pb.MigrationSpec) -> host_pb2.GetDomainResponse:
        if self.guest_fails is not None:
            raise self.guest_fails
        return await get_domain(_host(self.pair.source), leaving_request(spec))

    async def source(self, migration: pb.Migration) -> Side:
        return self._sides()[0]

    async def candidates(self, spec: pb.MigrationSpec, others: Sequence[pb.Migration] = ()) -> list[Candidate]:
        source, destination = self._sides()
        guest = await get_domain(_host(self.pair.source), leaving_request(spec))
        return rank(spec, source, guest, {"h2": destination}, others)

    def _sides(self) -> tuple[Side, Side]:
        return (
            _side(self.pair.source, self.pair.to_source, "10.91.0.1:7400"),
            _side(self.pair.destination, self.pair.to_destination, "10.91.0.2:7400"),
        )


def _host(agent: Agent) -> AgentHost:
    return AgentHost(
        HypervisorInfo("sim", "fake 1", "fake 1", f"uuid of {agent.name}", FEATURES),
        agent.hypervisor,
        agent.engine,
        agent.bus,
    )


def _side(agent: Agent, line: Line, address: str) -> Side:
    host: host_pb2.Host = _host(agent).describe()
    return Side(host, line, address)


class FakeLog:
    """`agent.migration.migration.MigrationLog`."""

    def __init__(self) -> None:
        self.rows: dict[str, tuple[bytes, bool]] = {}
        self.fails: list[Exception] = []
        self.remove_fails: list[Exception] = []
        self.lives = 0
        self.held: asyncio.Event | None = None
        self.waiting = asyncio.Event()
        """Set as soon as a write waits for `held`."""

    async def save(self, migration_id: str, body: bytes, *, ended: bool) -> None:
        await asyncio.sleep(0)
        if self.held is not None:
            self.waiting.set()
            await self.held.wait()
        if self.fails:
            raise self.fails.pop(0)
        self.rows[migration_id] = body, ended

    async def remove(self, migration_id: str) -> None:
        await asyncio.sleep(0)
        if self.remove_fails:
            raise self.remove_fails.pop(0)
        self.rows.pop(migration_id, None)

    async def load(self) -> list[bytes]:
        return [body for body, _ in self.rows.values()]

    async def next_life(self, above: int) -> int:
        self.lives = max(above, self.lives) + 1
        return self.lives


class Driving:
    """A process that drives migrations of the pair, and its next lives."""

    def __init__(self, pair: Pair, fencing: FencingConfig | None = None) -> None:
        self.pair = pair
        self.directory = FakeDirectory(pair)
        self.log = FakeLog()
        self._fencing = fencing
        self.migrations = self._new()
        self._all = [self.migrations]

    def _new(self) -> Migrations:
        return Migrations("h1", self.directory, self.log, self.pair.source.bus, self._fencing, QUICK)

    async def restart(self) -> None:
        await self.migrations.close()
        self.migrations = self._new()
        self._all.append(self.migrations)
        await self.migrations.recover()

    async def close(self) -> None:
        for migrations in self._all:
            await migrations.close()

    async def ended(self, migration_id: str, within: float = PATIENCE) -> pb.Migration:
        """The last word of a watch."""
        last = self.migrations.collection.get(migration_id).migration
        async with asyncio.timeout(within):
            async for migration in self.migrations.collection.watch(migration_id, 0):
                last = migration
        return last

    async def reaches(self, migration_id: str, state: pb.MigrationState.ValueType, within: float = PATIENCE) -> pb.Migration:
        async with asyncio.timeout(within):
            async for migration in self.migrations.collection.watch(migration_id, 0):
                if migration.state == state:
                    return migration
        raise AssertionError(f"it ended as {self.migrations.collection.get(migration_id).migration}")


JOURNAL_DOWN = DroverError(Reason.JOURNAL_UNAVAILABLE, "the disk is full")
