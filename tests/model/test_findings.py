"""What is known to be wrong, or relied upon, is just that. Once the product is corrected, a test here fails: see `findings`."""

import pytest

from tests.model.explore import explore
from tests.model.findings import FINDINGS, Finding
from tests.model.trace import table


@pytest.mark.parametrize("finding", FINDINGS, ids=lambda finding: finding.world.name)
def test_a_finding_is_as_it_is_described(finding: Finding) -> None:
    result = explore(finding.world)
    assert result.rule == finding.finds, f"{finding.world.about}\n{table(result)}"
