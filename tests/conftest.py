"""What all tests share."""

import pytest

for _module in ("documents", "migrating", "phases", "refusing"):
    pytest.register_assert_rewrite(f"tests.scenarios.{_module}")
