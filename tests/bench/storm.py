"""`scripts/bench storm`: many guests leave for one host at once, under Drover and under the rules of its peers.

All rules use the same agents, coordinator and simulated hosts, whose links are shared by what leaves them and by what reaches them.
Drover gets all migrations at once and queues them. For a peer's rule the agents' limits are out of the way, and the bench itself
starts each migration as soon as the rule allows it: a peer's own polling and controllers cost it nothing here, only the retries that
its rule is made of (vdsm).
"""

import asyncio
import contextlib
import os
import random
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final

import grpc.aio

from agent.runtime.wire import duration
from agent.service.channel import open_channel
from drover.agent.v1 import migration_pb2 as pb
from drover.agent.v1 import migration_pb2_grpc as rpc
from tests.bench.output import say
from tests.bench.processes import read_process
from tests.bench.stats import most_at_once
from tests.bench.storm_rules import Order, Rule, rules, start_by_rule
from tests.kit.cluster import Cluster, GuestSpec, cluster

MIB: Final = 1 << 20
PAGE: Final = 4096
DROVER: Final = "drover"
TICK_MS: Final = 10.0
"""Between two lines of a guest's log: the resolution of a blackout."""
NO_LIMIT: Final = 1000
PATIENCE_SECONDS: Final = 600.0


@dataclass(frozen=True)
class Setting:
    """The parameters of a storm, the same for all rules."""

    guests: int
    sources: int
    limit: int
    """Of transfers at once that the destination grants under Drover."""
    seconds: float
    """How long the destination's link needs for all guests' memory."""
    link_mib: int
    """Speed of each host's link, in each direction, in MiB/s."""
    dirty_share: float
    """Share of the link that a guest writes to its memory."""
    retry: float
    """Seconds between two tries of vdsm."""

    @property
    def destination(self) -> str:
        return f"h{self.sources + 1}"

    @property
    def orders(self) -> list[Order]:
        """The guests: sizes within a half of their mean, the three importances in turn, so that every source has all of them."""
        draw = random.Random(40)
        weights = [draw.uniform(0.5, 1.5) for _ in range(self.guests)]
        total = self.link_mib * self.seconds
        return [
            Order(
                name=f"g{number}",
                source=f"h{number % self.sources + 1}",
                importance=(pb.IMPORTANCE_LOW, pb.IMPORTANCE_MEDIUM, pb.IMPORTANCE_HIGH)[number % 3],
                memory_mib=max(4, round(weight / sum(weights) * total)),
            )
            for number, weight in enumerate(weights)
        ]

    @property
    def bound(self) -> float:
        """Least time in seconds: each guest's memory crosses the destination's link once."""
        return sum(order.memory_mib for order in self.orders) / self.link_mib


@dataclass
class Outcome:
    """A storm under one rule."""

    rule: str
    makespan: float = 0.0
    """Seconds from the requests to the end of the last migration."""
    waits: dict[str, list[float]] = field(default_factory=dict)
    """By importance: seconds from the request to the start of the transfer."""
    blackouts: list[float] = field(default_factory=list)
    """Longest gap of each guest's log, in ms."""
    sent: int = 0
    """Bytes that crossed the link, dirtied memory that was sent again included."""
    most_at_once: int = 0
    """Most transfers at once."""
    cpu_seconds: float = 0.0
    """Of all daemons."""
    problems: list[str] = field(default_factory=list)

    @property
    def wait(self) -> float:
        return statistics.median([wait for waits in self.waits.values() for wait in waits])

    @property
    def worst_blackout(self) -> float:
        return max(self.blackouts)

    def wait_of(self, importance: str) -> float:
        return statistics.median(self.waits[importance])


@dataclass
class Result:
    setting: Setting
    outcomes: list[Outcome] = field(default_factory=list)
    load: tuple[float, float] = (0.0, 0.0)
    """The machine's load average over a minute, before and after."""

    def of(self, rule: str) -> Outcome | None:
        return next((outcome for outcome in self.outcomes if outcome.rule == rule), None)

    @property
    def peers(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.rule != DROVER]

    @property
    def problems(self) -> list[str]:
        return [f"{outcome.rule}: {problem}" for outcome in self.outcomes for problem in outcome.problems]


def measure(setting: Setting, only: Sequence[str] = ()) -> Result:
    """Run the storm under each rule, one after the other, each in a new cluster. `only`: the names of rules to run; empty: all."""
    result = Result(setting)
    before = os.getloadavg()[0]
    for rule in (None, *rules(setting.retry)):
        name = rule.name if rule else DROVER
        if only and name not in only:
            continue
        outcome = _storm(setting, name, rule)
        result.outcomes.append(outcome)
        say(f"{name:10s} {outcome.makespan:6.1f} s, {outcome.makespan / setting.bound:.3f} of the wire's bound")
    result.load = before, os.getloadavg()[0]
    return result


