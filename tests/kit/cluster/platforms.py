"""The two kinds of cluster: real libvirt and QEMU in the lab's test hosts, and the simulated hypervisor on loopback."""

import contextlib
import json
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc

from agent.hypervisor.sim.config import uuid_of
from agent.hypervisor.sim.control import ask
from drover.agent.v1 import host_pb2, host_pb2_grpc
from tests.kit.cluster.cluster import Cluster, ClusterGuest, GuestSpec
from tests.kit.cluster.daemon import Daemon
from tests.kit.lab import Lab, missing_requirement
from tests.kit.lab.lab import LabHost

PORT = 7400
"""Port of every agent on the lab's management network; the coordinator has the next one."""


def why_not_libvirt() -> str | None:
    """Return why this machine cannot have real test hosts, in one sentence; None if it can."""
    return missing_requirement()


@contextlib.contextmanager
def cluster(
    kind: str,
    guests: Iterable[GuestSpec] = (),
    *,
    hosts: int = 2,
    networks: int = 1,
    lab_id: str = "drover",
    settings: Mapping[str, Any] | None = None,
    lab: Mapping[str, Any] | None = None,
) -> Iterator[Cluster]:
    """Run a cluster. `settings` has tables ``agent``, ``coordinator`` (configuration keys) and ``sim``, and ``ipv6``: the networks
    whose IPv6 address real hosts use. `lab` has further arguments of `Lab.up`, for real hosts.
    """
    common = (tuple(guests), hosts, networks, lab_id, settings or {})
    with _lab_cluster(*common, lab or {}) if kind == "libvirt" else _sim_cluster(*common) as made:
        try:
            made.start()
            yield made
        finally:
            made.stop()


@contextlib.contextmanager
def _lab_cluster(
    guests: tuple[GuestSpec, ...],
    hosts: int,
    networks: int,
    lab_id: str,
    settings: Mapping[str, Any],
    options: Mapping[str, Any],
) -> Iterator[Cluster]:
    with Lab.up(lab_id, hosts=hosts, migration_networks=networks, **options) as lab:
        yield LabCluster(lab, guests, settings)


@contextlib.contextmanager
def _sim_cluster(
    guests: tuple[GuestSpec, ...], hosts: int, networks: int, lab_id: str, settings: Mapping[str, Any]
) -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix=f"drover-{lab_id}-") as folder:
        yield SimCluster(Path(folder), guests, hosts, networks, settings)


class LabCluster(Cluster):
    """A cluster of real hosts."""

    kind = "libvirt"

    def __init__(self, lab: Lab, guests: Iterable[GuestSpec], settings: Mapping[str, Any]) -> None:
        self.lab = lab
        super().__init__(lab.path / "drover", [host.name for host in lab.hosts], guests, settings)
        folder = self.path / "run"
        co = lab.coordinator
        self.coordinator = Daemon(
            "coordinator",
            "co",
            folder,
            self.coordinator_config()
            | {"listen": [f"unix:{folder}/co.sock", f"{co.addresses['mgmt']}:{PORT + 1}"], "allow_insecure_tcp": True},
            co.popen,
        )
        addresses = {host.name: f"{host.addresses['mgmt']}:{PORT}" for host in lab.hosts}
        for host in lab.hosts:
            self.agents[host.name] = Daemon("agent", host.name, folder, self._agent(host, folder, addresses), host.popen)

    def state_dir(self, name: str) -> Path:
        """Return a folder on the node's disk for journals."""
        return self.lab.node(name).disks["journal"].folder / "state"

    def _agent(self, host: LabHost, folder: Path, addresses: Mapping[str, str]) -> dict[str, Any]:
        rules = self.settings.get("networks", {})
        on_networks = {**host.addresses, **{name: host.addresses6[name] for name in self.settings.get("ipv6", ())}}
        return {
            **self.agent_config(host.name),
            "listen": [f"unix:{folder}/{host.name}.sock", addresses[host.name]],
            "allow_insecure_tcp": True,
            "coordinator": f"{self.lab.coordinator.addresses['mgmt']}:{PORT + 1}",
            "networks": [
                {"name": name, "address": address, "roles": ["management" if name == "mgmt" else "migration"], **rules.get(name, {})}
                for name, address in sorted(on_networks.items())
            ],
            "peers": {name: address for name, address in addresses.items() if name != host.name},
            "libvirt": {"uri": "qemu:///system"},
        }

    def start_guest(self, name: str, host: str = "h1") -> ClusterGuest:
        spec = self.specs[name]
        guest = self.lab.guest(
            name,
            memory_mib=spec.memory_mib,
            dirty=spec.dirty,
            machine=spec.machine,
            cpu=spec.cpu,
            mem_mib=spec.mem_mib,
            ticks=spec.ticks,
        )
        started = self.guests[name] = ClusterGuest(spec, str(guest.stable_uuid), guest.serial_log)
        if spec.running:
            self.lab[host].start(guest, persistent=spec.persistent)
            if spec.autostart:
                self.lab[host].virsh("autostart", name)
            started.wait_lines(10)
        else:
            self.lab[host].define(guest)
        if spec.halted:
            self.lab[host].virsh("qemu-monitor-command", name, "--hmp", "stop")
        return started

    def _end(self, guest: ClusterGuest) -> None:
        for host in self.lab.hosts:
            host.end(guest.uuid)

    def save(self, guest: ClusterGuest, host: str) -> None:
        self.lab[host].virsh("managedsave", guest.name)

    def copies(self, guest: str) -> dict[str, str]:
        states = {host.name: host.domain_state(guest).split(" ")[0] for host in self.lab.hosts}
        return {name: state for name, state in states.items() if state != "absent"}

    def definitions(self, guest: str) -> dict[str, str]:
        return {name: self._definition(self.lab[name], guest) for name in self.copies(guest)}

    @staticmethod
    def _definition(host: LabHost, guest: str) -> str:
        lines = host.virsh("dominfo", guest).splitlines()
        info = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        return "autostart" if info["Autostart"] == "enable" else "persistent" if info["Persistent"] == "yes" else "transient"


