"""The scenarios' cluster on real libvirt and real QEMU, and the rule that CI never leaves it out."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.cluster import Cluster, cluster, why_not_libvirt
from tests.scenarios.guests import GUESTS
from tests.scenarios.settings import SETTINGS

_HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker(pytest.mark.lab)


@pytest.fixture(autouse=True, scope="session")
def _real_hosts() -> None:
    reason = why_not_libvirt()
    if reason and os.environ.get("CI"):
        pytest.fail(f"CI must run on real test hosts, but: {reason}")
    if reason:
        pytest.skip(f"no real test hosts: {reason}")


@pytest.fixture(scope="session", name="cluster")
def _cluster(_real_hosts: None) -> Iterator[Cluster]:
    with cluster("libvirt", GUESTS.values(), networks=2, lab_id=f"sc{os.getpid()}", settings=SETTINGS) as made:
        yield made
