"""Issue 8, point 2: the coordinator, or an agent, dies while migrations run, are prepared, and wait; on simulated hosts."""

import asyncio
from collections.abc import Iterator

import pytest

from tests.kit.cluster import Cluster, GuestSpec, cluster
from tests.scenarios.conversation import CRAWL, Talk, state
from tests.scenarios.storming import SETTINGS, Leg, Storm, set_limits
from tests.scenarios.storms import assert_agents_show

pytestmark = pytest.mark.timeout(120)

TARGET = "h3"


def legs_of(prefix: str) -> list[Leg]:
    """One that runs, one that is prepared, two that wait."""
    return [Leg(f"{prefix}-{name}", source, TARGET) for name, source in zip("rpwv", ("h1", "h1", "h2", "h1"), strict=True)]


@pytest.fixture(scope="module", name="made")
def _made() -> Iterator[Cluster]:
    specs = [GuestSpec(leg.guest, memory_mib=40, dirty=5) for prefix in ("gone", "back", "h2", "h3") for leg in legs_of(prefix)]
    with cluster("sim", specs, hosts=3, lab_id="codies", settings=SETTINGS) as made:
        yield made


@pytest.mark.parametrize("back", [False, True], ids=["after-all", "in-the-middle"])
async def test_8_2_the_coordinator_dies_while_migrations_run_are_prepared_and_wait(made: Cluster, *, back: bool) -> None:
    await set_limits(made, incoming=1, outgoing=4, prepared=1)
    legs = legs_of("back" if back else "gone")
    runs, prepared = legs[:2]
    async with Storm(made, made.server, legs) as storm:
        await storm.start(runs, CRAWL)
        await storm.until_moving(runs)
        await storm.start(prepared)
        await storm.until_listed(TARGET, prepared, waits=True)
        await storm.until_listed(TARGET, prepared, waits=False)
        async with Talk(made.server) as talk:
            await talk.watch(storm.id_of(prepared), lambda migration: migration.phase == "perform")
        await asyncio.gather(*map(storm.start, legs[2:]))
        for leg in legs[2:]:
            await storm.until_listed(leg.source, leg)
        made.coordinator.kill()
        try:
            await assert_agents_show(made, storm, legs)
            if back:
                await asyncio.to_thread(made.coordinator.start)
                await storm.speed_up(runs)
            else:
                async with Talk(made.agents[runs.source].address) as talk:
                    await storm.speed_up(runs, talk)
            await storm.ends_at_agents()
        finally:
            if not back:
                await asyncio.to_thread(made.coordinator.start)
        await storm.ends()  # as the coordinator lists them
        await storm.assert_all_arrived()
        for leg in legs:
            async with Talk(made.agents[leg.source].address) as talk:
                assert state(await talk.get(storm.id_of(leg))) == "succeeded"


@pytest.mark.parametrize("victim", ["h2", "h3"], ids=["source", "destination"])
async def test_8_2_a_prepared_migration_waits_again_when_an_agent_is_killed(made: Cluster, victim: str) -> None:
    """The simulated destination takes the transfer that is under way with it."""
    await set_limits(made, incoming=1, outgoing=4, prepared=1)
    runs, waits, prepared, _ = legs_of(victim)
    async with Storm(made, made.server, [runs, prepared, waits]) as storm, Talk(made.server) as talk:
        await storm.start(runs, CRAWL)
        await storm.until_moving(runs)
        await storm.start(prepared)
        await talk.watch(storm.id_of(prepared), lambda migration: migration.phase == "perform")
        await storm.start(waits)
        await storm.until_listed(TARGET, waits, waits=True)
        made.agents[victim].kill()
        await asyncio.to_thread(made.agents[victim].start)
        await talk.watch(storm.id_of(prepared), lambda migration: migration.attempt == 2)
        await storm.speed_up(runs)
        await storm.ends()
        for leg in (prepared, waits):
            ended = storm.ended[storm.id_of(leg)]
            assert (state(ended), made.running_on(leg.guest)) == ("succeeded", [TARGET]), ended.failure.message
        assert made.copies(runs.guest) == {runs.source if victim == TARGET else TARGET: "running"}
        for host in made.hosts:
            await storm.until_slots(host, lambda slots: not slots)
