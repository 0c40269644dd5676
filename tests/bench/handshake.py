"""`scripts/bench handshake`: Drover and virsh move the same guest between the same hosts, in turns, timed in the same way.

Each round runs every contender once, in a random order (with a fixed seed), so that a period of load on the machine affects all of
them, and no contender always follows the same other one. The guest goes back and forth between two equal hosts.
"""

import asyncio
import os
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from coordinator.client import Client, Migration, Options
from tests.bench.output import say
from tests.bench.stats import Series
from tests.bench.virsh import Virsh, migrate_words
from tests.kit.cluster import ClusterGuest, GuestSpec, cluster
from tests.kit.cluster.platforms import LabCluster
from tests.kit.lab.processes import run as run_program

MANAGED, PEER, COMMAND = "drover, managed", "drover, peer to peer", "drover command"
P2P, DIRECT, P2P_COMMAND, DIRECT_COMMAND = "virsh p2p", "virsh direct", "virsh p2p command", "virsh direct command"

BASELINES = (P2P, P2P_COMMAND)
"""`virsh migrate --live --p2p`; Drover is compared with the faster of the two."""

GUEST = "bench"
SETTLE_SECONDS = 0.15
"""Pause between two migrations, so that one contender's clean-up does not slow the next one."""

OVERHEAD_BAR_MS = 25.0


@dataclass(frozen=True)
class Setting:
    """The parameters of the measurement, the same for all contenders."""

    rounds: int
    memory_mib: int
    mem_mib: int
    """Memory that is filled. Small, so that QEMU stops the guest for the duration of a switch-over and not for its downtime
    limit of 300 ms, into which most of a small full guest fits."""
    dirty: int
    """Pages per second."""
    ticks: int
    """Lines per second of the guest's log: the resolution of a blackout, which includes one tick."""
    post_copy: bool
    commands: bool
    """Also time each contender as a command, with its start."""
    lab_id: str
    log_level: str = "info"


@dataclass(frozen=True)
class Run:
    """One migration. Times in ms."""

    contender: str
    round: int
    source: str
    began: float
    """`time.monotonic()`, in seconds."""
    ended: float
    migration: Migration | None = None
    """The migration as Drover reports it; None for virsh."""

    @property
    def total(self) -> float:
        return (self.ended - self.began) * 1e3

    @property
    def overhead(self) -> float | None:
        """Time outside hypervisor calls in ms, by Drover's own measurement."""
        return self.migration.overhead * 1e3 if self.migration is not None else None

    @property
    def until_it_runs(self) -> float | None:
        """Time in ms from the request until the guest is known to run at the destination."""
        if self.migration is None or self.migration.committed is None or self.migration.created is None:
            return None
        return (self.migration.committed - self.migration.created).total_seconds() * 1e3


@dataclass
class Result:
    """The results of all rounds."""

    setting: Setting
    runs: list[Run] = field(default_factory=list)
    blackouts: dict[str, Series] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    """Problems that the guest's log proves."""
    load: tuple[float, float] = (0.0, 0.0)
    """The machine's load average over a minute, before and after."""

    def of(self, contender: str) -> list[Run]:
        return [run for run in self.runs if run.contender == contender]

    @property
    def contenders(self) -> list[str]:
        return list(dict.fromkeys(sorted((run.contender for run in self.runs), key=ORDER.index)))

    def totals(self, contender: str) -> Series:
        return Series.of([run.total for run in self.of(contender)])

    def overheads(self, contender: str) -> Series:
        return Series.of([run.overhead for run in self.of(contender)])

    @property
    def baseline(self) -> str:
        """The stricter of the two ways to time `virsh migrate --live --p2p`."""
        return min((name for name in BASELINES if self.totals(name)), key=lambda name: self.totals(name).p50)


ORDER = (MANAGED, PEER, P2P, DIRECT, COMMAND, P2P_COMMAND, DIRECT_COMMAND)

Mover = Callable[[str, str], Awaitable[Migration | None]]
"""Moves the guest from one host to another."""


