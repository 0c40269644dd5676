"""Lines 31 and 34 of issue 6 (H11): what libvirt's own listeners hear of a migration, and who owns the guest's files after
it, are the same as for a plain `virsh migrate`, whichever agents died in it. On Debian's own settings, with an unprivileged QEMU.
"""

import asyncio
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent.runtime.errors import DroverError, Reason
from tests.kit.cluster import GuestSpec
from tests.kit.cluster import cluster as make_cluster
from tests.kit.cluster.platforms import LabCluster
from tests.kit.lab import Guest, Host, LabError, wait_until
from tests.kit.lab.domain import FIRMWARE
from tests.kit.lab.guestlog import judge_file
from tests.scenarios.conversation import MIB, Talk, state

pytestmark = pytest.mark.timeout(300)

DEATHS = {"nobody": (), "source": ("h1",), "destination": ("h2",), "both": ("h1", "h2")}
"""Whose agents are killed while the memory flows; they come back when the guest has arrived."""


class Listener:
    """`virsh event` on one host."""

    def __init__(self, uri: str, output: Path, probe: Callable[[str], None]) -> None:
        self._output, self._probe, self._probes = output, probe, 0
        command = ["stdbuf", "-oL", "virsh", "-c", uri, "event", "--event", "lifecycle", "--loop"]
        with output.open("wb") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        self.flush()

    def flush(self) -> None:
        """Until all events of before have been written: events come in order, so ask for one more."""
        name = ""

        def heard() -> bool:
            nonlocal name
            if not self.of(name):  # the first one may be too early for a listener that is only starting
                self._probes += 1
                name = f"probe-{self._probes}"
                self._probe(name)
            return bool(self.of(name))

        wait_until(heard, 20.0, "virsh event to tell of a domain that was defined")

    def of(self, domain: str) -> list[str]:
        """What it told of a domain, such as "Suspended Migrated"."""
        lines = self._output.read_text().splitlines() if domain else []
        return [line.rpartition(": ")[2] for line in lines if f"domain '{domain}'" in line]


Guests = tuple[Guest, ...]
"""That move together: the first one logs, has a disk, and a TPM where swtpm is installed; the second one, where ovmf is, has
firmware variables and boots nothing."""

SWTPM = Path("/var/lib/libvirt/swtpm")
"""Where each libvirt keeps the state of its guests' TPMs."""


@dataclass
class Hosts:
    """A cluster with a listener on each host, and a folder for files that libvirt takes for shared, where there can be one."""

    cluster: LabCluster
    listeners: dict[str, Listener]
    disks: Path | None

    def start(self, name: str) -> Guests:
        lab, shared = self.cluster.lab, self.disks
        tpm = shutil.which("swtpm_setup") is not None
        guests = [lab.guest(name, memory_mib=64, dirty=100, disk=shared / f"{name}.raw" if shared else None, tpm=tpm)]
        if shared:
            self.file(shared / f"{name}.raw").write_bytes(bytes(MIB))
        if FIRMWARE[0].exists():
            variables = shared / f"{name}.fd" if shared else Path(f"/var/lib/libvirt/qemu/nvram/{name}.fd")
            guests.append(lab.guest(f"{name}-uefi", memory_mib=64, nvram=variables))
        for guest in guests:
            lab["h1"].start(guest, persistent=True)
        guests[0].wait_lines(10)
        return tuple(guests)

    def told(self, guests: Guests) -> list[dict[str, list[str]]]:
        """Of each guest what each host's libvirt told of it, from its start on."""
        for listener in self.listeners.values():
            listener.flush()
        return [{host: listener.of(guest.name) for host, listener in self.listeners.items()} for guest in guests]

    def owners(self, guests: Guests) -> dict[str, list[str]]:
        """By host what it has of the guests' files: which, with user, group and mode."""
        uefi = [("nvram", guest.nvram) for guest in guests[1:]]
        paths = [("disk", guests[0].disk), ("tpm", SWTPM / str(guests[0].stable_uuid)), *uefi]
        script = '[ ! -e "$2" ] || find "$2" -printf "$1/%P %u:%g %m\n"'
        return {
            host.name: sorted(
                line
                for kind, path in paths
                if path is not None
                for line in host.exec(["sh", "-c", script, "sh", kind, path]).splitlines()
            )
            for host in self.cluster.lab.hosts
        }

    def file(self, disk: Path) -> Path:
        """A disk's file, as it is seen from outside of the hosts."""
        return self.cluster.lab.shared / "images" / disk.name


