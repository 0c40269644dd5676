"""Storms on real libvirt and real QEMU: small guests of four hosts."""

import asyncio
import os
from collections.abc import Iterator

import pytest

from tests.kit.cluster import Cluster, cluster
from tests.scenarios.storming import GUESTS, SETTINGS, Watcher
from tests.scenarios.storms import *  # noqa: F403 - the tests themselves
from tests.scenarios.storms import (
    FIRST,
    QUEUED,
    TARGET,
    pytestmark,  # noqa: F401 - their timeout
    storm_of_eight,
)


@pytest.fixture(scope="module", name="cluster")
def _cluster(_real_hosts: None) -> Iterator[Cluster]:
    with cluster("libvirt", GUESTS.values(), hosts=4, lab_id=f"st{os.getpid() % 10**8}", settings=SETTINGS) as made:
        yield made


async def test_8_2_eight_guests_while_the_destination_dies_three_times(cluster: Cluster) -> None:
    async with Watcher(cluster, TARGET) as watcher, storm_of_eight(cluster) as storm:
        for arrived in (0, 2, 4):
            await storm.until_arrived(arrived)
            cluster.agents[TARGET].kill()
            await asyncio.to_thread(cluster.agents[TARGET].start)
            for leg in FIRST:
                await storm.speed_up(leg)
    await storm.assert_all_arrived()
    assert watcher.most_by_slots <= 2, "the slots that the host itself reports"
    assert watcher.most_by_hypervisor <= 2, "transfers that the sources' hypervisors report"
    # Each restart gives up what is prepared, which is granted again later. Turns within an importance: tests/unit/test_book.py.
    importances = [leg.importance for leg in sorted(QUEUED, key=lambda leg: watcher.first_epochs[storm.id_of(leg)])]
    assert importances == sorted(importances, reverse=True)