async def measure(setting: Setting) -> Result:
    """Bring a cluster up, move the guest in rounds, and judge its log."""
    spec = GuestSpec(
        GUEST, memory_mib=setting.memory_mib, mem_mib=setting.mem_mib, dirty=setting.dirty, ticks=setting.ticks, persistent=True
    )
    settings = {"agent": {"log_level": setting.log_level}, "coordinator": {"log_level": setting.log_level}}
    result = Result(setting)
    lab = {"setting": "root"} if setting.post_copy else {}  # an unprivileged QEMU may not use post-copy
    with cluster("libvirt", [spec], lab_id=setting.lab_id, settings=settings, lab=lab) as made:
        assert isinstance(made, LabCluster)
        guest = made.start_guest(GUEST)
        async with AsyncExitStack() as stack:
            movers = await _movers(made, setting, stack)
            await _warm_up(movers, guest)
            before = os.getloadavg()[0]
            async for run in _rounds(movers, guest, setting.rounds):
                result.runs.append(run)
                say(f"{len(result.runs):3d}  {run.contender:22s} {run.source} → {_other(run.source)}  {run.total:7.1f} ms")
            result.load = before, os.getloadavg()[0]
        guest.wait_lines(setting.ticks // 2)
        _judge(result, guest)
    return result


async def _movers(made: LabCluster, setting: Setting, stack: AsyncExitStack) -> Mapping[str, Mover]:
    options: Options = {"post_copy": setting.post_copy}
    clients = {name: await stack.enter_async_context(Client(agent.address)) for name, agent in made.agents.items()}
    managing = await stack.enter_async_context(Client(made.server))
    shells = {host.name: stack.enter_context(Virsh(host)) for host in made.lab.hosts}
    option = f"post_copy={'on' if setting.post_copy else 'off'}"

    async def managed(source: str, target: str) -> Migration:
        return await managing.migrate(GUEST, target, options=options)

    async def peer(source: str, target: str) -> Migration:
        return await clients[source].migrate(GUEST, target, options=options)

    async def drover(source: str, target: str) -> None:
        run_program(made.drover("migrate", GUEST, "--to", target, "--option", option))

    def words(target: str, *, p2p: bool) -> list[str]:
        return migrate_words(GUEST, made.lab[target], p2p=p2p, post_copy=setting.post_copy)

    def fed(*, p2p: bool) -> Mover:
        async def move(source: str, target: str) -> None:
            shells[source].run(words(target, p2p=p2p))

        return move

    def command(*, p2p: bool) -> Mover:
        async def move(source: str, target: str) -> None:
            made.lab[source].virsh(*words(target, p2p=p2p))

        return move

    movers: dict[str, Mover] = {MANAGED: managed, PEER: peer, P2P: fed(p2p=True), DIRECT: fed(p2p=False)}
    if setting.commands:
        movers |= {COMMAND: drover, P2P_COMMAND: command(p2p=True), DIRECT_COMMAND: command(p2p=False)}
    return movers


async def _warm_up(movers: Mapping[str, Mover], guest: ClusterGuest) -> None:
    """Move the guest there and back once by each way, not counted, so that connections are open and files cached."""
    for name in (MANAGED, P2P):
        for source in ("h1", "h2"):
            await movers[name](source, _other(source))
            await _settle(guest)
    for source in ("h1", "h2"):
        await movers[PEER](source, _other(source))
        await _settle(guest)


async def _rounds(movers: Mapping[str, Mover], guest: ClusterGuest, rounds: int) -> AsyncIterator[Run]:
    source = "h1"
    for number, order in enumerate(_orders(list(movers), rounds), start=1):
        for contender in order:
            target = _other(source)
            began = time.monotonic()
            migration = await movers[contender](source, target)
            ended = time.monotonic()
            yield Run(contender, number, source, began, ended, migration)
            await _settle(guest)
            source = target


def _orders(contenders: Sequence[str], rounds: int) -> Iterator[list[str]]:
    draw = random.Random(20)
    for _ in range(rounds):
        yield draw.sample(list(contenders), len(contenders))


async def _settle(guest: ClusterGuest) -> None:
    """Wait until the guest runs and the last contender has cleaned up."""
    guest.wait_lines(5)
    await asyncio.sleep(SETTLE_SECONDS)


def _other(host: str) -> str:
    return {"h1": "h2", "h2": "h1"}[host]


def _judge(result: Result, guest: ClusterGuest) -> None:
    verdict = guest.judge()
    result.problems = verdict.problems()
    for contender in result.contenders:
        gaps = [verdict.blackout_between(run.began, run.ended) for run in result.of(contender)]
        result.blackouts[contender] = Series.of(gaps)