@pytest.fixture(name="hosts", scope="module")
def _hosts(_real_hosts: None) -> Iterator[Hosts]:
    settings = {"agent": {"takeover_after_seconds": 60, "lease_seconds": 60, "incoming_limit": 10, "outgoing_limit": 10}}
    made = make_cluster(
        "libvirt", [GuestSpec("unused")], lab_id=f"gun{os.getpid() % 1_000_000}", settings=settings, lab={"setting": "stock"}
    )
    with made as cluster, ExitStack() as stack:
        assert isinstance(cluster, LabCluster)
        disks = shared_folder(cluster, stack) if shutil.which("bindfs") else None
        listeners = {}
        for host in cluster.lab.hosts:

            def probe(name: str, uri: str = host.libvirt_uri) -> None:
                xml = f"<domain type='qemu'><name>{name}</name><memory>1024</memory><os><type>hvm</type></os></domain>"
                for words in (["define", "/dev/stdin"], ["undefine", name]):
                    subprocess.run(["virsh", "-c", uri, *words], input=xml, text=True, check=True, capture_output=True, timeout=20)

            listener = listeners[host.name] = Listener(host.libvirt_uri, cluster.path / f"{host.name}.events", probe)
            stack.callback(listener.process.wait)
            stack.callback(listener.process.kill)
        yield Hosts(cluster, listeners, disks)


def shared_folder(cluster: LabCluster, stack: ExitStack) -> Path:
    """A folder on a file system that libvirt takes for shared."""
    real, seen = cluster.lab.shared / "images", cluster.lab.shared / "gluster"
    real.mkdir()
    seen.mkdir()
    mount_as_shared(cluster, stack, real, seen)
    return seen


def mount_as_shared(cluster: LabCluster, stack: ExitStack, real: Path, seen: Path) -> None:
    """Mount a folder on each host as a file system that libvirt takes for shared by its type, as it does with NFS."""
    mount = ["bindfs", "-f", "-o", "subtype=glusterfs,allow_other,nonempty", str(real), str(seen)]
    for host in cluster.lab.hosts:
        process = host.popen(mount)
        stack.callback(process.wait)
        stack.callback(process.kill)
        mounts = Path(f"/proc/{process.pid}/mounts")
        wait_until(lambda mounts=mounts: f" {seen} fuse.glusterfs" in mounts.read_text(), 10.0, f"{host.name} mounts {seen}")  # type: ignore[misc]


@pytest.fixture(name="natively", scope="module")
def _natively(hosts: Hosts) -> Guests:
    """Guests that libvirt has moved by itself."""
    guests = hosts.start("native")
    h1, h2 = hosts.cluster.lab["h1"], hosts.cluster.lab["h2"]
    words = ["--live", "--persistent", "--undefinesource", "--unsafe", "--listen-address", h2.addresses["mig1"]]
    for guest in guests:
        h1.virsh("migrate", *words, guest.name, h2.destination_uri, "--migrateuri", f"tcp://{h2.addresses['mig1']}", timeout=60)
    guests[0].wait_lines(5)
    return guests


@pytest.fixture(name="moved", scope="module", params=list(DEATHS))
def _moved(hosts: Hosts, request: pytest.FixtureRequest) -> Guests:
    """Guests that Drover has moved, while these agents were dead."""
    guests = hosts.start(f"while-{request.param}")
    asyncio.run(move(hosts, guests, DEATHS[request.param]))
    verdict = judge_file(guests[0].serial_log)
    assert verdict.perfect, verdict.problems()
    return guests


async def move(hosts: Hosts, guests: Guests, dead: tuple[str, ...], restart_libvirtd: str = "") -> None:
    cluster = hosts.cluster
    async with Talk(cluster.server) as talk:
        moving = [
            await talk.start(guest.name, "h2", bandwidth_bytes_per_second=bandwidth * MIB, options={"unsafe": True})
            for guest, bandwidth in zip(guests, (10, 6), strict=False)
        ]
        for migration in moving:
            await talk.watch(migration.migration_id, lambda m: m.progress.processed_bytes > 0)
        for host in dead:
            cluster.agents[host].kill()
        for guest in guests:
            await asyncio.to_thread(arrives, cluster.lab["h2"], guest.name)
        if restart_libvirtd:
            await asyncio.to_thread(cluster.lab[restart_libvirtd].kill_libvirtd)
            await asyncio.to_thread(cluster.lab[restart_libvirtd].start_libvirtd)
        for host in dead:
            cluster.agents[host].start()
        for guest, migration in zip(guests, moving, strict=True):
            end = await talk.end(migration.migration_id)
            assert state(end) == "succeeded", end.failure.message
            assert cluster.copies(guest.name) == {"h2": "running"}
    await asyncio.to_thread(guests[0].wait_lines, 5)


