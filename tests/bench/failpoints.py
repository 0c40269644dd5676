"""`scripts/bench failpoints`: kills each process at each of its failpoints; the migration under way must end without help.

One row: switch the failpoint on (with a restart), ask for a migration, wait until the process is dead, start it again without
the failpoint, and let the judge wait for the end. The table marks a row whose failpoint was not reached.
"""

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from agent.handshake.host.records import Role
from agent.handshake.machines.failpoints import VARIABLE
from drover.agent.v1 import migration_pb2 as pb
from drover.agent.v1 import options_pb2
from tests.bench import chaos_talk as talk
from tests.bench.chaos_arena import Arena
from tests.bench.chaos_faults import ARMED_DAEMONS, arm, disarm, states, stopped
from tests.bench.chaos_judge import Asked, Case, Judgement, judge
from tests.bench.chaos_targets import DaemonTarget, LibvirtdTarget, QemuTarget, Roles, Target
from tests.bench.failpoints_cases import P2P, FailpointCase, First
from tests.bench.output import say
from tests.kit.cluster import ClusterGuest, Daemon, GuestSpec
from tests.kit.lab.errors import LabError
from tests.kit.lab.processes import wait_until

DEADLINE: Final = 15.0
"""Longest time in seconds from the restart to the end, by the requirement."""
REACH_SECONDS: Final = 12.0
"""Longest wait for a failpoint, beyond the waits of the scenario itself."""
TRIES: Final = 3
"""Tries for a row whose failpoint is not reached: a failpoint may be on only one of two racing ways to learn the same fact."""
SETTLE_SECONDS: Final = 0.5
"""Time after the migration's end in which a failpoint may still be reached, such as at the last effect of an agent."""
TAKEN_PORT: Final = 49152
LISTEN: Final = (
    "import socket, sys, time; s = socket.create_server((sys.argv[1], int(sys.argv[2]))); print(flush=True); time.sleep(60)"
)


@dataclass(frozen=True)
class Row:
    """The result of one case."""

    case: FailpointCase
    reached: bool
    judgement: Judgement

    @property
    def good(self) -> bool:
        return self.judgement.good

    @property
    def verdict(self) -> str:
        return "good" if self.good else "; ".join(self.judgement.problems)


def run(arena: Arena, cases: Iterable[FailpointCase], evidence: Path, tell: Callable[[Row], None]) -> list[Row]:
    """Run one case after the other; after a bad one on a fresh cluster."""
    rows = []
    for number, case in enumerate(cases):
        source = ("h1", "h2")[number % 2]
        for _ in range(TRIES):
            row = _try(arena, case, source, evidence)
            if row.reached or not row.good:
                break
        rows.append(row)
        tell(row)
        if not row.good:
            arena.discard()
    return rows


def _try(arena: Arena, case: FailpointCase, source: str, evidence: Path) -> Row:
    spec = GuestSpec(arena.new_name("fp"), memory_mib=64, mem_mib=24, dirty=100)
    with arena.guest(spec, source) as guest:
        row = _Trial(arena, case, guest, source).run()
        if not row.good:
            folder = evidence / f"{case.mode}-{case.point}"
            arena.keep_evidence(folder, [guest], f"{case}\n{row.judgement}")
            say(f"evidence: {folder}; repeat with: scripts/bench failpoints --only '{case.name}'")
    return row


