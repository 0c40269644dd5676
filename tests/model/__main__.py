"""`python -m tests.model`: explore worlds, print their sizes, and the shortest trace to a failure.

Exit status 0: every world is good. 1: one is not, or a row of the tables is not covered. 2: no such world.
"""

import argparse
import multiprocessing
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from tests.model.explore import Result, explore
from tests.model.findings import FINDINGS
from tests.model.mutations import MUTATIONS
from tests.model.trace import table
from tests.model.world import World
from tests.model.worlds import FULL, ROWS, SMALL

_GROUPS: dict[str, tuple[World, ...]] = {
    "full": FULL,
    "small": SMALL,
    "mutations": tuple(mutation.world for mutation in MUTATIONS),
    "findings": tuple(finding.world for finding in FINDINGS),
}
_WORLDS = {world.name: world for worlds in _GROUPS.values() for world in worlds}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.model", description="Explores the handshake under every interleaving.")
    parser.add_argument("worlds", nargs="*", default=["full"], help=f"worlds, or groups: {', '.join(_GROUPS)} (default: full)")
    parser.add_argument("--states", type=int, help="look at no more than so many states of each world (default: at all)")
    parser.add_argument("--jobs", type=int, default=2, help="processes, where there are several worlds (default: 2)")
    parser.add_argument("--list", action="store_true", help="print the worlds and end")
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join(f"{group:<10} {w.name:<30} {w.about}" for group, worlds in _GROUPS.items() for w in worlds))
        return 0
    names: list[str] = []
    for name in options.worlds:
        if name not in _GROUPS and name not in _WORLDS:
            print(f"no world is called {name}; --list shows them", file=sys.stderr)
            return 2
        names += [world.name for world in _GROUPS.get(name, ())] or [name]
    began = time.perf_counter()
    with _searches(names, options.states, options.jobs) as searches:
        results = [_shown(result) for result in searches]
    return _summary(results, time.perf_counter() - began, covers={world.name for world in FULL} <= set(names))


@contextmanager
def _searches(names: Sequence[str], limit: int | None, jobs: int) -> Iterator[Iterable[Result]]:
    """Yield the results as they come. Each world is explored in its own process, to use more than one core."""
    if len(names) == 1 or jobs == 1:
        yield map(partial(_search, limit=limit), names)
        return
    with multiprocessing.Pool(jobs, maxtasksperchild=1) as pool:
        yield pool.imap_unordered(partial(_search, limit=limit), names)


def _search(name: str, limit: int | None) -> Result:
    return explore(_WORLDS[name], limit)


def _shown(result: Result) -> Result:
    print(result, flush=True)
    if not result.good:
        print(f"\n{result.world}: {_WORLDS[result.world].about}\n\n{table(result)}\n", flush=True)
    return result


def _summary(results: Sequence[Result], seconds: float, *, covers: bool) -> int:
    bad = sum(not result.good for result in results)
    states, steps = sum(result.states for result in results), sum(result.steps for result in results)
    whole = "each whole" if all(result.whole for result in results) else "not each whole"
    print(
        f"\n{len(results)} worlds, {whole}: {states:,} states, {steps:,} steps, greatest depth {max(r.depth for r in results)}, "
        f"{seconds:.1f} s ({states / seconds:,.0f}/s): {f'{bad} broken' if bad else 'all good'}"
    )
    uncovered = ROWS - frozenset().union(*(result.taken for result in results)) if covers else frozenset()
    for state, event in sorted(uncovered, key=str):
        print(f"no world takes the row {state} + {event}")
    return 1 if bad or uncovered else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