def arrives(host: Host, guest: str) -> None:
    wait_until(lambda: "running" in host.domain_state(guest), 60.0, f"{guest} arrives", 0.05)


def test_6_34_whoever_listens_to_libvirt_hears_a_native_migration(hosts: Hosts, natively: Guests, moved: Guests) -> None:
    native = hosts.told(natively)
    for told in native:
        assert told["h1"][-2:] == ["Suspended Migrated", "Stopped Migrated"]
    assert hosts.told(moved) == native


def test_6_31_the_files_of_a_guest_belong_to_the_qemu_that_runs(hosts: Hosts, natively: Guests, moved: Guests) -> None:
    """Its disk, its firmware variables, and the state of its TPM."""
    if hosts.disks is None:
        pytest.skip("bindfs is not installed, so no file system here is taken for shared")
    native = hosts.owners(natively)
    assert_belongs_to_qemu(native, natively)
    assert hosts.owners(moved) == native


def assert_belongs_to_qemu(owners: dict[str, list[str]], guests: Guests) -> None:
    there = {line.split()[0]: line.split()[1] for line in owners["h2"]}
    assert there["disk/"] == "libvirt-qemu:libvirt-qemu"
    assert len(guests) == 1 or there["nvram/"] == "libvirt-qemu:libvirt-qemu"
    assert not guests[0].tpm or there["tpm/tpm2/tpm2-00.permall"] == "tss:tss", "swtpm runs as its own user"


async def test_6_31_the_files_of_a_guest_stay_when_the_sources_libvirtd_dies_too(hosts: Hosts) -> None:
    """After all that listen: with its libvirtd, the listener on the source dies."""
    if hosts.disks is None:
        pytest.skip("bindfs is not installed, so no file system here is taken for shared")
    guests = hosts.start("libvirtd-died")
    await move(hosts, guests, ("h1",), restart_libvirtd="h1")
    assert_belongs_to_qemu(hosts.owners(guests), guests)


async def test_6_31_a_guest_whose_tpm_is_on_storage_that_both_hosts_share_is_refused_as_libvirt_refuses_it(hosts: Hosts) -> None:
    """Last in this file: it hides the state of all other TPMs."""
    if hosts.disks is None or shutil.which("swtpm_setup") is None:
        pytest.skip("bindfs or swtpm is not installed")
    if "cmdarg-migration" in hosts.cluster.lab["h1"].exec(["swtpm", "socket", "--print-capabilities"]):
        pytest.skip("this swtpm can be moved so")
    words = "the running swtpm does not support migration with shared storage"
    h1, h2 = hosts.cluster.lab["h1"], hosts.cluster.lab["h2"]
    real = hosts.cluster.lab.shared / "swtpm"
    real.mkdir(mode=0o711)
    with ExitStack() as stack:
        for host in (h1, h2):
            host.exec(["mkdir", "-p", SWTPM])
        mount_as_shared(hosts.cluster, stack, real, SWTPM)
        guest = hosts.cluster.lab.guest("tpm-shared", memory_mib=32, tpm=True)
        h1.start(guest)
        guest.wait_lines(5)
        with pytest.raises(LabError, match=words):
            h1.virsh("migrate", "--live", guest.name, h2.destination_uri, "--migrateuri", f"tcp://{h2.addresses['mig1']}")
        async with Talk(hosts.cluster.server) as talk:
            with pytest.raises(DroverError) as refused:
                await talk.start(guest.name, "h2")
        assert refused.value.reason is Reason.INCOMPATIBLE_GUEST
        assert words in refused.value.message
        assert "Nothing was done to the guest" in refused.value.message
        assert hosts.cluster.copies(guest.name) == {"h1": "running"}
        guest.wait_lines(5)
        h1.end(guest.name)
