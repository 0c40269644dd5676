"""Bandwidth on real hosts, whose lines are limited by the kernel."""

import os
from collections.abc import Iterator

import pytest

from tests.kit.cluster import Cluster
from tests.kit.cluster import cluster as make_cluster
from tests.kit.cluster.platforms import LabCluster
from tests.scenarios.sharing import *  # noqa: F403 - the tests themselves
from tests.scenarios.sharing import GUESTS, RATE, SETTINGS, start_guests

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module", name="line")
def _line(_real_hosts: None) -> Iterator[Cluster]:
    with make_cluster("libvirt", GUESTS, networks=2, lab_id=f"sh{os.getpid()}", settings=SETTINGS) as made:
        assert isinstance(made, LabCluster)
        for host in made.lab.hosts:
            host.limit_rate("mig1", RATE)
        start_guests(made)
        yield made
