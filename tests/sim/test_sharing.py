"""Bandwidth on simulated hosts."""

from collections.abc import Iterator

import pytest

from tests.kit.cluster import Cluster, cluster
from tests.scenarios.sharing import *  # noqa: F403 - the tests themselves
from tests.scenarios.sharing import GUESTS, RATE, SETTINGS, start_guests


@pytest.fixture(scope="module", name="line")
def _line() -> Iterator[Cluster]:
    settings = SETTINGS | {"sim": {"link_rate": RATE}}
    with cluster("sim", GUESTS, networks=2, lab_id="sharing", settings=settings) as made:
        start_guests(made)
        yield made
