"""The handshake in small worlds, each explored completely. `python -m tests.model` explores the large ones."""

import pytest

from tests.model.explore import explore
from tests.model.trace import table
from tests.model.world import World
from tests.model.worlds import COVER, FULL, ROWS, SMALL


@pytest.mark.parametrize("world", SMALL, ids=lambda world: world.name)
def test_nothing_bad_happens_and_everything_ends(world: World) -> None:
    result = explore(world)
    assert result.good, f"\n{table(result)}"
    assert result.whole
    assert result.ends > 0, "a world without an end proves nothing"


def test_every_row_of_the_tables_is_taken() -> None:
    """A row that is not used is dead, or no world covers it."""
    taken = frozenset().union(*(explore(world).taken for world in SMALL if world.name in COVER))
    assert ROWS - taken == set()


def test_every_world_has_a_name_of_its_own() -> None:
    names = [world.name for world in (*SMALL, *FULL)]
    assert len(set(names)) == len(names)
