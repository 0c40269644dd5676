"""The lab: hosts, networks, a coordinator's node and shared files on one machine; comes up in seconds and leaves nothing behind."""

import contextlib
import json
import os
import pwd
import re
import shutil
import stat
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any
from uuid import UUID, uuid5

import tests.kit.lab.build
from tests.kit.lab.build import helper
from tests.kit.lab.disks import unmount_below
from tests.kit.lab.domain import Guest
from tests.kit.lab.errors import LabError
from tests.kit.lab.hosts import Host, Leaks, Node
from tests.kit.lab.links import COORDINATOR_INDEX, Network, make_switch, networks, plug
from tests.kit.lab.processes import NETNS_DIR, kill_namespaces, namespace_inode, read_pid, run, wait_until
from tests.kit.lab.settings import Setting
from tests.kit.lab.settings import find as find_setting

STATE = Path("/run/drover-lab")
"""Default folder for the files of labs: one folder per lab id."""
STATE_FILE = "lab.json"
PROGRAMS = ("libvirtd", "virsh", "qemu-system-x86_64", "ip", "tc", "nft", "ss", "nsenter", "unshare", "setsid", "setpriv", "gcc")
MAX_HOSTS = 64
SOCKET_PATH_LIMIT = 107
"""sun_path in sockaddr_un (unix(7)), without the final zero byte."""
HOST_UUIDS = UUID("0b8c1f3e-54f1-5d0e-8f5e-d70000000000")

DRIVERS = ("qemu", "secret", "storage")
"""The drivers that libvirtd loads here: without the others (udev, firewall, dnsmasq) it starts faster and changes less of the
machine.
"""
DRIVER_DIR = Path("/usr/lib/x86_64-linux-gnu/libvirt/connection-driver")
KVM = Path("/dev/kvm")
CAPABILITIES = "var/cache/libvirt/qemu/capabilities"


class LabHost(Host):
    """A host with the lab's configuration of libvirt."""

    def __init__(self, name: str, index: int, lab_id: str, state: Path, nets: tuple[Network, ...], setting: Setting) -> None:
        super().__init__(name, index, lab_id, state, nets)
        self.setting = setting

    def prepare(self) -> None:
        """Make folders and configuration; copy the capabilities of QEMU that an earlier lab's libvirtd has probed."""
        super().prepare()
        etc = self.path / "etc/libvirt"
        uuid = uuid5(HOST_UUIDS, self.namespace)
        (etc / "libvirtd.conf").write_text(f'host_uuid = "{uuid}"\n{self.setting.libvirtd_conf}')
        (etc / "qemu.conf").write_text(self.setting.qemu_conf)
        drivers = self.path / "drivers"
        drivers.mkdir(exist_ok=True)
        for name in DRIVERS:
            (drivers / f"libvirt_driver_{name}.so").symlink_to(DRIVER_DIR / f"libvirt_driver_{name}.so")
        if KVM.is_char_device() and self.setting.qemu_user != "root":
            os.mknod(self.path / "kvm", stat.S_IFCHR, KVM.stat().st_rdev)
            os.chmod(self.path / "kvm", 0o660)
            shutil.chown(self.path / "kvm", "root", pwd.getpwnam(self.setting.qemu_user).pw_gid)
        cached = capabilities_cache(self.setting)
        if cached.is_dir():
            shutil.copytree(cached, self.path / CAPABILITIES, dirs_exist_ok=True)

    def service_environment(self) -> dict[str, str]:
        """Return the variable that makes libvirtd load only `DRIVERS`."""
        return {"LIBVIRT_DRIVER_DIR": str(self.path / "drivers")} if DRIVER_DIR.is_dir() else {}


def capabilities_cache(setting: Setting) -> Path:
    """Return the cache of libvirtd's probe of QEMU, which takes seconds, for later labs (libvirtd checks whether it is still
    valid).
    """
    return tests.kit.lab.build.CACHE / f"capabilities-{setting.name}"


