"""Hooks and settings of all tests."""

import pytest
from hypothesis import HealthCheck, settings

from tests.kit.cluster import Cluster

# How long an example takes says how busy the machine is, and no more.
settings.register_profile("drover", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("drover")

for _module in ("documents", "migrating", "phases", "refusing", "storming", "storms"):
    pytest.register_assert_rewrite(f"tests.scenarios.{_module}")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """End a test's guests with it, so that later tests do not see them, nor share the machine with them. The parameters of one test
    share its guests.
    """
    made = getattr(item, "funcargs", {}).get("cluster")
    if isinstance(made, Cluster) and _function(item) != _function(nextitem):
        made.end_guests()


def _function(item: pytest.Item | None) -> str:
    return item.nodeid.partition("[")[0] if item is not None else ""
