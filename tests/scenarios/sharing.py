"""Bandwidth is shared out among transfers while they run: over a line of 400 Mbit/s (mig1), and under a cap (mig2)."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from agent.runtime.bell import Bell
from agent.runtime.errors import DroverError, Reason
from drover.agent.v1 import handshake_pb2
from drover.agent.v1 import migration_pb2 as pb
from tests.kit.cluster import Cluster, GuestSpec
from tests.kit.cluster.platforms import LabCluster
from tests.kit.lab import Lab
from tests.scenarios.conversation import FINAL, MIB, Talk, duration, new_id, state
from tests.scenarios.migrating import busy

RATE = 50_000_000
"""Bytes per second of each host's line on mig1."""
CAP = 30 * MIB
"""Bytes per second of all migrations on mig2."""
SETTINGS = {
    "agent": {"incoming_limit": 10, "outgoing_limit": 10, "takeover_after_seconds": 3},
    "networks": {"mig1": {"line_bytes_per_second": RATE}, "mig2": {"cap_bytes_per_second": CAP}},
}


GUESTS = [GuestSpec(name, memory_mib=768, dirty=200, ticks=20) for name in "abcd"]
"""The first pass over such a memory takes longer than a test."""


def start_guests(cluster: Cluster) -> None:
    for guest in GUESTS:
        cluster.start_guest(guest.name, "h2" if guest.name == "d" else "h1")


class Transfers:
    """The transfers that a test has started, and every reading of them."""

    def __init__(self, cluster: Cluster, talk: Talk) -> None:
        self.talk = talk
        self._cluster = cluster
        self.readings: dict[str, list[tuple[float, pb.Migration]]] = {}
        """By guest: when each state arrived here, and the state."""
        self.ids: dict[str, str] = {}
        self._news = Bell()

    async def start(self, guest: str, source: str = "h1", to: str = "h2", network: str = "mig1", **spec: Any) -> None:
        """Start a migration that does not end by itself, and wait until its memory flows."""
        assert self._cluster.running_on(guest) == [source], "no earlier transfer has ended by itself"
        migration_id = self.ids[guest] = new_id()
        self.readings[guest] = []
        spec |= {"source_host": source, "network": network, "max_downtime": duration(0.001)}
        await self.talk.start(guest, to, migration_id, **spec)
        await self.until(lambda: any(migration.progress.processed_bytes for _, migration in self.readings[guest]))

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not holds():
                await self._news.next.wait()

    async def follow(self) -> None:
        with contextlib.suppress(DroverError):  # the server was killed
            async for change in self.talk.changes(0):
                for guest, migration_id in self.ids.items():
                    if change.migration.migration_id == migration_id:
                        self.readings[guest].append((time.monotonic(), change.migration))
                        self._news.ring()

    async def end(self, *guests: str) -> None:
        """Cancel migrations, and wait for their ends."""
        for guest in guests or tuple(self.ids):
            migration_id = self.ids.pop(guest)
            await self.talk.cancel(migration_id)
            assert state(await self.talk.end(migration_id)) == "cancelled"

    def first_flow(self, guest: str) -> float:
        return next(at for at, migration in self.readings[guest] if migration.progress.processed_bytes)

    def rate(self, guest: str, since: float, until: float) -> float:
        """Return the bytes per second that the hypervisor sent between two moments."""
        return (self.sent(guest, until) - self.sent(guest, since)) / (until - since)

    async def flow(self, seconds: float, within: float = 0.1, **rates: float) -> None:
        """Check rates (bytes per second) over that many seconds from now on. Where other work on this machine slows the hypervisors
        down, again, at most twice."""
        for _ in range(3):
            begin = time.monotonic() + 0.1
            await asyncio.sleep(seconds + 0.7)
            got = {guest: self.rate(guest, begin, begin + seconds) for guest in rates}
            if got == pytest.approx(rates, rel=within):
                return
        raise AssertionError(f"{got} flowed in place of {rates}")

    def sent(self, guest: str, at: float) -> float:
        """Return the bytes that the hypervisor had sent at a moment. Its own clock tells when each reading was taken: the one that
        arrived fastest shows the difference to the clock here."""
        flows = [(when, m.progress) for when, m in self.readings[guest] if m.progress.processed_bytes and m.state not in FINAL]
        if not flows:
            return 0.0
        begin = min(when - reading.elapsed.ToNanoseconds() / 1e9 for when, reading in flows)
        known = {0.0: 0} | {reading.elapsed.ToNanoseconds() / 1e9: reading.processed_bytes for _, reading in flows}
        before = max((e for e in known if e <= at - begin), default=0.0)
        after = min((e for e in known if e >= at - begin), default=max(known))
        part = (at - begin - before) / (after - before) if after > before else 0.0
        return known[before] + part * (known[after] - known[before])

    async def allotted(self, **shares: int) -> None:
        """Wait until the sources have applied these shares, in MiB/s (0: no limit)."""
        await self.until(lambda: all(self.applied(guest) == (share * MIB, share * MIB) for guest, share in shares.items()))

    def applied(self, guest: str) -> tuple[int, int]:
        """Return its share, and the limit that its source has applied."""
        if not self.readings[guest]:
            return -1, -1
        migration = self.readings[guest][-1][1]
        return migration.allotted_bytes_per_second, migration.applied_bandwidth_bytes_per_second


