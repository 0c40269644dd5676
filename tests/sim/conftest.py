"""The scenarios' cluster on the simulated hypervisor."""

from collections.abc import Iterator

import pytest

from tests.kit.cluster import Cluster, cluster
from tests.scenarios.guests import GUESTS
from tests.scenarios.settings import SETTINGS


@pytest.fixture(scope="session", name="cluster")
def _cluster() -> Iterator[Cluster]:
    with cluster("sim", GUESTS.values(), networks=2, settings=SETTINGS) as made:
        yield made
