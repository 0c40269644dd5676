"""What a cluster is to those who use it, whichever hypervisor its hosts have."""

import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from drover.coordinator.v1 import host_pb2, host_pb2_grpc
from tests.kit.cluster.daemon import DROVER, Daemon
from tests.kit.lab.guestlog import Verdict, judge_file
from tests.kit.lab.processes import wait_until


@dataclass(frozen=True)
class GuestSpec:
    """A guest that a cluster can start. Sizes in MiB, `dirty` in pages (4 KiB) per second."""

    name: str
    memory_mib: int = 64
    dirty: int = 200
    machine: str | None = None
    """None: one that every host knows."""
    cpu: str = "qemu64"
    persistent: bool = True
    autostart: bool = False
    running: bool = True
    halted: bool = False
    """Stopped behind libvirt's back, by QEMU's own monitor, once it runs."""
    mem_mib: int | None = None
    """Of its memory so much is filled (the rest stays zero); None: all. Real hosts only."""
    ticks: int = 100
    """Lines of its log per second: a gap is seen to one tick. Real hosts only."""


@dataclass(frozen=True)
class ClusterGuest:
    """A guest that was started."""

    spec: GuestSpec
    uuid: str
    serial_log: Path

    @property
    def name(self) -> str:
        return self.spec.name

    def judge(self) -> Verdict:
        """What its own serial log proves."""
        return judge_file(self.serial_log)

    def lines(self) -> int:
        return self.serial_log.read_bytes().count(b"\n") if self.serial_log.exists() else 0

    def wait_lines(self, more: int, timeout: float = 60.0) -> None:
        """Until it has written so many lines more: it runs."""
        start = self.lines()
        wait_until(lambda: self.lines() >= start + more, timeout, f"{more} lines more from guest {self.name}")


class Cluster(ABC):
    """Hosts ``h1``, ``h2``, … each with an agent, and a coordinator ``co``."""

    kind: str

    def __init__(self, path: Path, hosts: Sequence[str], guests: Iterable[GuestSpec], settings: Mapping[str, Any]) -> None:
        self.path = path
        self.hosts = tuple(hosts)
        self.specs = {spec.name: spec for spec in guests}
        self.settings = settings
        self.guests: dict[str, ClusterGuest] = {}
        self.agents: dict[str, Daemon] = {}
        self.coordinator: Daemon

    # ---- life

    def start(self) -> None:
        """Start every daemon at once, then wait until all serve and every host is known."""
        for daemon in self.daemons():
            daemon.start(wait=False)
        for daemon in self.daemons():
            daemon.wait_serving()
        self.wait_known()

    def wait_known(self, timeout: float = 60.0) -> None:
        """Until the coordinator says that every agent answers."""
        wait_until(lambda: self.hosts_up() == sorted(self.hosts), timeout, "every host to be known to the coordinator")

    def hosts_up(self) -> list[str]:
        with grpc.insecure_channel(self.server) as channel:
            response = host_pb2_grpc.HostServiceStub(channel).ListHosts(host_pb2.ListHostsRequest(), timeout=10)
        return [entry.host.name for entry in response.hosts if entry.state == host_pb2.HOST_STATE_UP]

    def daemons(self) -> list[Daemon]:
        return [self.coordinator, *self.agents.values()]

    def stop(self) -> None:
        for daemon in self.daemons():
            if daemon.process is not None and daemon.process.poll() is None:
                daemon.kill()

    @abstractmethod
    def start_guest(self, name: str, host: str = "h1") -> ClusterGuest:
        """Start a guest of `specs` and wait until it runs."""

    def guest(self, name: str) -> ClusterGuest:
        """The guest of that name, which is started unless it was."""
        return self.guests.get(name) or self.start_guest(name)

    def end_guests(self) -> None:
        """End every guest that was started, and forget it: on every host, whatever it is called there by now, with its log."""
        for guest in self.guests.values():
            self._end(guest)
            for path in (guest.serial_log, guest.serial_log.with_suffix(".stamps")):
                path.unlink(missing_ok=True)
        self.guests.clear()

    @abstractmethod
    def _end(self, guest: ClusterGuest) -> None:
        """Destroy and undefine it on every host that has it, by its UUID."""

    @abstractmethod
    def save(self, guest: ClusterGuest, host: str) -> None:
        """Have a host save the memory of a guest that runs there, for its next start there, and end it."""

    def running_on(self, guest: str) -> list[str]:
        """The hosts whose hypervisor says that the guest runs there."""
        return [host for host, state in self.copies(guest).items() if state == "running"]

    @abstractmethod
    def copies(self, guest: str) -> dict[str, str]:
        """State of every copy by host, definitions that are shut off included."""

    @abstractmethod
    def definitions(self, guest: str) -> dict[str, str]:
        """By host that has the guest: "transient", "persistent", or "autostart" for one that starts with its host as well."""

    def wait_running_on(self, guest: str, host: str, timeout: float = 60.0) -> None:
        wait_until(lambda: self.running_on(guest) == [host], timeout, f"guest {guest} to run on {host} only")

    @property
    def server(self) -> str:
        return self.coordinator.address

    def drover(self, *arguments: str, server: str | None = None) -> list[str]:
        """The command line of the operator's command."""
        return [str(DROVER), "--server", server or self.server, *arguments]

    def state_dir(self, name: str) -> Path:
        """The folder in which the daemon of that host (or "co") keeps its journal."""
        return self.path / name / "state"

    def agent_config(self, name: str) -> dict[str, Any]:
        """What all agents have in common."""
        return {
            "name": name,
            "state_dir": str(self.state_dir(name)),
            "hypervisor": self.kind,
            "log_level": "info",
            **self.settings.get("agent", {}),
        }

    def coordinator_config(self) -> dict[str, Any]:
        return {
            "name": "co",
            "state_dir": str(self.state_dir("co")),
            "heartbeat_seconds": 1,
            **self.settings.get("coordinator", {}),
        }

    def wipe_state(self) -> None:
        """Forget every journal and store; for daemons that do not run."""
        for name in (*self.hosts, "co"):
            shutil.rmtree(self.state_dir(name), ignore_errors=True)
