"""The targets of faults in a cluster, with their actions and their repair, as tables."""

import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, Protocol

from agent.handshake.machines.failpoints import VARIABLE
from tests.kit.cluster import Daemon
from tests.kit.cluster.platforms import LabCluster
from tests.kit.lab.disks import Disk
from tests.kit.lab.errors import LabError
from tests.kit.lab.hosts import Host, Node, Qemu

MIGRATION_LINK: Final = "mig1"


@dataclass(frozen=True)
class Roles:
    """The hosts of one migration by role."""

    made: LabCluster
    guest: str
    source: str
    destination: str

    @property
    def third(self) -> str:
        """A host that has no part in the migration."""
        return next(name for name in self.made.hosts if name not in (self.source, self.destination))

    def host(self, side: str) -> str:
        """Return the name of the host that is "source" or "destination"."""
        return {"source": self.source, "destination": self.destination}[side]

    def daemon(self, side: str) -> Daemon:
        """Return the agent of the "source" or the "destination", or the "coordinator"."""
        return self.made.coordinator if side == "coordinator" else self.made.agents[self.host(side)]


class Target(Protocol):
    """A target of faults. `restore` repairs any of its faults, and does nothing without one."""

    def restore(self) -> None: ...


class DaemonTarget:
    """An agent or the coordinator."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self._ends = False

    def kill(self) -> None:
        self.daemon.kill()

    def stop(self) -> None:
        self.daemon.signal(signal.SIGSTOP)

    def end(self) -> None:
        """Tell it to end, as an upgrade would; `restore` waits for that."""
        self._ends = True
        self.daemon.signal(signal.SIGTERM)

    def restore(self) -> None:
        """Continue or start it, without waiting until it serves: it may need a libvirtd that is still dead."""
        if self._ends:
            self._ends = False
            self.daemon.stop()
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
        """A QEMU was there and was killed."""
        self._doomed: list[Qemu] = []

    def kill(self) -> None:
        self.hit = any(qemu.guest == self._guest for qemu in self._host.qemu())
        self._host.signal_qemu(self._guest, signal.SIGKILL)

    def stop(self) -> None:
        self._host.signal_qemu(self._guest, signal.SIGSTOP)

    def stop_then_kill(self) -> None:
        """Stop it; `restore` kills it instead of continuing it."""
        self._doomed = [qemu for qemu in self._host.qemu() if qemu.guest == self._guest]
        self.stop()

    def restore(self) -> None:
        for qemu in self._doomed:
            self.hit = self._host.kill_qemu(qemu) or self.hit
        self._doomed = []
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


class DiskTarget:
    """A disk of a node."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk

    def fill(self) -> None:
        self._disk.fill()

    def restore(self) -> None:
        self._disk.free()


class ClockTarget:
    """The wall clock of one daemon, which was started with `clock_environment`; its monotonic clock is not changed."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self._file = clock_file(daemon)

    def step_forward(self) -> None:
        self._file.write_text(f"+{CLOCK_STEP}\n")

    def step_back(self) -> None:
        self._file.write_text(f"-{CLOCK_STEP}\n")

    def restore(self) -> None:
        """Step it back to the true time."""
        self._file.write_text("+0\n")


CLOCK_STEP: Final = 3600
"""Seconds."""
LIBFAKETIME: Final = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")


def clock_file(daemon: Daemon) -> Path:
    """Return the file with the offset of the daemon's wall clock, in seconds."""
    return daemon.folder / f"{daemon.name}.clock"


def clock_environment(daemon: Daemon) -> dict[str, str]:
    """Return environment variables with which a `ClockTarget` can step the daemon's clock while it runs."""
    if not LIBFAKETIME.exists():
        raise LabError(f"a daemon's clock cannot be stepped: there is no {LIBFAKETIME}; install libfaketime")
    clock_file(daemon).write_text("+0\n")
    return {
        "LD_PRELOAD": str(LIBFAKETIME),
        "FAKETIME_TIMESTAMP_FILE": str(clock_file(daemon)),
        "FAKETIME_CACHE_DURATION": "1",  # seconds between two readings of the file, instead of one at each use of the clock
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }


def clear_clocks() -> None:
    """Remove the files that libfaketime leaves in shared memory for killed processes."""
    for left in Path("/dev/shm").glob("*faketime_*"):
        if not Path("/proc", left.name.rpartition("_")[2]).exists():
            left.unlink(missing_ok=True)


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


def _disk(kind: str, side: str, roles: Roles) -> Target:
    return DiskTarget(roles.made.lab[roles.host(side)].disks[kind])


def _clock(side: str, roles: Roles) -> Target:
    return ClockTarget(roles.daemon(side))


_OF_A_HOST: Final[Mapping[str, Callable[[str, Roles], Target]]] = {
    "agent": _agent,
    "libvirtd": _libvirtd,
    "qemu": _qemu,
    "management link": _management,
    "migration link": _migration,
    "journal disk": partial(_disk, "journal"),
    "libvirt disk": partial(_disk, "libvirt"),
    "clock": _clock,
}

TARGETS: Final[Mapping[str, Callable[[Roles], Target]]] = {
    "coordinator": lambda roles: DaemonTarget(roles.made.coordinator),
    "coordinator management link": lambda roles: LinkTarget(roles.made.lab.coordinator, "mgmt"),
    "coordinator journal disk": lambda roles: DiskTarget(roles.made.lab.coordinator.disks["journal"]),
    "coordinator clock": partial(_clock, "coordinator"),
    **{f"{side} {what}": partial(make, side) for side in ("source", "destination") for what, make in _OF_A_HOST.items()},
}
"""Target name -> function that returns the target in one migration."""

_ACTIONS: Final[Mapping[str, tuple[str, ...]]] = {
    "link": ("cut", "cut in", "cut out", "reset"),
    "disk": ("fill",),
    "clock": ("step forward", "step back"),
    "qemu": ("kill", "stop", "stop then kill"),
}
"""Actions by the last word of the target's name; all other targets are processes."""
_PROCESS_ACTIONS: Final = ("kill", "stop")

FAULTS: Final[tuple[tuple[str, str], ...]] = tuple(
    (action, target) for target in TARGETS for action in _ACTIONS.get(target.split()[-1], _PROCESS_ACTIONS)
)
"""Every (action, target)."""
