"""What can be broken in a cluster, how, and how it is mended: tables rather than branches."""

import contextlib
import signal
import sqlite3
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, Protocol

from agent.failpoints import VARIABLE
from agent.handshake.destination import DESTINATION, DestinationState
from agent.handshake.records import AttemptRecord, Role, decode
from agent.handshake.source import SOURCE, SourceState
from agent.progress import phase
from benchkit.processes import journal_of
from clusterkit import Daemon
from clusterkit.platforms import LabCluster
from labkit.errors import LabError
from labkit.hosts import Host, Node

MIGRATION_LINK: Final = "mig1"


@dataclass(frozen=True)
class Roles:
    """Who is who in one migration."""

    made: LabCluster
    guest: str
    source: str
    destination: str

    def host(self, side: str) -> str:
        """The name of the host that is "source" or "destination"."""
        return {"source": self.source, "destination": self.destination}[side]


class Target(Protocol):
    """Something that can be broken. `restore` mends whatever was done to it, and does nothing to what is well."""

    def restore(self) -> None: ...


class DaemonTarget:
    """An agent or the coordinator."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon

    def kill(self) -> None:
        self.daemon.kill()

    def stop(self) -> None:
        self.daemon.signal(signal.SIGSTOP)

    def restore(self) -> None:
        """Does not wait until it serves: it may need a libvirtd that is still dead."""
        if self.daemon.running().poll() is None:
            self.daemon.signal(signal.SIGCONT)
        else:
            self.daemon.environment.pop(VARIABLE, None)
            self.daemon.start(wait=False)


class LibvirtdTarget:
    """A libvirtd; guests go on without it."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def kill(self) -> None:
        self._host.kill_libvirtd()

    def stop(self) -> None:
        self._host.pause_libvirtd()

    def restore(self) -> None:
        if self._host.libvirtd_pid is None:
            self._host.start_libvirtd()
        else:
            self._host.resume_libvirtd()


class QemuTarget:
    """The QEMU of one guest on one host, if there is one."""

    def __init__(self, host: Host, guest: str) -> None:
        self._host = host
        self._guest = guest
        self.hit = False
        """There was one to be killed."""

    def kill(self) -> None:
        self.hit = any(qemu.guest == self._guest for qemu in self._host.qemu())
        self._host.signal_qemu(self._guest, signal.SIGKILL)

    def stop(self) -> None:
        self._host.signal_qemu(self._guest, signal.SIGSTOP)

    def restore(self) -> None:
        self._host.signal_qemu(self._guest, signal.SIGCONT)


class LinkTarget:
    """A node's connection to one network."""

    def __init__(self, node: Node, network: str) -> None:
        self._node = node
        self._network = network

    def cut_in(self) -> None:
        self._node.cut_link(self._network, "in")

    def cut_out(self) -> None:
        self._node.cut_link(self._network, "out")

    def cut(self) -> None:
        self._node.cut_link(self._network, "both")

    def reset(self) -> None:
        self._node.reset_link(self._network)

    def restore(self) -> None:
        self._node.restore_link(self._network)


def _agent(side: str, roles: Roles) -> Target:
    return DaemonTarget(roles.made.agents[roles.host(side)])


def _libvirtd(side: str, roles: Roles) -> Target:
    return LibvirtdTarget(roles.made.lab[roles.host(side)])


def _qemu(side: str, roles: Roles) -> Target:
    return QemuTarget(roles.made.lab[roles.host(side)], roles.guest)


def _management(side: str, roles: Roles) -> Target:
    return LinkTarget(roles.made.lab[roles.host(side)], "mgmt")


def _migration(side: str, roles: Roles) -> Target:
    return LinkTarget(roles.made.lab[roles.host(side)], MIGRATION_LINK)


_OF_A_HOST: Final[Mapping[str, Callable[[str, Roles], Target]]] = {
    "agent": _agent,
    "libvirtd": _libvirtd,
    "qemu": _qemu,
    "management link": _management,
    "migration link": _migration,
}

TARGETS: Final[Mapping[str, Callable[[Roles], Target]]] = {
    "coordinator": lambda roles: DaemonTarget(roles.made.coordinator),
    "coordinator management link": lambda roles: LinkTarget(roles.made.lab.coordinator, "mgmt"),
    **{f"{side} {what}": partial(make, side) for side in ("source", "destination") for what, make in _OF_A_HOST.items()},
}
"""By name, what it is in one migration."""

_LINK_ACTIONS: Final = ("cut", "cut in", "cut out", "reset")
_PROCESS_ACTIONS: Final = ("kill", "stop")

FAULTS: Final[tuple[tuple[str, str], ...]] = tuple(
    (action, target) for target in TARGETS for action in (_LINK_ACTIONS if target.endswith("link") else _PROCESS_ACTIONS)
)
"""Every (action, target)."""

ARMED_DAEMONS: Final[Mapping[str, Callable[[Roles, bool], Daemon]]] = {
    "source": lambda roles, managed: roles.made.agents[roles.source],
    "destination": lambda roles, managed: roles.made.agents[roles.destination],
    "driver": lambda roles, managed: roles.made.coordinator if managed else roles.made.agents[roles.source],
}
"""The process in which a failpoint fires, by the first word of its name."""


def inflict(target: Target, action: str) -> None:
    """Break it. What is already dead or gone cannot be broken again, and that is no error."""
    with contextlib.suppress(LabError, ProcessLookupError):
        getattr(target, action.replace(" ", "_"))()


# ---- failpoints


def arm(daemon: Daemon, points: str) -> None:
    """Start the daemon anew with failpoints switched on, such as "source.begin.reply=kill"."""
    daemon.kill()
    daemon.environment[VARIABLE] = points
    daemon.start()


def disarm(daemon: Daemon) -> None:
    """Start it anew without any, where one is still waiting to fire."""
    if daemon.environment.pop(VARIABLE, None) is not None and daemon.running().poll() is None:
        daemon.kill()
        daemon.start()


def stopped(daemon: Daemon) -> bool:
    """A failpoint (or a fault) has sent it SIGSTOP."""
    try:
        stat = Path(f"/proc/{daemon.running().pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] == "T"


# ---- what is under way


def states(made: LabCluster, migration_id: str) -> dict[Role, str]:
    """What the agents' journals say now, read from the files: an agent that is dead or stopped answers no question."""
    return {record.role: record.state for name in made.hosts for record in _journalled(journal_of(made, name), migration_id)}


def _journalled(path: Path, migration_id: str) -> list[AttemptRecord]:
    """Nothing where the journal cannot be read just now."""
    try:
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=0.2)) as journal:
            rows = journal.execute("SELECT body FROM attempts WHERE migration_id = ?", (migration_id,)).fetchall()
    except sqlite3.Error:
        return []
    return [decode(row[0]) for row in rows]


def phase_of(found: Mapping[Role, str]) -> str:
    """The phase under way, by what the journals say; "before" and "after" the migration."""
    source, destination = found.get(Role.SOURCE), found.get(Role.DESTINATION)
    if not found:
        return "before"
    if source in SOURCE.final and destination in DESTINATION.final:
        return "after"
    return phase(SourceState(source) if source else None, DestinationState(destination) if destination else None)


def mend(made: LabCluster, targets: list[Target]) -> float:
    """Restore all, then wait until everything serves. The time (`time.monotonic`) at which the last thing was restored."""
    for target in sorted(targets, key=lambda target: isinstance(target, DaemonTarget)):
        target.restore()
    restored = time.monotonic()
    for daemon in made.daemons():
        daemon.wait_serving()
    return restored
