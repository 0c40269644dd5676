"""`scripts/bench rings`: guests that change places between hosts whose limits are all 1, next to the same moves one after the other.

Each run starts its migrations at once, in a random order, all waiting; then new guests make the same moves one at a time. No guest's
name is used twice, and where each one runs is read from the hypervisors.
"""

import asyncio
import contextlib
import itertools
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import click

from drover.agent.v1 import migration_pb2 as pb
from tests.bench.output import say, show_table
from tests.kit.cluster import Cluster, GuestSpec, cluster
from tests.scenarios.conversation import FINAL, MIB, Talk, duration, new_id, state
from tests.scenarios.storming import slots_of

BAR: Final = 1.5
"""Most time for all at once, as a ratio to one after the other."""
PATIENCE_SECONDS: Final = 120.0


@dataclass(frozen=True)
class Setting:
    runs: int
    hosts: int
    """2: crossing moves; more: a ring."""
    guests: int
    """That leave each host."""
    prepared: int
    """The prepared limit of each host; the others are 1."""
    memory_mib: int = 24
    link_mib: int = 32
    """Speed of each host's link in MiB/s."""
    seed: int = 1

    @property
    def moves(self) -> list[tuple[str, str]]:
        names = [f"h{number}" for number in range(1, self.hosts + 1)]
        return [*itertools.pairwise([*names, names[0]])] * self.guests

    @property
    def cluster(self) -> contextlib.AbstractContextManager[Cluster]:
        rate = self.link_mib * MIB
        limits = {"incoming_limit": 1, "outgoing_limit": 1, "prepared_limit": self.prepared}
        return cluster(
            "sim",
            hosts=self.hosts,
            lab_id="rings",
            settings={"agent": limits, "sim": {"link_rate": rate, "incoming_link_rate": rate}},
        )


@dataclass
class Result:
    setting: Setting
    together: list[float] = field(default_factory=list)
    """Seconds of each run for all at once."""
    singly: list[float] = field(default_factory=list)
    """And one after the other."""
    problems: list[str] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        return [at_once / singly for at_once, singly in zip(self.together, self.singly, strict=True)]


def measure(setting: Setting) -> Result:
    result, at_random = Result(setting), random.Random(setting.seed)
    with setting.cluster as made:
        for run in range(setting.runs):
            result.together.append(asyncio.run(_run(made, setting, f"t{run}", at_random, result, at_once=True)))
            result.singly.append(asyncio.run(_run(made, setting, f"s{run}", at_random, result, at_once=False)))
            say(f"run {run + 1:2d}: {result.together[-1]:5.1f} s at once, {result.singly[-1]:5.1f} s one after the other")
    return result


async def _run(made: Cluster, setting: Setting, prefix: str, at_random: random.Random, result: Result, *, at_once: bool) -> float:
    moves = {f"{prefix}-{number}": move for number, move in enumerate(setting.moves)}
    for name, (source, _) in moves.items():
        made.specs[name] = GuestSpec(name, memory_mib=setting.memory_mib, dirty=5)
        await asyncio.to_thread(made.start_guest, name, source)
    order = at_random.sample(list(moves), len(moves))
    async with Talk(made.server) as talk:
        began = time.monotonic()
        if at_once:
            ended = await asyncio.gather(*(_move(talk, name, moves[name][1]) for name in order))
        else:
            ended = [await _move(talk, name, moves[name][1]) for name in order]
        seconds = time.monotonic() - began
    for name, migration in zip(order, ended, strict=True):
        if state(migration) != "succeeded":
            result.problems.append(f"{name}: {state(migration)} {migration.failure.message}")
        elif (found := made.copies(name)) != {moves[name][1]: "running"}:
            result.problems.append(f"{name} went from {moves[name][0]} to {moves[name][1]}, but the hypervisors show {found}")
    for host in made.hosts:
        if slots := await slots_of(made, host):
            result.problems.append(f"{host} still has {slots}")
    made.end_guests()
    return seconds


async def _move(talk: Talk, guest: str, target: str) -> pb.Migration:
    spec = pb.MigrationSpec(domain=guest, destination_host=target)
    request = pb.StartMigrationRequest(migration_id=new_id(), spec=spec, slot_wait=duration(PATIENCE_SECONDS))
    await talk.call(talk.migrations.StartMigration, request)
    return await _end(talk, request.migration_id)


async def _end(talk: Talk, migration_id: str) -> pb.Migration:
    call = talk.migrations.WatchMigration(pb.WatchMigrationRequest(migration_id=migration_id), timeout=PATIENCE_SECONDS)
    try:
        async for response in call:
            if response.migration.state in FINAL:
                return response.migration
    finally:
        call.cancel()
    raise RuntimeError(f"the watch of {migration_id} ended before the migration")


def tell(results: Sequence[Result]) -> None:
    head = ("moves", "prepared", "runs", "at once s", "singly s", "ratio", "worst ratio", f"within {BAR:g}")
    show_table("Medians", head, [_row(result) for result in results])
    for problem in itertools.chain.from_iterable(result.problems for result in results):
        click.echo(f"problem: {problem}")


def _row(result: Result) -> list[str]:
    setting, ratios = result.setting, sorted(result.ratios)
    middle = len(ratios) // 2
    figures = [f"{sorted(values)[middle]:.1f}" for values in (result.together, result.singly)]
    within = f"{sum(ratio <= BAR for ratio in ratios)} of {len(ratios)}"
    shape = f"{len(setting.moves)} between {setting.hosts} hosts"
    return [shape, str(setting.prepared), str(setting.runs), *figures, f"{ratios[middle]:.2f}", f"{ratios[-1]:.2f}", within]


def to_json(results: Sequence[Result]) -> Any:
    return [
        {
            "hosts": r.setting.hosts,
            "guests": r.setting.guests,
            "prepared": r.setting.prepared,
            "together": r.together,
            "singly": r.singly,
        }
        for r in results
    ]