class Lab:
    """N hosts h1…hN, a coordinator's node and networks. `Lab.up()` makes one, `Lab.attach()` finds a running one."""

    def __init__(self, lab_id: str, hosts: int, migration_networks: int, base: Path, setting: Setting) -> None:
        if not re.fullmatch(r"[a-z0-9]{1,10}", lab_id):
            raise LabError(f"lab id {lab_id!r}: 1 to 10 characters of a-z and 0-9")
        if not 1 <= hosts <= MAX_HOSTS or not 1 <= migration_networks <= 8:
            raise LabError(f"a lab has 1 to {MAX_HOSTS} hosts and 1 to 8 migration networks")
        self.id = lab_id
        self.path = base.absolute() / lab_id
        self.networks = networks(migration_networks)
        self.switch = f"drv-{lab_id}-sw"
        self.setting = setting
        indices = range(1, hosts + 1)
        self.hosts = [LabHost(f"h{index}", index, lab_id, self.path, self.networks, setting) for index in indices]
        self.coordinator = Node("co", COORDINATOR_INDEX, lab_id, self.path, self.networks[:1])
        if len(str(self.hosts[-1].libvirt_socket)) > SOCKET_PATH_LIMIT:
            raise LabError(f"state folder {self.path} is too long for a unix socket's path; choose a shorter one")

    # --- up and down

    @classmethod
    def up(
        cls,
        lab_id: str = "lab",
        hosts: int = 2,
        migration_networks: int = 1,
        base: Path = STATE,
        setting: str | None = None,
        disk_mib: int = 0,
    ) -> "Lab":
        """Bring a lab up; return when every libvirtd answers. If that fails, nothing is left behind.

        `setting` is a name in `tests.kit.lab.settings.SETTINGS`; None: see `tests.kit.lab.settings.find`. With `disk_mib` the nodes
        have small disks of that size, which can be filled; without, their disks are folders on the machine's disk.
        """
        if missing := missing_requirement():
            raise LabError(missing)
        lab = cls(lab_id, hosts, migration_networks, base, find_setting(setting))
        if (left := _namespaces(lab_id)) or lab.path.exists():
            raise LabError(f"lab {lab_id!r} is up or was not taken down ({lab.path}, {left}); first: lab down --id {lab_id}")
        run(["ip", "netns", "add", lab.switch])  # Fails if another `up` of the same id was faster: then this one owns nothing.
        try:
            lab._build(disk_mib)
        except BaseException:
            take_down(lab_id, base)
            raise
        return lab

    def _build(self, disk_mib: int) -> None:
        self.path.mkdir(parents=True)
        self._write_state(ready=False)
        self.shared.mkdir()
        # Source and destination have a guest's files open at the same time, and libvirt remembers owners (in extended attributes)
        # per host: a file system that both see must not have these attributes; NFS does not have them either.
        run(["mount", "-t", "ramfs", "-o", "mode=755", "ramfs", self.shared])
        self.serial.mkdir()
        (self.path / "hosts").write_text(self._hosts_file())
        shutil.copy(tests.kit.lab.build.guest_kernel(), self.kernel)  # libvirt changes its owner
        tools = [helper("init"), helper("stamp")]
        # Dies with this process, so that after a kill -9 nothing makes further namespaces while `take_down` removes them.
        add = "".join(f"netns add {node.namespace}\n" for node in self.nodes)
        run(["setpriv", "--pdeathsig", "KILL", "ip", "-batch", "-"], stdin=add)
        make_switch(self.switch, self.networks)
        self._start_stamper(tools[1])
        for disk in (disk for node in self.nodes if disk_mib for disk in node.disks.values()):
            disk.mount(disk_mib)
        _each(self._start_node, self.nodes)
        self._fill_capabilities_cache()
        self._write_state(ready=True)

    def _start_node(self, node: Node) -> None:
        plug(self.switch, node.namespace, node.name, node.index, node.networks)
        node.prepare()
        node.boot()
        node.wait_ready()

    def _start_stamper(self, program: Path) -> None:
        log = self.path / "stamp.log"
        with log.open("wb") as output:
            subprocess.run(
                ["setsid", "--fork", "nsenter", f"--net={NETNS_DIR / self.switch}", program, self.serial],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                check=True,
                timeout=10,
            )
        wait_until(lambda: log.read_text().startswith("ready"), 5, f"the stamper of serial logs runs (see {log})")

    def _fill_capabilities_cache(self) -> None:
        found = self.hosts[0].path / CAPABILITIES
        cached = capabilities_cache(self.setting)
        if cached.exists():
            return
        self.hosts[0].virsh("capabilities", timeout=60)
        temporary = cached.with_name(f".capabilities-{os.getpid()}")
        shutil.copytree(found, temporary, dirs_exist_ok=True)
        try:
            temporary.rename(cached)
        except OSError:  # Another lab was faster.
            shutil.rmtree(temporary)

    def down(self) -> None:
        """End every process of the lab and remove every trace of it. May be called again."""
        take_down(self.id, self.path.parent)
        for node in self.nodes:
            node._reap()

    @classmethod
    def attach(cls, lab_id: str = "lab", base: Path = STATE) -> "Lab":
        """Return a running lab. Raises LabError if there is none, or it is not ready."""
        try:
            state = json.loads((base / lab_id / STATE_FILE).read_text())
        except FileNotFoundError:
            raise LabError(f"there is no lab {lab_id!r} in {base}; first: lab up --id {lab_id}") from None
        if not state["ready"]:
            raise LabError(f"lab {lab_id!r} is still coming up, or died while it came up: lab down --id {lab_id}")
        return cls(lab_id, state["hosts"], state["migration_networks"], base, find_setting(state["setting"]))

    def __enter__(self) -> "Lab":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.down()

    # --- parts

    @property
    def nodes(self) -> list[Node]:
        """The hosts and the coordinator's node."""
        return [*self.hosts, self.coordinator]

    def __getitem__(self, name: str) -> LabHost:
        """A host by name, "h1"."""
        for host in self.hosts:
            if host.name == name:
                return host
        raise LabError(f"lab {self.id!r} has no host {name!r}; it has {', '.join(h.name for h in self.hosts)}")

    def __iter__(self) -> Iterator[LabHost]:
        return iter(self.hosts)

    def node(self, name: str) -> Node:
        """A host or the coordinator's node ("co") by name."""
        return self.coordinator if name == self.coordinator.name else self[name]

    @property
    def shared(self) -> Path:
        """A folder that every node sees at the same path (like all of the machine's disk except /run and libvirt's folders)."""
        return self.path / "shared"

    @property
    def kernel(self) -> Path:
        """The test guest's kernel, as all hosts of this lab see it."""
        return self.shared / "kernel"

    @property
    def serial(self) -> Path:
        """Serial logs; the lines of every NAME.log here get time stamps in NAME.stamps."""
        return self.shared / "serial"

    def guest(self, name: str, **options: Any) -> Guest:
        """Return a guest whose serial log all hosts see; options are the fields of `Guest`."""
        return Guest(**{"name": name, "serial_log": self.serial / f"{name}.log", "kernel": self.kernel, **options})

    def leaks(self) -> dict[str, Leaks]:
        """Return what is left on each host that is not clean."""
        found = {host.name: host.leaks() for host in self.hosts}
        return {name: leaks for name, leaks in found.items() if not leaks.nothing}

    # --- files

    def _hosts_file(self) -> str:
        lines = ["127.0.0.1 localhost"]
        lines += [f"{node.addresses['mgmt']} {node.name}" for node in self.nodes]
        return "\n".join(lines) + "\n"

    def _write_state(self, ready: bool) -> None:
        state = {
            "id": self.id,
            "ready": ready,
            "hosts": len(self.hosts),
            "migration_networks": len(self.networks) - 1,
            "setting": self.setting.name,
            "owner_pid": os.getpid(),
            "created": time.time(),
        }
        temporary = self.path / f"{STATE_FILE}.new"
        temporary.write_text(json.dumps(state, indent=2) + "\n")
        temporary.rename(self.path / STATE_FILE)


