"""`python -m tests.model`: explore every world, print what was looked at, and the shortest trace of what is wrong.

Exit status 0: every world is good. 1: one is not. 2: no such world.
"""

import argparse
import sys
import time

from tests.model.explore import Result, explore
from tests.model.findings import FINDINGS
from tests.model.mutations import MUTATIONS
from tests.model.trace import table
from tests.model.world import World
from tests.model.worlds import FULL, SMALL

_GROUPS: dict[str, tuple[World, ...]] = {
    "full": FULL,
    "small": SMALL,
    "mutations": tuple(mutation.world for mutation in MUTATIONS),
    "findings": tuple(finding.world for finding in FINDINGS),
}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.model", description="Explores the handshake: every interleaving of faults.")
    parser.add_argument("worlds", nargs="*", default=["full"], help=f"names of worlds, or of groups: {', '.join(_GROUPS)} (default: full)")
    parser.add_argument("--states", type=int, help="look at no more than so many states of each world (default: at all)")
    parser.add_argument("--list", action="store_true", help="print the worlds and end")
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join(f"{group:<10} {w.name:<26} {w.about}" for group, worlds in _GROUPS.items() for w in worlds))
        return 0
    try:
        worlds = [world for name in options.worlds for world in _named(name)]
    except KeyError as error:
        print(f"no world is called {error.args[0]}; --list shows them", file=sys.stderr)
        return 2
    return _explore(worlds, options.states)


def _named(name: str) -> tuple[World, ...]:
    if name in _GROUPS:
        return _GROUPS[name]
    return ({world.name: world for worlds in _GROUPS.values() for world in worlds}[name],)


def _explore(worlds: list[World], limit: int | None) -> int:
    began = time.perf_counter()
    results: list[Result] = []
    for world in worlds:
        results.append(explore(world, limit))
        print(results[-1], flush=True)
        if not results[-1].good:
            print(f"\n{world.name}: {world.about}\n\n{table(results[-1])}\n", flush=True)
    bad = sum(not result.good for result in results)
    states, steps = sum(result.states for result in results), sum(result.steps for result in results)
    whole = "each whole" if all(result.whole for result in results) else "not each whole"
    print(
        f"\n{len(results)} worlds, {whole}: {states:,} states, {steps:,} steps, greatest depth {max(r.depth for r in results)}, "
        f"{time.perf_counter() - began:.1f} s: {f'{bad} broken' if bad else 'all good'}"
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
