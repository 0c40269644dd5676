"""Nodes of the lab: a `Node` has its own network, mounts and name; a `Host` has a libvirtd and guests as well."""

import os
import re
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import UUID

from tests.kit.lab.build import HERE, helper
from tests.kit.lab.disks import Disk
from tests.kit.lab.domain import Guest
from tests.kit.lab.errors import LabError, LabTimeoutError
from tests.kit.lab.links import Direction, Link, Network
from tests.kit.lab.processes import (
    NETNS_DIR,
    command_line,
    in_namespace,
    kill_namespaces,
    namespace_inode,
    namespace_pids,
    read_pid,
    run,
    send_signal,
    wait_until,
)
from tests.kit.lab.sockets import listening

NOTHING_TO_END = ("failed to get domain", "Domain not found", "domain is not running")
"""Errors of virsh for a guest that is not on this host, or is shut off."""
LIBVIRT_FOLDERS = ("etc/libvirt/pki", "var/lib/libvirt/images", "var/log/libvirt", "var/cache/libvirt/qemu")


@dataclass(frozen=True)
class Counters:
    """Bytes on one interface since it was created, including frame headers, as the kernel counts them."""

    received: int
    sent: int


@dataclass(frozen=True)
class Qemu:
    """A running QEMU process with a guest (not one that libvirt starts to probe QEMU)."""

    pid: int
    guest: str
    incoming: bool
    """It was started to receive a migration; stays true afterwards."""


@dataclass(frozen=True)
class Leaks:
    """What is left on a host. A clean host (see `nothing`) has no running or defined guest and no open port."""

    qemu: tuple[Qemu, ...]
    ports: tuple[tuple[str, int], ...]
    """Listening TCP sockets: (address as the kernel writes it, in hex; port)."""
    domains: tuple[str, ...]
    """Guests that run or are defined, by libvirt."""

    @property
    def nothing(self) -> bool:
        """Whether nothing is left."""
        return not (self.qemu or self.ports or self.domains)