class _Trial:
    """One case under way."""

    def __init__(self, arena: Arena, case: FailpointCase, guest: ClusterGuest, source: str) -> None:
        self._arena = arena
        self._made = arena.made
        self._case = case
        self._guest = guest
        destination = next(name for name in self._made.hosts if name != source)
        self._roles = Roles(self._made, guest.name, source, destination)
        self._migration_id = talk.new_id()
        self._driver = self._daemon("driver")
        self._subject = self._made.agents[source] if case.process == "source agent" else self._daemon(case.point)
        self._broken: list[Target] = []
        self._killed_qemu: frozenset[str] = frozenset()

    def _daemon(self, point: str) -> Daemon:
        return ARMED_DAEMONS[point.partition(".")[0]](self._roles, self._case.mode != P2P)

    def run(self) -> Row:
        first = self._case.scenario.first
        self._arm(first)
        with ThreadPoolExecutor(1) as pool, self._port_taken():
            asked = pool.submit(self._ask)
            if first is not None:
                self._let_first_happen(first)
            self._act()
            reached = self._wait_for_subject(asked)
        restarted = self._all_well()
        case = Case(
            Asked(self._migration_id, self._driver, self._roles.destination),
            self._guest,
            self._roles.source,
            killed_qemu=self._killed_qemu,
            cancelled=self._case.scenario.cancel,
            goes_back=self._case.scenario.goes_back,
            arrives_paused=self._case.scenario.paused,
        )
        judgement = judge(self._made, case, restarted, DEADLINE)
        if not self._case.scenario.lie:  # a false claim that does not fit is rightly logged as critical
            judgement.problems += self._arena.complaints()
        return Row(self._case, reached, judgement)

    # ---- before

    def _arm(self, first: First | None) -> None:
        """Switch both failpoints on; a process that dies at the first one gets the second one at its restart."""
        points: dict[str, list[str]] = {self._subject.name: [f"{self._case.point}=kill"]}
        if first is not None:
            name = self._daemon(first.point).name
            others = points.get(name, []) if first.action == "stop" else []
            points[name] = [f"{first.point}={first.action}", *others]
        for daemon in self._made.daemons():
            if daemon.name in points:
                arm(daemon, ",".join(points[daemon.name]))
        self._made.wait_known()

    def _ask(self) -> None:
        scenario = self._case.scenario
        spec = pb.MigrationSpec(
            domain=self._guest.name,
            destination_host=self._roles.destination,
            bandwidth_bytes_per_second=scenario.bandwidth,
            options=options_pb2.Options(paused=True) if scenario.paused else None,
            uri=f"tcp://{self._address}:{TAKEN_PORT}" if scenario.uri else "",
        )
        # It may be refused at first, while a channel has not reconnected to a process that was just restarted.
        talk.start_until_accepted(self._driver, self._migration_id, spec, lambda: _dead(self._subject) or _dead(self._driver))

    @property
    def _address(self) -> str:
        return self._made.lab[self._roles.destination].addresses["mig1"]

    @contextlib.contextmanager
    def _port_taken(self) -> Iterator[None]:
        """Let another program listen on the port, if the scenario says so."""
        if not self._case.scenario.uri:
            yield
            return
        other = self._made.lab[self._roles.destination].popen(
            [sys.executable, "-c", LISTEN, self._address, str(TAKEN_PORT)], stdout=subprocess.PIPE
        )
        try:
            with other.stdout or contextlib.nullcontext() as output:
                assert output is not None, "made with a pipe"
                output.readline()
                yield
        finally:
            other.kill()
            other.wait(10)

    # ---- meanwhile

    def _let_first_happen(self, first: First) -> None:
        """Wait for the first failpoint, keep its process down for `first.down` seconds, and restart it, with its second failpoint if
        any.
        """
        daemon = self._daemon(first.point)
        if self._case.scenario.cancel:
            self._cancel()
        if self._case.scenario.lie:
            self._lie()
        first_reached = _within(REACH_SECONDS, lambda: _dead(daemon) or stopped(daemon))
        if first_reached:
            time.sleep(first.before_hand)
            self._by_hand()
        _within(first.down, lambda: daemon is not self._subject and _dead(self._subject))
        if first.action == "kill" and daemon is self._subject:
            daemon.kill()
            daemon.environment[VARIABLE] = f"{self._case.point}=kill"
            daemon.start(wait=False)
        else:
            if daemon is not self._subject:
                daemon.environment.pop(VARIABLE, None)  # it has fired, which it does only once
            DaemonTarget(daemon).restore()

    def _act(self) -> None:
        scenario = self._case.scenario
        if scenario.cancel and scenario.first is None:
            self._cancel()
        if scenario.by_hand and scenario.first is None:
            self._wait_for_perform()
            self._by_hand()

    def _cancel(self) -> None:
        self._wait_for_perform()
        with contextlib.suppress(talk.SilentError):
            talk.cancel(self._driver, self._migration_id)

    def _lie(self) -> None:
        self._wait_for_perform()
        with contextlib.suppress(talk.SilentError):
            talk.abandon(self._made.agents[self._roles.destination], self._migration_id, source_kept=True)

    def _wait_for_perform(self) -> None:
        """Wait until the memory flows and the copy is armed, or the process is dead."""
        wanted = {Role.SOURCE: "performing", Role.DESTINATION: "armed"}
        _within(5, lambda: _dead(self._subject) or states(self._made, self._migration_id) == wanted)
        time.sleep(0.3)

    def _by_hand(self) -> None:
        if self._case.scenario.by_hand:
            BY_HAND[self._case.scenario.by_hand](self)

    def abandon(self) -> None:
        with contextlib.suppress(talk.SilentError):
            talk.abandon(self._made.agents[self._roles.destination], self._migration_id)

    def kill_libvirtd(self, host: str) -> None:
        libvirtd = LibvirtdTarget(self._made.lab[host])
        libvirtd.kill()
        self._broken.append(libvirtd)

    def kill_source_libvirtd(self) -> None:
        self.kill_libvirtd(self._roles.source)

    def restart_destination_libvirtd(self) -> None:
        """Restart it: the new libvirtd destroys the waiting copy, which breaks the stream."""
        libvirtd = LibvirtdTarget(self._made.lab[self._roles.destination])
        libvirtd.kill()
        libvirtd.restore()

    def kill_destination_agent(self) -> None:
        self._made.agents[self._roles.destination].kill()

    def cancel_and_kill_destination_agent(self) -> None:
        with contextlib.suppress(talk.SilentError):
            talk.cancel(self._driver, self._migration_id)
        self.kill_destination_agent()

    def kill_source_qemu(self) -> None:
        QemuTarget(self._made.lab[self._roles.source], self._guest.name).kill()
        self._killed_qemu = frozenset({self._roles.source})

    def declare_destination_dead(self) -> None:
        """Kill the guest's QEMU at the destination as well, as if the whole host were dead, then state that the host is dead."""
        self._made.lab[self._roles.destination].signal_qemu(self._guest.name, signal.SIGKILL)

        def declared() -> bool:
            with contextlib.suppress(talk.SilentError):
                talk.declare_dead(self._driver, self._migration_id, self._roles.destination)
            return states(self._made, self._migration_id).get(Role.SOURCE) == "kept"

        _within(REACH_SECONDS, declared)

    def _wait_for_subject(self, asked: "Future[None]") -> bool:
        """Wait for the process to die; return whether it did. Gives up soon after the migration has ended or was refused."""
        end = time.monotonic() + REACH_SECONDS
        while time.monotonic() < end:
            if _dead(self._subject):
                return True
            if asked.done() and self._ended():
                return _within(self._settle_seconds, lambda: _dead(self._subject))
            time.sleep(0.02)
        return _dead(self._subject)

    @property
    def _settle_seconds(self) -> float:
        """Longer for a host that was declared dead: it asks its source when it is back, long after the migration's end."""
        return REACH_SECONDS if self._case.scenario.goes_back else SETTLE_SECONDS

    def _ended(self) -> bool:
        try:
            found = talk.migration(self._driver, self._migration_id)
        except talk.SilentError:
            return False
        return found is None or found.state in talk.FINAL

    def _all_well(self) -> float:
        """Start everything that is dead, without failpoints; return when (`time.monotonic`)."""
        for target in self._broken:
            target.restore()
        restarted = time.monotonic()
        for daemon in self._made.daemons():
            DaemonTarget(daemon).restore()
        for daemon in self._made.daemons():
            daemon.wait_serving()
            disarm(daemon)
        if self._case.scenario.paused:
            self._let_it_run()
        return restarted

    def _let_it_run(self) -> None:
        """Resume a guest that has arrived paused, as its user would."""
        arrived = {Role.DESTINATION: "running"}
        _within(5, lambda: states(self._made, self._migration_id).items() >= arrived.items())
        with contextlib.suppress(LabError):
            self._made.lab[self._roles.destination].virsh("resume", self._guest.name)


BY_HAND: Final[Mapping[str, Callable[[_Trial], None]]] = {
    "abandon at the destination": _Trial.abandon,
    "kill source libvirtd": _Trial.kill_source_libvirtd,
    "declare the destination dead": _Trial.declare_destination_dead,
    "kill the destination's agent": _Trial.kill_destination_agent,
    "cancel, and kill the destination's agent": _Trial.cancel_and_kill_destination_agent,
    "kill the source's QEMU": _Trial.kill_source_qemu,
    "restart the destination's libvirtd": _Trial.restart_destination_libvirtd,
}


def _dead(daemon: Daemon) -> bool:
    return daemon.running().poll() is not None


def _within(seconds: float, condition: Callable[[], bool]) -> bool:
    try:
        wait_until(condition, seconds, "")
    except LabError:
        return False
    return True
