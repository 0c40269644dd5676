"""`scripts/bench chaos`: migrates real guests while faults are injected: kills, stops, cut and reset links, full disks, clock
steps.
"""

import contextlib
import heapq
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

from agent.handshake.host.records import Role
from agent.handshake.machines.failpoints import VARIABLE
from agent.handshake.machines.source import SourceState
from drover.agent.v1 import migration_pb2 as pb
from tests.bench import chaos_talk as talk
from tests.bench.chaos_arena import Arena
from tests.bench.chaos_faults import ARMED_DAEMONS, arm, disarm, inflict, mend, phase_of, states, stopped
from tests.bench.chaos_judge import Asked, Case, Judgement, judge
from tests.bench.chaos_plan import HOSTS, Fault, Plan, Rival
from tests.bench.chaos_targets import TARGETS, ClockTarget, DaemonTarget, QemuTarget, Roles, Target
from tests.bench.output import say
from tests.kit.cluster import ClusterGuest, Daemon, GuestSpec
from tests.kit.cluster.platforms import LabCluster
from tests.kit.lab.errors import LabError
from tests.kit.lab.processes import wait_until

DEADLINE: Final = 45.0
"""Seconds from the repair of the last fault to the end. Long, because the time is measured, not required."""
REACH_SECONDS: Final = 3.0
"""Longest wait for a failpoint; the fault strikes then anyway."""

DISK_MIB: Final = 16
"""Size of each small disk: four times a journal with its write-ahead log."""


@dataclass(frozen=True)
class Strike:
    """A fault as it was injected."""

    fault: Fault
    phase: str
    """The phase at that moment."""
    sending: bool
    """The source had started to send."""
    after: float
    """Seconds after the request."""


@dataclass
class Result:
    """The result of a round."""

    plan: Plan
    judgement: Judgement
    strikes: list[Strike] = field(default_factory=list)
    refused: str = ""
    """Why the migration was not accepted; empty if it was."""
    seconds: float = 0.0
    """Duration of the whole round."""

    @property
    def good(self) -> bool:
        return self.judgement.good

    @property
    def outcome(self) -> str:
        return self.judgement.outcome if self.good else "BAD"

    def report(self) -> str:
        """Return the plan, the outcome and the strikes as text."""
        lines = [str(self.plan), f"outcome: {self.outcome} after {self.judgement.seconds:.1f} s, {self.judgement}"]
        lines += [f"struck: {s.fault.name} in phase {s.phase}, {s.after:.3f} s after the request" for s in self.strikes]
        return "\n".join([*lines, f"refused: {self.refused}"] if self.refused else lines)


P = TypeVar("P")
R = TypeVar("R")

Keep = Callable[[Plan], Path]
"""Returns the folder for the evidence of a bad round."""
Tell = Callable[[Result], None]


def run(arenas: Sequence[Arena], plans: Iterable[Plan], keep: Keep, tell: Tell) -> list[Result]:
    """Run all rounds, as `in_arenas`."""
    return in_arenas(arenas, plans, lambda arena, plan: _round(arena, plan, keep, tell))


def in_arenas(arenas: Sequence[Arena], plans: Iterable[P], play: Callable[[Arena, P], R]) -> list[R]:
    """Run a round for each plan, in each arena one after the other. Return the results in the order of the plans."""
    waiting = enumerate(plans)
    lock = threading.Lock()

    def work(arena: Arena) -> list[tuple[int, R]]:
        done: list[tuple[int, R]] = []
        while True:
            with lock:
                number, plan = next(waiting, (0, None))
            if plan is None:
                return done
            done.append((number, play(arena, plan)))

    with ThreadPoolExecutor(len(arenas)) as pool:
        results = itertools.chain.from_iterable(pool.map(work, arenas))
        return [result for _, result in sorted(results, key=lambda done: done[0])]


def new_arena(lab_id: str) -> Arena:
    """Return an arena with three hosts and disks small enough to be filled."""
    return Arena(lab_id, hosts=len(HOSTS), disk_mib=DISK_MIB)


def _round(arena: Arena, plan: Plan, keep: Keep, tell: Tell) -> Result:
    """Run one round; after a bad one the arena gets a fresh cluster."""
    began = time.monotonic()
    spec = GuestSpec(f"chaos{plan.number}", memory_mib=64, mem_mib=24, dirty=plan.dirty)
    with arena.guest(spec, plan.source) as guest:
        result = _Round(arena.made, plan, guest).run()
        result.judgement.problems += arena.complaints()
        if not result.good:
            arena.keep_evidence(keep(plan), [guest], result.report())
    result.seconds = time.monotonic() - began
    tell(result)
    if not result.good:
        say(result.report())
        arena.discard()
    return result


class Timeline:
    """Actions at moments, which may add others."""

    def __init__(self) -> None:
        self._actions: list[tuple[float, int, Callable[[], object]]] = []
        self._order = itertools.count()

    def at(self, when: float, act: Callable[[], object]) -> None:
        """Add an action. `when`: by `time.monotonic`."""
        heapq.heappush(self._actions, (when, next(self._order), act))

    def run(self) -> None:
        """Do all actions, the earliest first."""
        while self._actions:
            due, _, act = heapq.heappop(self._actions)
            time.sleep(max(0.0, due - time.monotonic()))
            act()


