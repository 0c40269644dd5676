"""Each known flaw or assumption breaks exactly the rule given in `findings`. A test fails once the product is corrected."""

import pytest

from tests.model.explore import explore
from tests.model.findings import FINDINGS, Finding
from tests.model.trace import table


@pytest.mark.parametrize("finding", FINDINGS, ids=lambda finding: finding.world.name)
def test_a_finding_is_as_it_is_described(finding: Finding) -> None:
    result = explore(finding.world)
    assert result.rule == finding.finds, f"{finding.world.about}\n{table(result)}"
