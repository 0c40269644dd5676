"""`scripts/bench chaos`: real guests are migrated while something is killed, stopped, cut or reset, again and again."""

import contextlib
import heapq
import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

from agent.failpoints import VARIABLE
from agent.handshake.records import Role
from agent.handshake.source import SourceState
from benchkit import chaos_talk as talk
from benchkit.chaos_arena import Arena
from benchkit.chaos_faults import (
    ARMED_DAEMONS,
    TARGETS,
    DaemonTarget,
    QemuTarget,
    Roles,
    Target,
    arm,
    disarm,
    inflict,
    mend,
    phase_of,
    states,
    stopped,
)
from benchkit.chaos_judge import Case, Judgement, judge
from benchkit.chaos_plan import Fault, Plan
from benchkit.output import say
from clusterkit import ClusterGuest, Daemon, GuestSpec
from clusterkit.platforms import LabCluster
from drover.agent.v1 import migration_pb2 as pb
from labkit.errors import LabError
from labkit.processes import wait_until

DEADLINE: Final = 45.0
"""Seconds from the mending of the last fault to the end. Long: how long it takes is measured, not required."""
REACH_SECONDS: Final = 3.0
"""A failpoint that was not reached for so long: the fault strikes then."""


@dataclass(frozen=True)
class Strike:
    """A fault as it was inflicted."""

    fault: Fault
    phase: str
    """The phase that was under way."""
    sending: bool
    """The source had begun to send."""
    after: float
    """Seconds after the request."""


@dataclass
class Result:
    """What came of a round."""

    plan: Plan
    judgement: Judgement
    strikes: list[Strike] = field(default_factory=list)
    refused: str = ""
    """Why the migration was not accepted."""
    seconds: float = 0.0
    """The whole round."""

    @property
    def good(self) -> bool:
        return self.judgement.good

    @property
    def outcome(self) -> str:
        return self.judgement.outcome if self.good else "BAD"

    def report(self) -> str:
        """For a person who wants to understand it."""
        lines = [str(self.plan), f"outcome: {self.outcome} after {self.judgement.seconds:.1f} s, {self.judgement}"]
        lines += [f"struck: {s.fault.name} in phase {s.phase}, {s.after:.3f} s after the request" for s in self.strikes]
        return "\n".join([*lines, f"refused: {self.refused}"] if self.refused else lines)


def run(arena: Arena, plans: Iterator[Plan], keep: Callable[[Plan], Path], tell: Callable[[Result], None]) -> list[Result]:
    """One round after the other; after a bad one on a fresh cluster. `keep` says where a bad round's evidence goes."""
    results = []
    for plan in plans:
        began = time.monotonic()
        spec = GuestSpec(f"chaos{plan.number}", memory_mib=64, mem_mib=24, dirty=plan.dirty)
        with arena.guest(spec, plan.source) as guest:
            result = _Round(arena.made, plan, guest).run()
            result.judgement.problems += arena.complaints()
            if not result.good:
                arena.keep_evidence(keep(plan), guest, result.report())
        result.seconds = time.monotonic() - began
        results.append(result)
        tell(result)
        if not result.good:
            say(result.report())
            arena.discard()
    return results


class _Round:
    """One round under way: a timeline of things to do, the earliest first."""

    def __init__(self, made: LabCluster, plan: Plan, guest: ClusterGuest) -> None:
        self._made = made
        self._plan = plan
        self._guest = guest
        self._roles = Roles(made, guest.name, plan.source, next(name for name in made.hosts if name != plan.source))
        self._driver = made.coordinator if plan.mode == "managed" else made.agents[plan.source]
        self._migration_id = talk.new_id()
        self._targets: list[Target] = []
        self._timeline: list[tuple[float, int, Callable[[], object]]] = []
        self._order = itertools.count()
        self._result = Result(plan, Judgement())

    def run(self) -> Result:
        try:
            self._run()
        except (LabError, RuntimeError) as error:  # such as a daemon that does not come up again: judged, not raised
            self._result.judgement.problems.append(str(error))
        return self._result

    def _run(self) -> None:
        held = self._arm()
        with ThreadPoolExecutor(2) as pool:
            self._began = time.monotonic()
            asked = pool.submit(self._ask)
            if self._plan.cancel is not None:
                self._at(self._began + self._plan.cancel, lambda: pool.submit(self._cancel))
            first, *others = self._plan.faults
            self._at(self._began + (0 if held else first.at), lambda: self._strike(first, held, others))
            while self._timeline:
                due, _, act = heapq.heappop(self._timeline)
                time.sleep(max(0.0, due - time.monotonic()))
                act()
            restarted = mend(self._made, self._targets)
            self._result.refused = asked.result()
        for daemon in self._made.daemons():
            disarm(daemon)
        self._result.judgement = judge(self._made, self._case(), restarted, DEADLINE)

    def _case(self) -> Case:
        killed = [strike for strike, target in self._struck() if isinstance(target, QemuTarget) and target.hit]
        return Case(
            self._migration_id,
            self._guest,
            self._roles.source,
            self._roles.destination,
            self._driver,
            killed_qemu=frozenset(self._roles.host(strike.fault.target.split()[0]) for strike in killed),
            in_transfer=any(strike.sending for strike in killed),
            cancelled=self._plan.cancel is not None,
        )

    def _struck(self) -> list[tuple[Strike, Target]]:
        return list(zip(self._result.strikes, self._targets, strict=True))

    def _at(self, when: float, act: Callable[[], object]) -> None:
        heapq.heappush(self._timeline, (when, next(self._order), act))

    def _arm(self) -> Daemon | None:
        """The process that will be held at the first fault's failpoint, if it has one."""
        point = self._plan.faults[0].point
        daemon = ARMED_DAEMONS[point.partition(".")[0]](self._roles, self._plan.mode == "managed") if point else None
        if daemon is not None:
            arm(daemon, f"{point}=stop")
        self._made.wait_known()
        return daemon

    def _ask(self) -> str:
        """Once, as most programs do; while nothing is broken yet, until the hosts know each other again after `_arm`."""
        spec = pb.MigrationSpec(
            domain=self._guest.name,
            destination_host=self._roles.destination,
            bandwidth_bytes_per_second=self._plan.bandwidth,
        )
        return talk.start_until_accepted(self._driver, self._migration_id, spec, lambda: bool(self._result.strikes))

    def _cancel(self) -> None:
        with contextlib.suppress(talk.SilentError):
            talk.cancel(self._driver, self._migration_id)

    def _strike(self, fault: Fault, held: Daemon | None, others: list[Fault]) -> None:
        """Break it, see to its mending, and to the next fault."""
        if held is not None:
            with contextlib.suppress(LabError):
                wait_until(lambda: stopped(held), REACH_SECONDS, "the failpoint", interval=0.005)
                held.environment.pop(VARIABLE)  # it has fired, and does so only once
        target = TARGETS[fault.target](self._roles)
        found = states(self._made, self._migration_id)
        inflict(target, fault.action)
        now = time.monotonic()
        sending = found.get(Role.SOURCE) not in (None, SourceState.BEGINNING, SourceState.BEGUN, SourceState.KEPT)
        self._result.strikes.append(Strike(fault, phase_of(found), sending, now - self._began))
        self._targets.append(target)
        if held is not None and not (isinstance(target, DaemonTarget) and target.daemon is held):
            DaemonTarget(held).restore()
        self._at(now + fault.down, target.restore)
        for other in others:
            self._at(now + other.at, partial(self._strike, other, None, []))
