"""Bandwidth on simulated hosts."""

from collections.abc import Iterator

import pytest

from tests.kit.cluster import Cluster, cluster
from tests.scenarios.sharing import *  # noqa: F403 - the tests themselves
from tests.scenarios.sharing import RATE, SETTINGS, guests


@pytest.fixture(scope="module", name="line")
def _line() -> Iterator[Cluster]:
    settings = SETTINGS | {"sim": {"link_rate": RATE}}
    with cluster("sim", guests(dirty=14000), networks=2, lab_id="sharing", settings=settings) as made:
        yield made