class _Round:
    """One round under way."""

    def __init__(self, made: LabCluster, plan: Plan, guest: ClusterGuest) -> None:
        self._made = made
        self._plan = plan
        self._guest = guest
        self._roles = Roles(made, guest.name, plan.source, plan.destination)
        drivers = [made.coordinator, made.agents[plan.source]]
        self._driver, self._other_driver = drivers if plan.mode == "managed" else drivers[::-1]
        self._migration_id = talk.new_id()
        self._rivals = (self._rival(plan.rival),) if plan.rival else ()
        self._targets: list[Target] = []
        self._timeline = Timeline()
        self._result = Result(plan, Judgement())

    def run(self) -> Result:
        try:
            self._run()
        except (LabError, RuntimeError) as error:  # such as a daemon that does not start again: a bad round
            self._result.judgement.problems.append(str(error))
        return self._result

    def _run(self) -> None:
        held = self._arm()
        with ThreadPoolExecutor(3) as pool:
            self._began = time.monotonic()
            asked = pool.submit(self._ask)
            if self._plan.rival is not None:
                self._timeline.at(self._began + self._plan.rival.at, lambda: pool.submit(self._ask_rivals))
            if self._plan.cancel is not None:
                self._timeline.at(self._began + self._plan.cancel, lambda: pool.submit(self._cancel))
            first, *others = self._plan.faults
            self._timeline.at(self._began + (0 if held else first.at), lambda: self._strike(first, held, others))
            self._timeline.run()
            restarted = mend(self._made, self._targets)
            self._result.refused = asked.result()
        for daemon in self._made.daemons():
            if disarm(daemon):
                restarted = time.monotonic()
        self._result.judgement = judge(self._made, self._case(), restarted, DEADLINE)

    def _case(self) -> Case:
        killed = [strike for strike, target in self._struck() if isinstance(target, QemuTarget) and target.hit]
        return Case(
            Asked(self._migration_id, self._driver, self._roles.destination),
            self._guest,
            self._roles.source,
            self._rivals,
            killed_qemu=frozenset(self._roles.host(strike.fault.target.split()[0]) for strike in killed),
            in_transfer=any(strike.sending for strike in killed if strike.fault.target.startswith("source")),
            cancelled=self._plan.cancel is not None,
        )

    def _struck(self) -> list[tuple[Strike, Target]]:
        return list(zip(self._result.strikes, self._targets, strict=True))

    def _arm(self) -> Daemon | None:
        """Prepare the daemons for the faults; return the one that will be held at the first fault's failpoint, if there is one."""
        for fault in self._plan.faults:
            target = TARGETS[fault.target](self._roles)
            if isinstance(target, ClockTarget):
                arm(target.daemon, clock=True)
        point = self._plan.faults[0].point
        daemon = ARMED_DAEMONS[point.partition(".")[0]](self._roles, self._plan.mode == "managed") if point else None
        if daemon is not None:
            arm(daemon, f"{point}=stop")
        self._made.wait_known()
        return daemon

    def _ask(self) -> str:
        """Ask for the migration. Repeats it only until the first fault, as hosts may not know each other yet after `_arm`."""
        spec = self._spec(self._roles.destination)
        return talk.start_until_accepted(self._driver, self._migration_id, spec, lambda: bool(self._result.strikes))

    def _spec(self, destination: str) -> pb.MigrationSpec:
        return pb.MigrationSpec(
            domain=self._guest.name, destination_host=destination, bandwidth_bytes_per_second=self._plan.bandwidth
        )

    def _rival(self, rival: Rival) -> Asked:
        destination = self._roles.third if rival.third else self._roles.destination
        if rival.same_id:
            return Asked(self._migration_id, self._other_driver, destination)
        return Asked(talk.new_id(), self._driver, destination)

    def _ask_rivals(self) -> None:
        """Ask for the rivals' migrations once; a refusal may be right."""
        for rival in self._rivals:
            with contextlib.suppress(talk.SilentError):
                talk.start(rival.driver, rival.migration_id, self._spec(rival.destination))

    def _cancel(self) -> None:
        with contextlib.suppress(talk.SilentError):
            talk.cancel(self._driver, self._migration_id)

    def _strike(self, fault: Fault, held: Daemon | None, others: list[Fault]) -> None:
        """Inject the fault; schedule its repair and the next fault."""
        if held is not None:
            with contextlib.suppress(LabError):
                wait_until(lambda: stopped(held), REACH_SECONDS, "the failpoint", interval=0.005)
                held.environment.pop(VARIABLE)  # it has fired, which it does only once
        target = TARGETS[fault.target](self._roles)
        found = states(self._made, self._migration_id)
        inflict(target, fault.action)
        now = time.monotonic()
        sending = found.get(Role.SOURCE) not in (None, SourceState.BEGINNING, SourceState.BEGUN, SourceState.KEPT)
        self._result.strikes.append(Strike(fault, phase_of(found), sending, now - self._began))
        self._targets.append(target)
        if held is not None and not (isinstance(target, DaemonTarget) and target.daemon is held):
            DaemonTarget(held).restore()
        self._timeline.at(now + fault.down, target.restore)
        for other in others:
            self._timeline.at(now + other.at, partial(self._strike, other, None, []))
