"""`scripts/bench chaos --waiting`: many migrations that wait for slots, while agents and the coordinator die, hang, are restarted or
are cut off.
"""

import contextlib
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

from drover.agent.v1 import host_pb2
from drover.agent.v1 import migration_pb2 as pb
from tests.bench import chaos_talk as talk
from tests.bench.chaos import Timeline
from tests.bench.chaos_arena import Arena
from tests.bench.chaos_faults import inflict, mend
from tests.bench.chaos_plan import Fault
from tests.bench.chaos_targets import TARGETS, Roles, Target
from tests.bench.chaos_waiting_judge import Asked, Verdict, judge
from tests.bench.chaos_waiting_plan import Change, Move, WaitingPlan
from tests.bench.output import say
from tests.kit.cluster import ClusterGuest, Daemon, GuestSpec
from tests.kit.cluster.platforms import LabCluster
from tests.kit.lab.errors import LabError

DEADLINE: Final = 90.0
"""Seconds from the repair of the last fault to the end of all migrations, those that still wait included."""


@dataclass
class WaitingResult:
    """The result of a round."""

    plan: WaitingPlan
    verdict: Verdict = field(default_factory=Verdict)
    struck: list[str] = field(default_factory=list)
    """What was done when, as sentences."""
    seconds: float = 0.0
    """Duration of the whole round."""

    @property
    def good(self) -> bool:
        return not self.verdict.problems

    def report(self) -> str:
        """Return the plan, what was done, the ends and the problems as text."""
        ends = [f"{guest}: {end}" for guest, end in self.verdict.ends.items()]
        problems = [f"PROBLEM {each}" for each in self.verdict.problems]
        return "\n".join([str(self.plan), *self.struck, *ends, *self.verdict.remarks, *problems])


def play(
    arena: Arena, plan: WaitingPlan, keep: Callable[[WaitingPlan], Path], tell: Callable[[WaitingResult], None]
) -> WaitingResult:
    """Run one round; after a bad one the arena gets a fresh cluster."""
    began = time.monotonic()
    names = {move.guest: arena.new_name("wait") for move in plan.moves}
    wanted = [(GuestSpec(names[move.guest], memory_mib=48, mem_mib=16, dirty=50, ticks=50), move.source) for move in plan.moves]
    with arena.guests(wanted) as guests:
        result = _Round(arena.made, plan, guests).run()
        result.verdict.problems += arena.complaints()
        if not result.good:
            arena.keep_evidence(keep(plan), guests, result.report())
    result.seconds = time.monotonic() - began
    tell(result)
    if not result.good:
        say(result.report())
        arena.discard()
    return result


class _Round:
    """One round under way."""

    def __init__(self, made: LabCluster, plan: WaitingPlan, guests: list[ClusterGuest]) -> None:
        self._made = made
        self._plan = plan
        self._asked = [Asked(move, guest, talk.new_id()) for move, guest in zip(plan.moves, guests, strict=True)]
        self._targets: list[Target] = []
        self._timeline = Timeline()
        self._result = WaitingResult(plan)

    def run(self) -> WaitingResult:
        try:
            self._run()
        except (LabError, RuntimeError, talk.SilentError) as error:  # such as a daemon that does not start again: a bad round
            self._result.verdict.problems.append(str(error))
        return self._result

    def _run(self) -> None:
        self._set_limits()
        self._began = time.monotonic()
        with ThreadPoolExecutor(2 * len(self._asked) + len(self._plan.changes)) as pool:
            for asked in self._asked:
                self._at(asked.move.at, partial(pool.submit, self._ask, asked))
                if asked.move.cancel is not None:
                    self._at(asked.move.cancel, partial(pool.submit, self._cancel, asked))
            for change in self._plan.changes:
                self._at(change.at, partial(pool.submit, self._change, change))
            for fault in self._plan.faults:
                self._at(fault.at, partial(self._strike, fault))
            self._timeline.run()
            mend(self._made, self._targets)
        self._set_limits()
        self._note("all is repaired")
        self._result.verdict = judge(self._made, self._plan, self._asked, time.monotonic(), DEADLINE)

    def _at(self, after: float, act: Callable[[], object]) -> None:
        self._timeline.at(self._began + after, act)

    def _note(self, what: str) -> None:
        now = time.time()
        clock = f"{time.strftime('%H:%M:%S', time.gmtime(now))}.{int(now % 1 * 1000):03d}"
        self._result.struck.append(f"{time.monotonic() - self._began:7.3f} s ({clock}): {what}")

    # ---- what is asked for

    def _set_limits(self) -> None:
        for host, limits in self._plan.limits.items():
            talk.update_host(self._made.agents[host], _settings(limits))

    def _change(self, change: Change) -> None:
        settings = _settings(self._plan.limits[change.host])
        setattr(settings, change.setting, change.value)
        with contextlib.suppress(talk.SilentError):
            talk.update_host(self._made.agents[change.host], settings)

    def _driver(self, move: Move) -> Daemon:
        return self._made.coordinator if move.managed else self._made.agents[move.source]

    def _ask(self, asked: Asked) -> None:
        """Ask for the migration once; a refusal may be right, as the daemon may be dead."""
        move = asked.move
        spec = pb.MigrationSpec(
            domain=asked.guest.name,
            destination_host=move.destination,
            importance=pb.Importance.ValueType(move.importance),
            bandwidth_bytes_per_second=move.bandwidth,
        )
        try:
            talk.start(self._driver(move), asked.migration_id, spec, move.wait)
        except talk.SilentError as error:
            asked.refused = str(error)
        self._note(f"{move.guest} {asked.guest.name} asked as {asked.migration_id}: {asked.refused or 'accepted'}")

    def _cancel(self, asked: Asked) -> None:
        move, answer = asked.move, "answered"
        driver = self._made.agents[move.source] if move.cancelled_at_source else self._driver(move)
        try:
            talk.cancel(driver, asked.migration_id)
        except talk.SilentError as error:
            answer = str(error)
        asked.cancelled = True
        self._note(f"{move.guest} cancelled: {answer}")

    # ---- what is done to it

    def _strike(self, fault: Fault) -> None:
        """Inject the fault; schedule its repair."""
        target = target_of(self._made, fault.target)
        inflict(target, fault.action)
        self._note(f"{fault.name} for {fault.down:.2f} s")
        self._targets.append(target)
        self._timeline.at(time.monotonic() + fault.down, partial(self._restore, fault, target))

    def _restore(self, fault: Fault, target: Target) -> None:
        target.restore()
        self._note(f"{fault.target} repaired")


def _settings(limits: Mapping[str, int]) -> host_pb2.HostSettings:
    settings = host_pb2.HostSettings()
    for name, value in limits.items():
        setattr(settings, name, value)
    return settings


def target_of(made: LabCluster, name: str) -> Target:
    """Return a target of a `WaitingPlan`: that of the same name of a migration, whose source is the host."""
    host, _, what = name.partition(" ")
    known = name if host == "coordinator" else f"source {what}"
    return TARGETS[known](Roles(made, "", host, ""))