def take_down(lab_id: str, base: Path = STATE) -> None:
    """Remove a lab by its id: processes, namespaces, files. Idempotent."""
    path = base / lab_id
    while names := _namespaces(lab_id):
        inodes = [inode for name in names if (inode := namespace_inode(name)) is not None]
        inits = [pid for file in path.glob("*/init.pid") if (pid := read_pid(file)) is not None]
        kill_namespaces(inodes, inits)
        for name in names:
            run(["ip", "netns", "del", name])
        kill_namespaces(inodes)  # Processes that were entering a namespace when it lost its name.
    unmount_below(path)
    if (path / STATE_FILE).exists() or (path.is_dir() and not any(path.iterdir())):
        shutil.rmtree(path)
    _remove_if_empty(base)


def missing_requirement() -> str | None:
    """Return why this machine cannot have a lab, as a sentence; None if it can."""
    if os.geteuid() != 0:
        return "the lab needs root"
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    return f"the lab needs these programs, which are not installed: {', '.join(absent)}" if absent else None


def known_labs(base: Path = STATE) -> list[str]:
    """Return the ids of all labs on this machine: those with files, and those with only namespaces left."""
    by_file = {path.parent.name for path in base.glob(f"*/{STATE_FILE}")}
    by_namespace = {path.name.split("-")[1] for path in NETNS_DIR.glob("drv-*-*")}
    return sorted(by_file | by_namespace)


def _namespaces(lab_id: str) -> list[str]:
    return sorted(path.name for path in NETNS_DIR.glob(f"drv-{lab_id}-*"))


def _remove_if_empty(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.rmdir()


def _each(action: Callable[[Node], None], nodes: Iterable[Node]) -> None:
    """Call `action` with all nodes at once; raise the first error after all have ended."""
    with ThreadPoolExecutor(max_workers=8) as pool:
        list(pool.map(action, nodes))
