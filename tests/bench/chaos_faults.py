"""Injects faults into a cluster during a migration: at failpoints, with the phase read from the journals; and repairs them."""

import contextlib
import sqlite3
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from agent.handshake.host.records import AttemptRecord, Role, decode
from agent.handshake.machines.destination import DESTINATION, DestinationState
from agent.handshake.machines.failpoints import VARIABLE
from agent.handshake.machines.source import SOURCE, SourceState
from agent.migration.progress import phase
from tests.bench.chaos_targets import DaemonTarget, DiskTarget, Roles, Target, clock_environment
from tests.bench.processes import journal_of
from tests.kit.cluster import Daemon
from tests.kit.cluster.platforms import LabCluster
from tests.kit.lab.errors import LabError

ARMED_DAEMONS: Final[Mapping[str, Callable[[Roles, bool], Daemon]]] = {
    "source": lambda roles, managed: roles.made.agents[roles.source],
    "destination": lambda roles, managed: roles.made.agents[roles.destination],
    "driver": lambda roles, managed: roles.made.coordinator if managed else roles.made.agents[roles.source],
}
"""The process in which a failpoint fires, by the first word of its name."""


def inflict(target: Target, action: str) -> None:
    """Inject the fault. A target that is already dead or gone is no error."""
    with contextlib.suppress(LabError, ProcessLookupError):
        getattr(target, action.replace(" ", "_"))()


# ---- failpoints


def arm(daemon: Daemon, points: str = "", *, clock: bool = False) -> None:
    """Restart the daemon with failpoints switched on, such as "source.begin.reply=kill", or with a clock that can be stepped."""
    daemon.kill()
    if points:
        daemon.environment[VARIABLE] = points
    if clock:
        daemon.environment.update(clock_environment(daemon))
    daemon.start()


def disarm(daemon: Daemon) -> bool:
    """Restart the daemon without failpoints and stepped clock, if it runs with any. Return whether it had any."""
    armed = bool(daemon.environment)
    daemon.environment.clear()
    if armed and daemon.running().poll() is None:
        daemon.kill()
        daemon.start()
    return armed


def stopped(daemon: Daemon) -> bool:
    """Return whether the daemon is stopped (SIGSTOP), by a failpoint or a fault."""
    try:
        stat = Path(f"/proc/{daemon.running().pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] == "T"


# ---- state of the migration


def states(made: LabCluster, migration_id: str) -> dict[Role, str]:
    """Return the states in the agents' journals, read from the files, as a dead or stopped agent does not answer."""
    return {record.role: record.state for name in made.hosts for record in _journalled(journal_of(made, name), migration_id)}


def _journalled(path: Path, migration_id: str) -> list[AttemptRecord]:
    """Return the records of the migration; none if the journal cannot be read at this moment."""
    try:
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=0.2)) as journal:
            rows = journal.execute("SELECT body FROM attempts WHERE migration_id = ?", (migration_id,)).fetchall()
    except sqlite3.Error:
        return []
    return [decode(row[0]) for row in rows]


def phase_of(found: Mapping[Role, str]) -> str:
    """Return the present phase, by the states in the journals; "before" or "after" if the migration has not started or has ended."""
    source, destination = found.get(Role.SOURCE), found.get(Role.DESTINATION)
    if not found:
        return "before"
    if source in SOURCE.final and destination in DESTINATION.final:
        return "after"
    return phase(SourceState(source) if source else None, DestinationState(destination) if destination else None)


def mend(made: LabCluster, targets: list[Target]) -> float:
    """Restore all targets, then wait until every daemon serves. Return when the last target was restored (`time.monotonic`)."""
    for target in sorted(targets, key=lambda target: isinstance(target, DaemonTarget)):
        target.restore()
    if any(isinstance(target, DiskTarget) for target in targets):  # a daemon that was started on a full disk has ended
        for daemon in made.daemons():
            DaemonTarget(daemon).restore()
    restored = time.monotonic()
    for daemon in made.daemons():
        daemon.wait_serving()
    return restored
