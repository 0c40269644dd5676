"""Storms on real libvirt and real QEMU: small guests of four hosts."""

import os
from collections.abc import Iterator

import pytest

from tests.kit.cluster import Cluster, cluster
from tests.scenarios.storming import GUESTS, SETTINGS
from tests.scenarios.storms import *  # noqa: F403 - the tests themselves
from tests.scenarios.storms import pytestmark  # noqa: F401 - their timeout


@pytest.fixture(scope="module")
def hosts(_real_hosts: None) -> Iterator[Cluster]:
    with cluster("libvirt", GUESTS.values(), hosts=4, lab_id=f"st{os.getpid() % 10**8}", settings=SETTINGS) as made:
        yield made
