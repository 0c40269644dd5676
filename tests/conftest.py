"""What all tests share."""

import pytest

for _module in ("migrating", "phases", "refusing"):
    pytest.register_assert_rewrite(f"tests.scenarios.{_module}")