def _storm(setting: Setting, name: str, rule: Rule | None) -> Outcome:
    orders = setting.orders
    pages = round(setting.link_mib * MIB * setting.dirty_share / PAGE)
    specs = [GuestSpec(order.name, memory_mib=order.memory_mib, dirty=pages) for order in orders]
    limits = dict.fromkeys(("incoming_limit", "outgoing_limit"), NO_LIMIT if rule else setting.limit)
    rate = setting.link_mib * MIB
    settings = {"agent": limits, "sim": {"link_rate": rate, "incoming_link_rate": rate, "ports": [49152, 49152 + NO_LIMIT]}}
    outcome = Outcome(name)
    with cluster("sim", specs, hosts=setting.sources + 1, lab_id="storm", settings=settings) as made:
        with ThreadPoolExecutor(max_workers=8) as pool:  # each start waits for the guest's first lines
            list(pool.map(lambda order: made.start_guest(order.name, order.source), orders))
        cpu = _cpu_seconds(made)
        asyncio.run(_run(made, setting, rule, outcome))
        outcome.cpu_seconds = _cpu_seconds(made) - cpu
        for order in orders:
            guest = made.guests[order.name]
            guest.wait_lines(2)
            verdict = guest.judge()
            outcome.problems += [f"{order.name}: {problem}" for problem in verdict.problems()]
            outcome.blackouts.append(verdict.blackout_ms or 0.0)
    return outcome


def _cpu_seconds(made: Cluster) -> float:
    return sum(read_process(daemon.running().pid).cpu_seconds for daemon in made.daemons())


# ---- one storm


async def _run(made: Cluster, setting: Setting, rule: Rule | None, outcome: Outcome) -> None:
    async with contextlib.AsyncExitStack() as stack:
        channel = await stack.enter_async_context(open_channel(made.server))
        watching = Watching(rpc.MigrationServiceStub(channel), setting.destination)
        stack.push_async_callback(watching.stop)
        await watching.start()
        began = time.time()
        async with asyncio.timeout(PATIENCE_SECONDS):
            if rule is None:
                await asyncio.gather(*(watching.move(order, wait=PATIENCE_SECONDS) for order in setting.orders))
            else:
                await start_by_rule(rule, setting.orders, watching.move)
        ends = list(watching.ended.values())
    outcome.makespan = max(_seconds(end.end_time) for end in ends) - began
    transfers = []
    for end in ends:
        if end.state != pb.MIGRATION_STATE_SUCCEEDED:
            outcome.problems.append(f"{end.domain_name}: {pb.MigrationState.Name(end.state)} {end.failure.message}")
            continue
        perform = next(timing for timing in end.timings if timing.phase == "perform")
        start = _seconds(perform.start_time)
        transfers.append((start, start + perform.duration.ToNanoseconds() / 1e9))
        importance = pb.Importance.Name(end.spec.importance).removeprefix("IMPORTANCE_").lower()
        outcome.waits.setdefault(importance, []).append(start - began)
        outcome.sent += end.progress.processed_bytes
    outcome.most_at_once = most_at_once(transfers)


def _seconds(stamp: Any) -> float:
    return float(stamp.ToNanoseconds() / 1e9)


class Watching:
    """Starts migrations at the coordinator, and learns their ends by one watch."""

    def __init__(self, stub: rpc.MigrationServiceStub, destination: str) -> None:
        self._stub: Any = stub
        self._destination = destination
        self._ends: dict[str, asyncio.Future[pb.Migration]] = {}
        self._task: asyncio.Task[None] | None = None
        self.ended: dict[str, pb.Migration] = {}

    async def start(self) -> None:
        """Begin to watch."""
        call = self._stub.WatchMigrations(pb.WatchMigrationsRequest())
        await call.read()
        self._task = asyncio.create_task(self._watch(call))

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _watch(self, call: Any) -> None:
        try:
            while (change := await call.read()) is not grpc.aio.EOF:
                end = self._ends.get(change.migration.migration_id)
                if end is not None and change.migration.HasField("end_time") and not end.done():
                    end.set_result(change.migration)
        finally:
            call.cancel()

    async def move(self, order: Order, wait: float = 0.0) -> None:
        """Migrate one guest to its end. `wait`: how long it may wait for its slots."""
        spec = pb.MigrationSpec(domain=order.name, destination_host=self._destination, importance=order.importance)
        request = pb.StartMigrationRequest(migration_id=order.id, spec=spec)
        if wait:
            request.slot_wait.CopyFrom(duration(wait))
        end = self._ends[order.id] = asyncio.get_running_loop().create_future()
        await self._stub.StartMigration(request, timeout=PATIENCE_SECONDS)
        self.ended[order.id] = await end
