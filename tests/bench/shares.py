"""`scripts/bench shares`: the time to divide bandwidth among many transfers."""

import time
from dataclasses import dataclass
from random import Random
from statistics import median
from typing import Any

from agent.transfer.shares import Flow, divide
from tests.bench.output import say

MIB = 1 << 20
GBIT = 125_000_000


@dataclass(frozen=True)
class Result:
    flows: int
    hosts: int
    milliseconds: tuple[float, ...]
    """CPU time of each division, in order of size."""


def cluster(at_random: Random, flows: int, hosts: int) -> tuple[dict[int, Flow], dict[str, int]]:
    """Return transfers between random hosts over two capped networks, a quarter with a minimum, a third with a maximum."""
    capacities = {f"{way} h{host}": at_random.choice([1, 10, 25]) * GBIT for host in range(hosts) for way in ("out", "in")}
    capacities |= {"net1": 16 * hosts * GBIT // 20, "net2": 40 * hosts * GBIT // 20}

    def flow() -> Flow:
        lines = f"out h{at_random.randrange(hosts)}", f"in h{at_random.randrange(hosts)}"
        least = at_random.choice([0, 0, 0, at_random.randrange(5 * MIB)])
        most = at_random.choice([0, 0, at_random.randrange(10 * MIB, 100 * MIB)])
        return Flow(lines, (at_random.choice(["net1", "net2"]),), at_random.choice([1, 2, 4]), least, most, MIB)

    return {number: flow() for number in range(flows)}, capacities


def measure(flows: int, hosts: int, rounds: int) -> Result:
    taken = []
    for seed in range(rounds):
        transfers, capacities = cluster(Random(seed), flows, hosts)
        began = time.thread_time()
        divide(transfers, capacities)
        taken.append((time.thread_time() - began) * 1000)
    return Result(flows, hosts, tuple(sorted(taken)))


def tell(result: Result) -> None:
    taken = result.milliseconds
    say(f"{result.flows} transfers over {result.hosts} hosts, {len(taken)} divisions")
    p90 = taken[len(taken) * 9 // 10]
    print(f"median {median(taken):.2f} ms, p90 {p90:.2f} ms, fastest {taken[0]:.2f} ms of CPU time")


def to_json(result: Result) -> Any:
    return {"flows": result.flows, "hosts": result.hosts, "milliseconds": list(result.milliseconds)}