@asynccontextmanager
async def transfers(cluster: Cluster, server: str = "") -> AsyncIterator[Transfers]:
    async with Talk(server or cluster.server) as talk:
        made = Transfers(cluster, talk)
        following = asyncio.create_task(made.follow())
        try:
            yield made
        finally:
            following.cancel()
            for migration in (await talk.list(active_only=True)).migrations:
                await talk.cancel(migration.migration_id)
                await talk.end(migration.migration_id)


async def test_8_6_one_migration_gets_the_line_and_a_second_one_halves_it(line: Cluster) -> None:
    await shares_a_line(line, line.server)


async def test_8_6_peer_to_peer_an_agent_shares_out_its_own_line(line: Cluster) -> None:
    await shares_a_line(line, line.agents["h1"].address)


async def shares_a_line(line: Cluster, server: str) -> None:
    async with transfers(line, server) as moving:
        await moving.start("a")
        assert moving.applied("a") == (0, 0), "no limit"
        await moving.flow(2, within=0.06, a=0.96 * RATE)
        await moving.start("b")
        flows = moving.first_flow("b")
        await moving.allotted(a=22, b=22)
        assert time.monotonic() - flows <= 1 * busy()
        await moving.flow(2, a=22 * MIB, b=22 * MIB)
        await moving.end("b")
        ended = time.monotonic()
        await moving.allotted(a=0)
        assert time.monotonic() - ended <= 1 * busy()
        await moving.flow(2, within=0.06, a=0.96 * RATE)


async def test_8_6_without_a_coordinator_the_source_shares_out_its_line(line: Cluster) -> None:
    async with transfers(line) as moving:
        await moving.start("a")
        await moving.start("b", bandwidth_bytes_per_second=40 * MIB)
        await moving.allotted(a=22, b=22)
        line.coordinator.kill()
        try:
            async with transfers(line, line.agents["h1"].address) as taken_over:
                taken_over.readings |= {guest: [] for guest in moving.ids}
                taken_over.ids |= moving.ids
                await taken_over.allotted(a=22, b=22)
                await taken_over.end("a")
                await taken_over.allotted(b=40)
                await taken_over.end("b")
        finally:
            line.coordinator.start()
            line.wait_known()


async def test_8_6_three_with_a_minimum_and_a_maximum_flow_as_the_allocator_says(line: Cluster) -> None:
    async with transfers(line) as moving:
        await moving.start("a")
        await moving.start("b")
        await moving.start("c", min_bandwidth_bytes_per_second=25_000_000, bandwidth_bytes_per_second=37_500_000)
        await moving.allotted(a=10, b=10, c=24)
        await moving.flow(3, a=10 * MIB, b=10 * MIB, c=24 * MIB)
        await moving.end("a", "b")
        await moving.allotted(c=35)
        await moving.flow(3, c=35 * MIB)


