"""The model finds each deliberate flaw, and the harm that it does."""

from dataclasses import replace

import pytest

from tests.model.explore import explore
from tests.model.flaws import Mutation
from tests.model.invariants import HARM
from tests.model.mutations import MUTATIONS
from tests.model.trace import table

_ids = [mutation.world.name for mutation in MUTATIONS]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=_ids)
def test_a_mutation_is_found(mutation: Mutation) -> None:
    result = explore(mutation.world)
    assert result.rule == mutation.finds, f"{mutation.world.about}\n{table(result)}"
    assert result.trace is not None
    assert mutation.finds in table(result)


@pytest.mark.parametrize("mutation", [m for m in MUTATIONS if m.harm], ids=[m.world.name for m in MUTATIONS if m.harm])
def test_a_mutation_does_harm(mutation: Mutation) -> None:
    """With only the rules of `HARM`, the flaw still shows as harm to the user: the other rules are no ends in themselves."""
    result = explore(replace(mutation.world, checks=HARM))
    assert result.rule == mutation.harm, f"{mutation.world.about}\n{table(result)}"


def test_every_mutation_has_a_name_of_its_own() -> None:
    assert len(set(_ids)) == len(_ids)
