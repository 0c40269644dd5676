"""Issue 6, at the end: a caller who is not the driver makes phase calls at random, beside honest migrations."""

import pytest

from tests.bench import walk


@pytest.mark.timeout(180)
@pytest.mark.parametrize("seed", [1])
async def test_6_01_no_two_copies_run_and_nobody_is_stuck_whatever_an_outsider_calls(seed: int) -> None:
    result = await walk.measure(1000, seed)
    assert result.problems == []
    assert result.migrations.total() > 5
    assert sum(number for word, number in result.answers.items() if word.endswith(" OK")) > 50