class SimCluster(Cluster):
    """A cluster of simulated hosts: each agent contains the simulated hypervisor, and has a loopback address of its own."""

    kind = "sim"

    def __init__(self, path: Path, guests: Iterable[GuestSpec], hosts: int, networks: int, settings: Mapping[str, Any]) -> None:
        names = [f"h{index}" for index in range(1, hosts + 1)]
        super().__init__(path, names, guests, settings)
        folder = path / "run"
        popen = subprocess.Popen
        self.coordinator = Daemon(
            "coordinator", "co", folder, self.coordinator_config() | {"listen": [f"unix:{folder}/co.sock"]}, popen
        )
        for index, name in enumerate(names, start=1):
            addresses = {f"mig{network}": f"127.{90 + network}.0.{index}" for network in range(1, networks + 1)}
            self.agents[name] = Daemon("agent", name, folder, self._agent(name, folder, addresses), popen)

    def _agent(self, name: str, folder: Path, addresses: Mapping[str, str]) -> dict[str, Any]:
        rules = self.settings.get("networks", {})
        networks = [
            {"name": name, "address": address, "roles": ["migration"], **rules.get(name, {})} for name, address in addresses.items()
        ]
        management = {"name": "mgmt", "address": f"127.90.0.{name[1:]}", "roles": ["management"]}
        return {
            **self.agent_config(name),
            "listen": [f"unix:{folder}/{name}.sock"],
            "coordinator": f"unix:{folder}/co.sock",
            "networks": [management, *networks],
            "peers": {other: f"unix:{folder}/{other}.sock" for other in self.hosts if other != name},
            "sim": {
                "log_root": str(self.path),
                "state_path": str(self.path / f"{name}.guests"),
                "control_path": str(self._control(name)),
                **self.settings.get("sim", {}),
            },
        }

    def _guest(self, spec: GuestSpec) -> dict[str, Any]:
        guest: dict[str, Any] = {
            "name": spec.name,
            "memory_bytes": spec.memory_mib << 20,
            "dirty_rate": spec.dirty * 4096,
            "persistent": spec.persistent,
            "autostart": spec.autostart,
            "cpu": spec.cpu,
            "virt_type": "qemu",
            "state": "paused" if spec.halted else "running" if spec.running else "shutoff",
            "pause_reason": "unknown",
            "log": str(self.path / f"{spec.name}.log"),
        }
        return guest | ({"machine": spec.machine} if spec.machine else {})

    def _control(self, host: str) -> Path:
        return self.path / "run" / f"{host}.sim"

    def start_guest(self, name: str, host: str = "h1") -> ClusterGuest:
        spec = self.specs[name]
        ask(self._control(host), {"start": self._guest(spec)})
        guest = self.guests[name] = ClusterGuest(spec, uuid_of(name), self.path / f"{name}.log")
        if spec.running and not spec.halted:
            guest.wait_lines(10)
        return guest

    def _end(self, guest: ClusterGuest) -> None:
        for host in self.hosts:
            ask(self._control(host), {"end": guest.uuid})

    def save(self, guest: ClusterGuest, host: str) -> None:
        ask(self._control(host), {"save": guest.uuid})

    def copies(self, guest: str) -> dict[str, str]:
        """Return the copies from the agents, which contain the hypervisors here."""
        states = {}
        for host, daemon in self.agents.items():
            with grpc.insecure_channel(daemon.address) as channel:
                response = host_pb2_grpc.HostServiceStub(channel).ListDomains(host_pb2.ListDomainsRequest(), timeout=10)
            for domain in response.domains:
                if domain.name == guest:
                    states[host] = host_pb2.DomainState.Name(domain.state).removeprefix("DOMAIN_STATE_").lower()
        return states

    def definitions(self, guest: str) -> dict[str, str]:
        """Return the definitions from the hypervisors' state files."""
        found = {}
        for host in self.hosts:
            for record in json.loads((self.path / f"{host}.guests").read_text()):
                if (record["running"] or record["stored"])["guest"]["name"] == guest:
                    stored = "persistent" if record["stored"] else "transient"
                    found[host] = "autostart" if record["autostart"] else stored
        return found
