"""The handshake in small worlds, each explored whole. CI explores the large ones with `python -m tests.model`."""

import pytest

from agent.handshake.destination import DESTINATION, DestinationState
from agent.handshake.source import SOURCE, SourceState
from tests.model.explore import Search, explore
from tests.model.trace import table
from tests.model.world import World
from tests.model.worlds import FULL, SMALL


@pytest.mark.parametrize("world", SMALL, ids=lambda world: world.name)
def test_nothing_bad_happens_and_everything_ends(world: World) -> None:
    result = explore(world)
    assert result.good, f"\n{table(result)}"
    assert result.whole
    assert result.ends > 0, "a world without an end proves nothing"


@pytest.mark.parametrize("world", FULL, ids=lambda world: world.name)
def test_a_large_world_begins_well(world: World) -> None:
    result = explore(world, limit=3_000)
    assert result.good, f"\n{table(result)}"


def test_every_state_of_both_records_is_reached() -> None:
    """Otherwise the model would have nothing to say about it."""
    sources: set[str | None] = set()
    destinations: set[str | None] = set()
    for world in SMALL:
        if world.name in ("cancel", "crashes"):
            search = Search(world)
            search.run()
            sources |= {agent.state for agent in search.model.agents.parts}
            destinations |= {agent.state for agent in search.model.agents.parts}
    assert set(SourceState) <= sources
    assert set(DestinationState) <= destinations


def test_rows_of_the_tables_that_no_world_takes_are_known() -> None:
    """A row that is never taken is either dead, or not covered: a new one must be looked at and named here."""
    taken: set[tuple[str | None, str]] = set()
    for world in SMALL:
        search = Search(world)
        search.run()
        taken |= search.model.taken
    rows = {(str(state) if state else None, str(event)) for state, event in [*SOURCE.table, *DESTINATION.table]}
    assert rows - taken == NOT_TAKEN


NOT_TAKEN: set[tuple[str | None, str]] = set()
