"""Storms on simulated hosts."""

from collections.abc import Iterator

import pytest

from tests.kit.cluster import Cluster, cluster
from tests.scenarios.storming import GUESTS, SETTINGS
from tests.scenarios.storms import *  # noqa: F403 - the tests themselves
from tests.scenarios.storms import pytestmark  # noqa: F401 - their timeout


@pytest.fixture(scope="module", name="cluster")
def _cluster() -> Iterator[Cluster]:
    with cluster("sim", GUESTS.values(), hosts=4, settings=SETTINGS) as made:
        yield made