class Node:
    """A machine of the lab: network namespace, mount namespace, UTS namespace, an init that reaps orphans."""

    service: tuple[str, ...] = ()
    """The program that the node's init runs; a plain node has none."""

    def __init__(self, name: str, index: int, lab_id: str, state: Path, nets: tuple[Network, ...]) -> None:
        self.name = name
        self.index = index
        self.networks = nets
        self.namespace = f"drv-{lab_id}-{name}"
        self.switch = f"drv-{lab_id}-sw"
        self.state = state
        self.path = state / name
        """The node's files. `path / "run"` is its /run."""
        self.addresses: Mapping[str, str] = {net.name: net.address(index) for net in nets}
        """IPv4 addresses by network name: "mgmt", "mig1", …"""
        self.addresses6: Mapping[str, str] = {net.name: net.address6(index) for net in nets}
        """IPv6 addresses by network name."""
        self.disks: Mapping[str, Disk] = {"journal": Disk(self.path / "disk")}
        """Disks by purpose; mounted only in a lab with small disks."""
        self._children: list[subprocess.Popen[Any]] = []

    # --- start and stop

    def prepare(self) -> None:
        """Make the node's folders (each is mounted over the folder of the same name inside the node)."""
        for folder in (*LIBVIRT_FOLDERS, "run"):
            (self.path / folder).mkdir(parents=True, exist_ok=True)

    def boot(self) -> None:
        """Start the node's init, which starts its service. Returns at once; see `wait_ready`."""
        (self.path / "init.pid").unlink(missing_ok=True)
        words = ["setsid", "--fork", "nsenter", f"--net={NETNS_DIR / self.namespace}", "unshare", "--mount", "--uts"]
        init = (helper("init"), self.path / "service.pid", *self.service)
        script = ("sh", HERE / "native/node.sh", self.name, self.path, self.state, *init)
        with (self.path / "init.log").open("ab") as log:
            subprocess.run(
                [*words, *(str(word) for word in script)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self.service_environment()},
                check=True,
                timeout=10,
            )

    def service_environment(self) -> Mapping[str, str]:
        """Return environment variables for the service."""
        return {}

    def wait_ready(self, timeout: float = 60.0) -> None:
        """Wait until the node can be used."""
        try:
            wait_until(lambda: self.init_pid is not None, timeout, f"{self.name}: its init runs", 0.005)
        except LabTimeoutError as error:
            raise LabTimeoutError(f"{error}; {self.path}/init.log says: {self._tail('init.log')}") from None

    def crash(self) -> None:
        """Kill every process of the node at once, as a power failure would. `boot` and `wait_ready` bring it back."""
        kill_namespaces([self._inode], [init] if (init := self.init_pid) else [])
        self._reap()

    @property
    def init_pid(self) -> int | None:
        """The node's init, or None while the node is down."""
        pid = read_pid(self.path / "init.pid")
        return pid if pid is not None and in_namespace(pid, self._inode) else None

    @cached_property
    def _inode(self) -> int:
        inode = namespace_inode(self.namespace)
        if inode is None:
            raise LabError(f"{self.name}: there is no network namespace {self.namespace}; is the lab up?")
        return inode

    def details(self) -> dict[str, Any]:
        """Return what `lab status` shows for this kind of node, as plain data."""
        return {}

    def pids(self) -> list[int]:
        """Return all processes of the node, by the machine's process ids."""
        return namespace_pids([self._inode])

    def _tail(self, name: str) -> str:
        path = self.path / name
        return path.read_text(errors="replace")[-1500:].strip() if path.exists() else ""

    # --- programs

    def inside(self, argv: Sequence[str | Path], cwd: str | Path | None = None) -> list[str]:
        """Return the command that runs `argv` in the node. It execs, so the started process id is the program's own."""
        pid = self.init_pid
        if pid is None:
            raise LabError(f"{self.name} is down: its init does not run")
        return [
            *("nsenter", f"--net=/proc/{pid}/ns/net", f"--mount=/proc/{pid}/ns/mnt", f"--uts=/proc/{pid}/ns/uts"),
            *(f"--wdns={Path(cwd) if cwd else Path.cwd()}", "--", *(str(word) for word in argv)),
        ]

    def exec(self, argv: Sequence[str | Path], timeout: float = 30.0, stdin: str | None = None) -> str:
        """Run a program in the node to its end; return its output. Raises LabError if it fails."""
        return run(self.inside(argv), timeout, stdin)

    def popen(self, argv: Sequence[str | Path], **kwargs: Any) -> subprocess.Popen[Any]:
        """Start a program in the node, with the keyword arguments of `subprocess.Popen`. It ends with the lab at the latest."""
        kwargs.setdefault("stdin", subprocess.DEVNULL)
        child: subprocess.Popen[Any] = subprocess.Popen(self.inside(argv, kwargs.pop("cwd", None)), **kwargs)
        self._children.append(child)
        return child

    def _reap(self) -> None:
        """Reap the child processes that were killed with the node."""
        for child in self._children:
            child.wait(timeout=5)
        self._children.clear()

    # --- network

    def link(self, network: str) -> Link:
        """Return the node's connection to a network."""
        if network not in self.addresses:
            raise LabError(f"{self.name} is not on a network {network!r}; it is on {', '.join(self.addresses)}")
        return Link(self.switch, self.namespace, self.name, network)

    def counters(self, network: str) -> Counters:
        """Return the bytes that the node received and sent on this network."""
        pid = self.init_pid
        if pid is None:
            raise LabError(f"{self.name} is down: no counters")
        for line in Path(f"/proc/{pid}/net/dev").read_text().splitlines():
            interface, _, figures = line.partition(":")
            if interface.strip() == network:
                fields = figures.split()
                return Counters(received=int(fields[0]), sent=int(fields[8]))
        raise LabError(f"{self.name} has no interface {network!r}")

    def limit_rate(self, network: str, bytes_per_second: int | None, direction: Direction | str = "both") -> None:
        """Limit the rate on a network in each direction ("in", "out", "both"); None removes the limit."""
        self.link(network).limit(bytes_per_second, Direction(direction))

    def cut_link(self, network: str, direction: Direction | str = "both") -> None:
        """Drop packets in this direction (ARP as well), as if the cable were pulled outside the node."""
        self.link(network).cut(Direction(direction))

    def reset_link(self, network: str) -> None:
        """Break every TCP connection over this network at once, at both ends, and refuse new ones, until `restore_link`."""
        self.link(network).reset(self._both(network))

    def restore_link(self, network: str) -> None:
        """Undo `cut_link` and `reset_link`."""
        self.link(network).restore()

    def drop_connections(self, network: str) -> None:
        """Break the present TCP connections over this network; new ones can be made."""
        self.link(network).drop_connections(self._both(network))

    def _both(self, network: str) -> tuple[str, str]:
        return self.addresses[network], self.addresses6[network]

    def set_link(self, network: str, *, up: bool) -> None:
        """Pull or plug the cable: the node's kernel sees that the carrier is lost, or is back."""
        self.link(network).set_up(up)

    def set_mtu(self, network: str, mtu: int) -> None:
        """Set the MTU of the node's interface and of the switch's port, as an operator of both would."""
        self.link(network).set_mtu(mtu)

    def swallow_big_packets(self, network: str, above: int | None, direction: Direction | str = "both") -> None:
        """Drop IP packets of more than `above` bytes, and send no ICMP message: a switch with too small an MTU. None: no more. Holds
        for connections that are made afterwards.
        """
        self.link(network).swallow(above, Direction(direction))

    def close_ports(self, network: str, first: int, last: int, verdict: str | None = "drop") -> None:
        """Close a range of the node's TCP ports on a network, as its firewall would. `verdict` is nft's, such as "drop", "reject" or
        "reject with tcp reset"; None opens them again.
        """
        self.link(network).close_ports(first, last, verdict)

    def listening(self) -> tuple[tuple[str, int], ...]:
        """Return (address, port) of the listening TCP sockets; none while the node is down."""
        pid = self.init_pid
        return () if pid is None else listening(pid)


