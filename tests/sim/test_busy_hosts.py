"""Issue 8, points 1 and 2: what a migration to a busy host does in each wait mode, and what changed limits do to those that wait."""

import asyncio
import contextlib
import statistics
import subprocess
import time
from collections.abc import AsyncIterator, Iterator

import pytest

from agent.runtime.errors import DroverError, Reason
from drover.agent.v1 import host_pb2
from drover.agent.v1 import migration_pb2 as pb
from tests.kit.cluster import Cluster, GuestSpec, cluster
from tests.scenarios.conversation import CRAWL, Talk, duration, new_id, state
from tests.scenarios.storming import Leg, Storm, set_limits

pytestmark = pytest.mark.timeout(90)

TARGET = "h2"
TRIES = 20


@pytest.fixture(scope="module", name="made")
def _made() -> Iterator[Cluster]:
    names = [f"{letter}{number}" for letter in "abcdef" for number in range(1, 5)]
    specs = [GuestSpec(name, memory_mib=24, dirty=5) for name in names]
    with cluster("sim", specs, hosts=3, lab_id="busy") as made:
        yield made


@contextlib.asynccontextmanager
async def busy(made: Cluster, letter: str) -> AsyncIterator[Storm]:
    """h2 has one slot, which a crawling guest has, and one prepared place, which another one has; a third one waits behind them.
    `letter`: of their names."""
    await set_limits(made, incoming=1, outgoing=8, prepared=1)
    runs, prepared, waits = (Leg(f"{letter}{number}", "h1", TARGET) for number in (1, 2, 3))
    async with Storm(made, made.server, [runs, prepared, waits]) as storm, Talk(made.server) as talk:
        await storm.start(runs, CRAWL)
        await storm.until_moving(runs)
        await storm.start(prepared)
        await talk.watch(storm.id_of(prepared), lambda migration: migration.phase == "perform" and bool(migration.wait.position))
        await storm.start(waits)
        await storm.until_listed(TARGET, waits, waits=True)
        yield storm


async def end_all(made: Cluster, storm: Storm) -> None:
    await storm.speed_up(storm.legs[0])
    await storm.ends()
    await storm.assert_all_arrived()


async def update(made: Cluster, host: str, **settings: object) -> None:
    async with Talk(made.agents[host].address) as talk:
        request = host_pb2.UpdateHostRequest(settings=host_pb2.HostSettings(**settings))  # type: ignore[arg-type]
        request.update_mask.paths[:] = list(settings)
        await talk.call(talk.hosts.UpdateHost, request)


async def test_8_2_fail_fast_says_at_once_why_where_and_what_else(made: Cluster) -> None:
    async with busy(made, "a") as storm:
        made.start_guest("a4", "h1")
        taken = []
        async with Talk(made.server) as talk:
            for _ in range(TRIES):
                began = time.monotonic()
                with pytest.raises(DroverError) as refusal:
                    await talk.start("a4", TARGET)
                taken.append(time.monotonic() - began)
            told = refusal.value.metadata
            assert refusal.value.reason is Reason.BUSY
            assert (told["limit"], told["limit_value"], told["in_use"], told["position"], told["queue_length"]) == (
                "incoming_limit",
                "1",
                "1",
                "3",
                "3",
            )
            assert 0 <= float(told["estimate_low"]) <= float(told["estimate_high"])
            assert (told["host"], told["alternatives"]) == (TARGET, "h3")
            assert refusal.value.retry_after
            assert made.copies("a4") == {"h1": "running"}
            print(
                f"fail-fast: median {statistics.median(taken) * 1000:.1f} ms, {min(taken) * 1000:.1f} to {max(taken) * 1000:.1f} ms"
            )
            assert min(taken) < 0.05, taken
            spec = pb.MigrationSpec(domain="a4", wait_mode=pb.WAIT_MODE_HYBRID)
            request = pb.StartMigrationRequest(migration_id=new_id(), spec=spec, slot_wait=duration(60))
            await talk.call(talk.migrations.StartMigration, request)
            ended = await talk.end(request.migration_id)
        assert (state(ended), ended.runs_on) == ("succeeded", "h3"), "a hybrid one to any host takes the next host"
        await end_all(made, storm)


async def test_8_2_a_named_host_is_waited_for_until_the_deadline(made: Cluster) -> None:
    async with busy(made, "b") as storm:
        made.start_guest("b4", "h1")
        command = made.drover("migrate", "b4", "--to", TARGET, "--wait=2s", "--wait-mode", "hybrid")
        began = time.monotonic()
        done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=40, check=False)
        assert done.returncode == 4, done.stderr
        assert time.monotonic() - began >= 2.0
        assert "Nothing was done to the guest" in done.stderr, done.stderr
        assert made.copies("b4") == {"h1": "running"}
        await end_all(made, storm)


async def test_8_1_a_limit_below_what_is_in_use_ends_nothing(made: Cluster) -> None:
    async with busy(made, "c") as storm:
        await set_limits(made, incoming=3, outgoing=8, prepared=1)
        runs, prepared, waits = storm.legs
        async with Talk(made.server) as talk:
            for leg in (prepared, waits):
                await talk.watch(storm.id_of(leg), lambda migration: not migration.wait.position)
        await set_limits(made, incoming=1, outgoing=1, prepared=0)
        await end_all(made, storm)
        assert runs.target == TARGET


async def test_8_1_a_limit_of_zero_ends_the_waits_and_lets_the_transfer_end(made: Cluster) -> None:
    async with busy(made, "d") as storm:
        runs, *others = storm.legs
        await update(made, TARGET, incoming_limit=0)
        async with Talk(made.server) as talk:
            for leg in others:
                ended = await talk.end(storm.id_of(leg))
                assert (state(ended), ended.failure.reason) == ("failed", "HOST_CLOSED"), ended.failure.message
                assert made.copies(leg.guest) == {"h1": "running"}
            await storm.speed_up(runs)
            assert state(await talk.end(storm.id_of(runs))) == "succeeded"
        for host in made.hosts:
            await storm.until_slots(host, lambda slots: not slots)


async def test_8_1_a_cordon_ends_no_wait(made: Cluster) -> None:
    async with busy(made, "e") as storm:
        await update(made, TARGET, cordoned=True)
        try:
            await end_all(made, storm)
        finally:
            await update(made, TARGET, cordoned=False)
