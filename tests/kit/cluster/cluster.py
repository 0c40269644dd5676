"""The interface of a cluster, for any hypervisor."""

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
    """The parameters of a guest. Sizes in MiB, `dirty` in pages (4 KiB) per second."""

    name: str
    memory_mib: int = 64
    dirty: int = 200
    machine: str | None = None
    """None: one that every host has."""
    cpu: str = "qemu64"
    persistent: bool = True
    autostart: bool = False
    running: bool = True
    halted: bool = False
    """Once it runs, stop it by QEMU's own monitor, without libvirt."""
    mem_mib: int | None = None
    """Memory that is filled (the rest stays zero). None: all. Real hosts only."""
    ticks: int = 100
    """Lines of its log per second, the resolution of a gap. Real hosts only."""


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
        """Judge its serial log."""
        return judge_file(self.serial_log)

    def lines(self) -> int:
        return self.serial_log.read_bytes().count(b"\n") if self.serial_log.exists() else 0

    def wait_lines(self, more: int, timeout: float = 60.0) -> None:
        """Wait until it has written `more` further lines: it runs."""
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

    # ---- start and stop

    def start(self) -> None:
        """Start every daemon at once, then wait until all serve and every host is known."""
        for daemon in self.daemons():
            daemon.start(wait=False)
        for daemon in self.daemons():
            daemon.wait_serving()
        self.wait_known()

    def wait_known(self, timeout: float = 60.0) -> None:
        """Wait until the coordinator reports that every agent answers."""
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
        """Return the guest of that name; start it unless it was started."""
        return self.guests.get(name) or self.start_guest(name)

    def end_guests(self) -> None:
        """End every started guest on every host, whatever its name there, and delete its log."""
        for guest in self.guests.values():
            self._end(guest)
            for path in (guest.serial_log, guest.serial_log.with_suffix(".stamps")):
                path.unlink(missing_ok=True)
        self.guests.clear()

    @abstractmethod
    def _end(self, guest: ClusterGuest) -> None:
        """Destroy and undefine the guest on every host that has it, by its UUID."""

    @abstractmethod
    def save(self, guest: ClusterGuest, host: str) -> None:
        """Make a host save the memory of a guest that runs there, for its next start there, and end the guest."""

    def running_on(self, guest: str) -> list[str]:
        """Return the hosts whose hypervisor reports that the guest runs there."""
        return [host for host, state in self.copies(guest).items() if state == "running"]

    @abstractmethod
    def copies(self, guest: str) -> dict[str, str]:
        """Return the state of every copy by host, including definitions that are shut off."""

    @abstractmethod
    def definitions(self, guest: str) -> dict[str, str]:
        """Return for each host that has the guest "transient", "persistent", or "autostart" (persistent, and starts with the
        host).
        """

    def wait_running_on(self, guest: str, host: str, timeout: float = 60.0) -> None:
        wait_until(lambda: self.running_on(guest) == [host], timeout, f"guest {guest} to run on {host} only")

    @property
    def server(self) -> str:
        return self.coordinator.address

    def drover(self, *arguments: str, server: str | None = None) -> list[str]:
        """Return the command line of `drover` with these arguments."""
        return [str(DROVER), "--server", server or self.server, *arguments]

    def state_dir(self, name: str) -> Path:
        """Return the folder of the journal of that host's daemon (or "co")."""
        return self.path / name / "state"

    def agent_config(self, name: str) -> dict[str, Any]:
        """Return the configuration that all agents have in common."""
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
