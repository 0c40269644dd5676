"""What the model found in the product as it is. Each test fails, as expected, until the product is corrected; then it says so."""

import pytest

from tests.model.explore import explore
from tests.model.findings import FINDINGS, Finding
from tests.model.trace import table


@pytest.mark.xfail(strict=True, reason="an open finding; once it is corrected, move its world to tests.model.worlds")
@pytest.mark.parametrize("finding", FINDINGS, ids=lambda finding: finding.world.name)
def test_the_product_is_good_here(finding: Finding) -> None:
    result = explore(finding.world)
    assert result.good, f"{finding.world.about}\n{table(result)}"


@pytest.mark.parametrize("finding", FINDINGS, ids=lambda finding: finding.world.name)
def test_the_model_shows_what_is_wrong(finding: Finding) -> None:
    result = explore(finding.world)
    assert result.rule in (None, finding.finds), f"\n{table(result)}"


_CORRECTED = [finding.corrected for finding in FINDINGS if finding.corrected is not None]


@pytest.mark.parametrize("world", _CORRECTED, ids=lambda world: world.name)
def test_the_correction_is_enough(world: object) -> None:
    from tests.model.world import World

    assert isinstance(world, World)
    result = explore(world)
    assert result.good, f"\n{table(result)}"
    assert result.whole