class Host(Node):
    """A test host: a node with its own libvirtd, which can be reached from the whole machine by a unix socket."""

    service = ("libvirtd",)

    def __init__(self, name: str, index: int, lab_id: str, state: Path, nets: tuple[Network, ...]) -> None:
        super().__init__(name, index, lab_id, state, nets)
        self.disks = {**self.disks, "libvirt": Disk(self.path / "var/lib/libvirt")}

    @property
    def libvirt_socket(self) -> Path:
        """libvirtd's socket outside the host; inside it is /run/libvirt/libvirt-sock."""
        return self.path / "run/libvirt/libvirt-sock"

    @property
    def libvirt_uri(self) -> str:
        """The connection URI that works inside and outside the host."""
        return f"qemu:///system?socket={self.libvirt_socket}"

    @property
    def destination_uri(self) -> str:
        """The same with a transport, which `virsh migrate` requires of a destination."""
        return f"qemu+unix:///system?socket={self.libvirt_socket}"

    def virsh(self, *arguments: str, timeout: float = 30.0, stdin: str | None = None) -> str:
        """Run virsh on this host's libvirtd."""
        return run(["virsh", "-q", "-c", self.libvirt_uri, *arguments], timeout, stdin).rstrip("\n")

    def details(self) -> dict[str, Any]:
        """Return libvirtd's URI and process id, and the running guests."""
        guests = [{"guest": qemu.guest, "pid": qemu.pid} for qemu in self.qemu()] if self.init_pid else []
        return {"libvirt_uri": self.libvirt_uri, "libvirtd_pid": self.libvirtd_pid, "guests": guests}

    # --- libvirtd

    @property
    def libvirtd_pid(self) -> int | None:
        """Process id of libvirtd, or None while it does not run."""
        pid = read_pid(self.path / "service.pid")
        return pid if pid is not None and in_namespace(pid, self._inode) else None

    def wait_ready(self, timeout: float = 60.0) -> None:
        """Wait until libvirtd answers a call."""
        super().wait_ready(timeout)
        try:
            wait_until(self._accepts, timeout, f"{self.name}: libvirtd accepts connections")
            self.virsh("uri", timeout=timeout)
        except LabError as error:
            logs = self._tail("init.log") + self._tail("var/log/libvirt/libvirtd.log")
            raise type(error)(f"{error}; {self.path}/init.log and libvirtd.log say: {logs}") from None

    def _accepts(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(self.libvirt_socket))
            except OSError:
                return False
        return True

    def start_libvirtd(self, timeout: float = 60.0) -> None:
        """Start libvirtd unless it runs, and wait until it answers."""
        init = self.init_pid
        if init is None:
            raise LabError(f"{self.name} is down: its init does not run")
        send_signal(init, self._inode, signal.SIGUSR1)
        self.wait_ready(timeout)

    def stop_libvirtd(self, timeout: float = 60.0) -> None:
        """Stop libvirtd with SIGTERM and wait for its end; guests go on running."""
        self._signal_libvirtd(signal.SIGTERM, timeout)

    def kill_libvirtd(self, timeout: float = 30.0) -> None:
        """Kill libvirtd with SIGKILL and wait until it is gone; guests go on running."""
        self._signal_libvirtd(signal.SIGKILL, timeout)

    def pause_libvirtd(self) -> None:
        """Send SIGSTOP: libvirtd keeps its sockets but does not answer."""
        self._signal_libvirtd(signal.SIGSTOP, None)

    def resume_libvirtd(self) -> None:
        """Send SIGCONT."""
        self._signal_libvirtd(signal.SIGCONT, None)

    def restart_libvirtd(self) -> None:
        """Stop libvirtd with SIGTERM and start it again."""
        self.stop_libvirtd()
        self.start_libvirtd()

    def _signal_libvirtd(self, number: signal.Signals, wait: float | None) -> None:
        pid = self.libvirtd_pid
        if pid is not None:
            send_signal(pid, self._inode, number, wait)

    # --- guests

    def start(self, guest: Guest, persistent: bool = False) -> None:
        """Define (if persistent) and start a guest; return when QEMU runs (its first line comes 0.1 s later)."""
        if persistent:
            self.define(guest)
            self.virsh("start", guest.name)
        else:
            self.virsh("create", "/dev/stdin", stdin=guest.xml())

    def define(self, guest: Guest) -> None:
        """Define the guest on this host without starting it."""
        self.virsh("define", "/dev/stdin", stdin=guest.xml())

    def domains(self) -> tuple[str, ...]:
        """Return the names of all guests that run or are defined here."""
        return tuple(sorted(self.virsh("list", "--all", "--name").split()))

    def domain_state(self, name: str) -> str:
        """Return state and reason in libvirt's words, such as "running (migrated)"; "absent" if there is no such guest."""
        try:
            return self.virsh("domstate", name, "--reason")
        except LabError as error:
            if "failed to get domain" in str(error):
                return "absent"
            raise

    def end(self, guest: UUID | str) -> None:
        """Destroy and undefine a guest, by name or UUID, if this host has it."""
        for words in (["destroy", str(guest)], ["undefine", str(guest), "--nvram", "--managed-save"]):
            try:
                self.virsh(*words)
            except LabError as error:
                if not any(text in str(error) for text in NOTHING_TO_END):
                    raise

    def destroy_all(self) -> None:
        """Destroy and undefine every guest of this host."""
        for name in self.domains():
            self.end(name)

    def qemu(self) -> list[Qemu]:
        """Return the QEMU processes of this host, found by its namespace and not from libvirt."""
        found = []
        for pid in self.pids():
            words = command_line(pid)
            if not words or not Path(words[0]).name.startswith("qemu-system"):
                continue
            named = re.search(r"\bguest=([^,]+)", " ".join(words))
            if named:
                found.append(Qemu(pid, named[1], "-incoming" in words))
        return found

    def signal_qemu(self, guest: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to the guest's QEMU; after SIGKILL, wait until it is gone."""
        for qemu in self.qemu():
            if qemu.guest == guest:
                send_signal(qemu.pid, self._inode, number, 5.0 if number == signal.SIGKILL else None)

    def kill_qemu(self, qemu: Qemu) -> bool:
        """Kill exactly this process and wait until it is gone. Return False if it was gone before."""
        return send_signal(qemu.pid, self._inode, signal.SIGKILL, 5.0)

    def leaks(self) -> Leaks:
        """Return what a test has left behind on this host."""
        return Leaks(tuple(self.qemu()), self.listening(), self.domains())