async def test_8_6_the_sum_stays_below_the_cap_of_the_network(line: Cluster) -> None:
    async with transfers(line) as moving, measured(line, moving, "mig2") as wire:

        async def sums() -> list[float]:
            """Return rates over two seconds each, from a second after now on: QEMU sends a tenth more once it is sped up."""
            await asyncio.sleep(4.5)
            now = time.monotonic() - 0.5
            return [wire(now - 3 + quarter / 4, now - 1 + quarter / 4) for quarter in range(5)]

        for _ in range(4):  # again where other work on this machine stops the hypervisors for a moment: TCP catches up then
            await moving.start("a", network="mig2")
            await moving.allotted(a=30)
            measured_sums = await sums()
            begin = time.monotonic()
            await moving.start("b", network="mig2")
            await moving.start("d", "h2", "h1", network="mig2", importance=pb.IMPORTANCE_HIGH)
            await moving.allotted(a=7, b=7, d=15)
            measured_sums += await sums()
            await moving.end("d")
            await moving.allotted(a=15, b=15)
            measured_sums += await sums()
            changes = [wire(begin + at / 4, begin + at / 4 + 1) for at in range(int((time.monotonic() - begin - 1.5) * 4))]
            await moving.end("b")
            await moving.allotted(a=30)
            await moving.end("a")
            if 0.9 * CAP <= max(measured_sums) <= 1.05 * CAP and max(changes) <= 1.1 * CAP:
                return
        raise AssertionError([[round(each / MIB, 1) for each in rates] for rates in (measured_sums, changes)])


async def test_8_6_a_minimum_that_does_not_fit_is_refused_before_the_guest_is_touched(line: Cluster) -> None:
    async with transfers(line) as moving:
        await moving.start("a", min_bandwidth_bytes_per_second=30_000_000)
        migration_id = new_id()
        with pytest.raises(DroverError) as refused:
            await moving.talk.start("b", "h2", migration_id, network="mig1", min_bandwidth_bytes_per_second=25_000_000)
        assert refused.value.reason is Reason.BANDWIDTH_INSUFFICIENT
        assert refused.value.metadata["guaranteed"] == str(29 * MIB)
        for host in ("h1", "h2"):
            async with Talk(line.agents[host].address) as agent:
                request = handshake_pb2.GetRecordRequest(ref=handshake_pb2.AttemptRef(migration_id=migration_id))
                with pytest.raises(DroverError) as unknown:
                    await agent.handshake.get_record(request)
            assert unknown.value.reason is Reason.RECORD_NOT_FOUND
        assert line.copies("b") == {"h1": "running"}
        assert [m.domain_name for m in (await moving.talk.list(active_only=True)).migrations] == ["a"]


@asynccontextmanager
async def measured(line: Cluster, moving: Transfers, network: str) -> AsyncIterator[Callable[[float, float], float]]:
    """Yield a function that returns the bytes per second that all hosts have sent between two moments of the block: on the wire of
    the network; of simulated hosts, whose networks carry no memory, by their own account."""
    readings: list[tuple[float, int]] = []

    async def read(lab: Lab) -> None:
        while True:
            asked, sent = time.monotonic(), sum(host.counters(network).sent for host in lab.hosts)
            if time.monotonic() - asked <= 0.02:  # else other work came between: the moment of the bytes is not known
                readings.append((asked, sent))
            await asyncio.sleep(0.03)

    def rate(since: float, until: float) -> float:
        if not readings:
            return sum(moving.rate(guest, since, until) for guest in moving.readings)
        within = [reading for reading in readings if since <= reading[0] <= until]
        return (within[-1][1] - within[0][1]) / (within[-1][0] - within[0][0])

    reading = asyncio.create_task(read(line.lab)) if isinstance(line, LabCluster) else None
    try:
        yield rate
    finally:
        if reading is not None:
            reading.cancel()
