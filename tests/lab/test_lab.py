"""The lab itself: hosts come up, a guest lives and moves, faults do what they say, and nothing is left behind."""

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.kit.lab import Guest, Lab, LabError, missing_requirement, take_down, wait_until
from tests.kit.lab.guestlog import judge_file
from tests.kit.lab.processes import NETNS_DIR, in_namespace, namespace_inode, namespace_pids

pytestmark = pytest.mark.timeout(40)

LAB_ID = f"t{os.getpid()}"


@pytest.fixture(scope="module", autouse=True)
def _machine() -> None:
    """A machine without libvirt skips these tests; CI must have it, so there it fails."""
    missing = missing_requirement()
    if missing and os.environ.get("CI") == "true":
        pytest.fail(missing)
    if missing:
        pytest.skip(missing)


@pytest.fixture(scope="module")
def lab(_machine: None) -> Iterator[Lab]:
    with Lab.up(LAB_ID, hosts=2, migration_networks=2) as lab:
        yield lab


@pytest.fixture
def guest(lab: Lab, request: pytest.FixtureRequest) -> Iterator[Guest]:
    guest = lab.guest(request.node.name.removeprefix("test_").replace("_", "-")[:40], memory_mib=32, dirty=200)
    lab["h1"].start(guest)
    guest.wait_lines(5)
    yield guest
    for host in lab:
        host.destroy_all()
    assert lab.leaks() == {}


def traces(lab_id: str, base: Path) -> list[str]:
    """Everything that a lab could leave behind on the machine."""
    found = [str(path) for path in NETNS_DIR.glob(f"drv-{lab_id}-*")]
    found += [str(base / lab_id)] * (base / lab_id).exists()
    found += [mount for mount in Path("/proc/self/mountinfo").read_text().splitlines() if f"/{lab_id}/" in mount]
    links = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout
    return found + [line for line in links.splitlines() if "h1-m" in line or "mig1" in line]


def migrate(lab: Lab, guest: Guest, source: str, target: str, network: str = "mig1") -> None:
    address = lab[target].addresses[network]
    arguments = ["--live", guest.name, lab[target].destination_uri, "--migrateuri", f"tcp://{address}"]
    lab[source].virsh("migrate", *arguments, "--listen-address", address)


def test_hosts_have_a_world_of_their_own(lab: Lab) -> None:
    h1, h2 = lab["h1"], lab["h2"]
    assert h1.exec(["hostname"]).strip() == "h1"
    assert h2.exec(["virsh", "-c", "qemu:///system", "hostname"]).strip() == "h2"
    uuids = {host.virsh("capabilities").split("<uuid>")[1][:36] for host in lab}
    assert len(uuids) == 2
    assert h1.addresses == {"mgmt": "10.91.0.1", "mig1": "10.92.0.1", "mig2": "10.93.0.1"}
    assert lab.coordinator.addresses == {"mgmt": "10.91.0.254"}
    assert lab.leaks() == {}, "no TCP listener, no guest"


def test_a_program_is_its_own_process_and_sees_the_network(lab: Lab, tmp_path: Path) -> None:
    code = "import os, socket; print(os.getpid(), os.getcwd(), socket.gethostname(), flush=True); input()"
    with lab["h2"].popen(["python3", "-c", code], stdin=-1, stdout=-1, cwd=tmp_path) as child:
        assert child.stdout is not None
        assert child.stdout.readline().split() == [str(child.pid).encode(), str(tmp_path).encode(), b"h2"]
        assert child.pid in lab["h2"].pids()
        child.kill()
    with pytest.raises(LabError, match="ended with 3"):
        lab.coordinator.exec(["sh", "-c", "exit 3"])


def test_the_coordinator_reaches_the_hosts_by_name_and_on_the_management_network_only(lab: Lab) -> None:
    with Listener(lab, "h1", "0.0.0.0") as port:
        assert connects(lab, "co", "h1", port)
        assert connects(lab, "h2", lab["h1"].addresses["mig2"], port)
        assert not connects(lab, "co", lab["h1"].addresses["mig1"], port)


def test_migrations_there_and_back_leave_a_perfect_log(lab: Lab, guest: Guest) -> None:
    sent = lab["h1"].counters("mig1").sent
    blackouts = []
    for round_number in range(6):
        source, target = ("h1", "h2") if round_number % 2 == 0 else ("h2", "h1")
        began = time.monotonic()
        migrate(lab, guest, source, target)
        ended = time.monotonic()
        guest.wait_lines(5)
        blackouts.append(judge_file(guest.serial_log).blackout_between(began, ended))
        assert lab[target].domain_state(guest.name) == "running (migrated)"
        assert lab[source].domain_state(guest.name) == "absent"
    assert lab["h1"].counters("mig1").sent - sent > 3 * 20 * 2**20, "the memory went over the migration network"
    moved = judge_file(guest.serial_log).last
    assert moved is not None
    wait_until(lambda: judge_file(guest.serial_log).checks_since(moved) >= 1, 20, "all memory is checked", 0.2)
    verdict = judge_file(guest.serial_log)
    assert verdict.perfect, verdict.problems()
    assert all(gap is not None and 5 < gap < 2000 for gap in blackouts), blackouts


def test_a_paused_guest_shows_as_a_gap_on_all_clocks(lab: Lab, guest: Guest) -> None:
    guest.wait_lines(120)  # Past a full second of the real-time clock: the gap is found between two of them.
    began = time.monotonic()
    lab["h1"].virsh("suspend", guest.name)
    time.sleep(0.5)  # Not to wait for something: this is the length of the gap.
    lab["h1"].virsh("resume", guest.name)
    guest.wait_lines(120)
    verdict = judge_file(guest.serial_log)
    gap = verdict.blackout_between(began, time.monotonic())
    assert gap is not None
    assert 495 < verdict.stopped_ms < gap + 25, "a busy machine makes the host's gap longer than the stop, never shorter"
    assert verdict.guest_gaps[0].ms < verdict.stopped_ms, "the guest's own clock stood still"


def test_two_copies_on_one_log_are_found(lab: Lab, guest: Guest) -> None:
    lab["h2"].start(guest)
    # Its numbers come again, unless the two have torn one another's lines to pieces.
    wait_until(lambda: bool(judge_file(guest.serial_log).repeated), 10, "the judge sees the second copy")
    assert not judge_file(guest.serial_log).perfect


def test_a_page_that_changes_behind_the_guests_back_is_found(lab: Lab, guest: Guest) -> None:
    page, stale_generation = 1234, 4321
    (qemu,) = lab["h1"].qemu()
    with Path(f"/proc/{qemu.pid}/mem").open("r+b", buffering=0) as memory:
        memory.seek(guest_memory(qemu.pid, guest.memory_mib) + 4 * 2**20 + page * 4096)
        memory.write(stale_generation.to_bytes(4, "little"))
    wait_until(lambda: bool(judge_file(guest.serial_log).bad_pages), 10, "the guest finds the page")
    (bad,) = judge_file(guest.serial_log).bad_pages
    assert (bad.page, bad.found) == (page, stale_generation)


def guest_memory(pid: int, mib: int) -> int:
    """Where QEMU has the guest's memory: the only mapping of just that size."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        start, end = (int(number, 16) for number in line.split()[0].split("-"))
        if end - start == mib * 2**20:
            return start
    raise AssertionError("no mapping of the size of the guest's memory")


def test_post_copy_leaves_a_perfect_log() -> None:
    with Lab.up(f"{LAB_ID}p", setting="root") as lab:
        guest = lab.guest("post-copy", memory_mib=32, dirty=200)
        lab["h1"].start(guest)
        guest.wait_lines(5)
        address = lab["h2"].addresses["mig1"]
        postcopy = ["--live", "--postcopy", "--postcopy-after-precopy", guest.name, lab["h2"].destination_uri]
        lab["h1"].virsh("migrate", *postcopy, "--migrateuri", f"tcp://{address}")
        guest.wait_lines(250)
        verdict = judge_file(guest.serial_log)
        assert verdict.perfect, verdict.problems()


def test_libvirtd_can_be_killed_paused_and_started_under_a_running_guest(lab: Lab, guest: Guest) -> None:
    h1 = lab["h1"]
    h1.kill_libvirtd()
    assert h1.libvirtd_pid is None
    h1.start_libvirtd()
    assert h1.domain_state(guest.name).startswith("running")
    h1.pause_libvirtd()
    with pytest.raises(LabError, match="did not end within"):
        h1.virsh("list", timeout=0.3)
    h1.resume_libvirtd()
    h1.restart_libvirtd()
    assert h1.domains() == (guest.name,)
    guest.wait_lines(5)
    assert judge_file(guest.serial_log).perfect


def test_a_killed_qemu_is_noticed_at_once(lab: Lab, guest: Guest) -> None:
    lab["h1"].signal_qemu(guest.name, signal.SIGKILL)
    wait_until(lambda: lab["h1"].domains() == (), 1.0, "libvirt sees the end of QEMU (the init reaps it)")


def test_a_host_crashes_and_comes_back(lab: Lab, guest: Guest) -> None:
    h1 = lab["h1"]
    h1.crash()
    assert h1.pids() == []
    with pytest.raises(LabError, match="h1 is down"):
        h1.exec(["true"])
    h1.boot()
    h1.wait_ready()
    assert h1.domains() == ()
    assert connects(lab, "h1", "h2", 1) is False


def test_a_guest_for_another_host_is_refused(lab: Lab) -> None:
    foreign = lab.guest("foreign", emulator="/usr/bin/qemu-of-another-host", machine="pc-q35-7.2")
    with pytest.raises(LabError, match="qemu-of-another-host"):
        lab["h1"].start(foreign)


# --- the network's faults


class Listener:
    """A process in a node that accepts TCP connections, reads all that comes, and prints how many bytes at each end."""

    CODE = """
import socket, sys
server = socket.create_server((sys.argv[1], 0))
print(server.getsockname()[1], flush=True)
while True:
    peer, _ = server.accept()
    size = 0
    try:
        while data := peer.recv(1 << 20):
            size += len(data)
        print(size, flush=True)
    except OSError as error:
        print(type(error).__name__, flush=True)
    peer.close()
"""

    def __init__(self, lab: Lab, node: str, address: str) -> None:
        self.child = lab.node(node).popen(["python3", "-c", self.CODE, address], stdout=subprocess.PIPE, text=True)

    def line(self) -> str:
        assert self.child.stdout is not None
        return str(self.child.stdout.readline()).strip()

    def __enter__(self) -> int:
        return int(self.line())

    def __exit__(self, *_: object) -> None:
        self.child.kill()
        self.child.communicate()


@contextmanager
def killed(child: subprocess.Popen[str]) -> Iterator[None]:
    """However the block ends, the process ends too."""
    try:
        yield
    finally:
        child.kill()


def connects(lab: Lab, node: str, address: str, port: int, timeout: float = 0.5) -> bool:
    code = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), float(sys.argv[3]))"
    try:
        lab.node(node).exec(["python3", "-c", code, address, str(port), str(timeout)])
    except LabError:
        return False
    return True


SENDER = """
import socket, sys, time
peer = socket.create_connection((sys.argv[1], int(sys.argv[2])), 5)
began, size = time.monotonic(), int(sys.argv[3])
peer.sendall(bytes(size))
peer.shutdown(socket.SHUT_WR)
peer.recv(1)
print(time.monotonic() - began)
"""


def test_a_rate_limit_holds_and_can_be_taken_away(lab: Lab) -> None:
    h1, h2 = lab["h1"], lab["h2"]
    size = 5_000_000
    with Listener(lab, "h2", "0.0.0.0") as port:
        send = ["python3", "-c", SENDER, h2.addresses["mig1"], str(port), str(size)]
        h1.limit_rate("mig1", 10_000_000, "out")
        before = h2.counters("mig1").received
        assert float(h1.exec(send)) > 0.4  # it takes 0.5 s, less a burst, and more on a busy machine
        assert h2.counters("mig1").received - before == pytest.approx(size, rel=0.05)
        h1.limit_rate("mig1", None)
        h1.limit_rate("mig1", None)
        assert min(float(h1.exec(send)) for _ in range(5)) < 0.4
        h2.limit_rate("mig1", 10_000_000, "in")
        assert float(h1.exec(send)) > 0.4
        h2.limit_rate("mig1", None)


@pytest.mark.parametrize(("node", "direction"), [("h1", "in"), ("h1", "out"), ("h2", "both")])
def test_a_cut_link_carries_nothing_until_restored(lab: Lab, node: str, direction: str) -> None:
    with Listener(lab, "h2", "0.0.0.0") as port:
        address = lab["h2"].addresses["mig1"]
        lab[node].cut_link("mig1", direction)
        assert not connects(lab, "h1", address, port)
        assert connects(lab, "h1", lab["h2"].addresses["mig2"], port), "the other network is untouched"
        lab[node].restore_link("mig1")
        lab[node].restore_link("mig1")
        assert connects(lab, "h1", address, port, timeout=5)


@pytest.mark.parametrize("how", ["reset_link", "drop_connections"])
def test_a_reset_breaks_connections_at_both_ends(lab: Lab, how: str) -> None:
    code = """
import socket, sys
peer = socket.create_connection((sys.argv[1], int(sys.argv[2])), 5)
print("connected", flush=True)
try:
    while True:
        peer.sendall(b"x"); peer.settimeout(0.02)
        try: peer.recv(1)
        except TimeoutError: pass
except OSError as error:
    print(type(error).__name__, flush=True)
"""
    server = Listener(lab, "h2", "0.0.0.0")
    with server as port:
        argv = ["python3", "-c", code, lab["h2"].addresses["mig1"], str(port)]
        with lab["h1"].popen(argv, stdout=subprocess.PIPE, text=True) as client, killed(client):
            assert client.stdout is not None
            assert client.stdout.readline() == "connected\n"
            getattr(lab["h1"], how)("mig1")
            assert client.stdout.readline().strip() in {"ConnectionResetError", "ConnectionAbortedError", "BrokenPipeError"}
            assert server.line() == "ConnectionResetError"
        lab["h1"].restore_link("mig1")
        assert connects(lab, "h1", lab["h2"].addresses["mig1"], port, timeout=5)


# --- nothing is left


def processes_of(lab: Lab) -> list[int]:
    inodes = [namespace_inode(node.namespace) for node in lab.nodes] + [namespace_inode(lab.switch)]
    return namespace_pids([inode for inode in inodes if inode is not None])


@pytest.mark.parametrize("harm", ["none", "inits", "everything", "state"])
def test_down_leaves_nothing(tmp_path_factory: pytest.TempPathFactory, harm: str) -> None:
    base = Path(f"/tmp/dl-{os.getpid()}")
    lab_id = f"d{os.getpid()}"
    lab = Lab.up(lab_id, hosts=2, base=base)
    try:
        guest = lab.guest("g", memory_mib=16)
        lab["h1"].start(guest, persistent=True)
        guest.wait_lines(2)
        lab["h2"].popen(["sleep", "1000"])
        lab["h2"].exec(["sh", "-c", "setsid --fork sleep 1000 >/dev/null 2>&1"])
        # What was started enters its namespace a moment after popen answered.
        wait_until(lambda: len(processes_of(lab)) >= 9, 5, "every process is in its namespace")
        before = processes_of(lab)
        for pid in harmed(lab, harm):
            os.kill(pid, signal.SIGKILL)
        if harm == "state":
            (lab.path / "lab.json").unlink()
    finally:
        lab.down()
    if harm == "state":
        # Without its mark a folder may be anybody's, so it stays; processes and namespaces are gone all the same.
        assert [str(lab.path)] == traces(lab_id, base)
        (lab.path / "lab.json").write_text("{}")
    lab.down()
    assert traces(lab_id, base) == []
    assert not base.exists()
    wait_until(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in before), 2, "every process is gone")


def harmed(lab: Lab, harm: str) -> list[int]:
    inits = [pid for node in lab.nodes if (pid := node.init_pid)]
    return {"none": [], "inits": inits, "everything": processes_of(lab), "state": []}[harm]


def test_an_up_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.kit.lab.hosts.Host.service", ("/bin/false",))
    base, lab_id = Path(f"/tmp/df-{os.getpid()}"), f"f{os.getpid()}"
    monkeypatch.setattr("tests.kit.lab.hosts.Host.wait_ready", lambda self, timeout=1.0: self._accepts() or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Lab.up(lab_id, base=base)
    assert traces(lab_id, base) == []


def test_an_up_that_was_killed_is_taken_down_by_its_id_alone() -> None:
    lab_id, base = f"k{os.getpid()}", Path(f"/tmp/dk-{os.getpid()}")
    code = f"from pathlib import Path; from tests.kit.lab import Lab; Lab.up({lab_id!r}, hosts=4, base=Path({str(base)!r}))"
    with subprocess.Popen([str(Path(".venv/bin/python").absolute()), "-c", code]) as child:
        wait_until(lambda: (NETNS_DIR / f"drv-{lab_id}-h3").exists(), 10, "the lab is half made", 0.001)
        child.kill()
    with pytest.raises(LabError, match="lab down --id"):
        Lab.up(lab_id, base=base)
    take_down(lab_id, base)
    assert traces(lab_id, base) == []


def test_a_lab_that_is_up_is_not_touched_by_a_second_up(lab: Lab) -> None:
    pids = processes_of(lab)
    with pytest.raises(LabError, match="is up or was not taken down"):
        Lab.up(lab.id)
    assert processes_of(lab) == pids
    assert Lab.attach(lab.id)["h2"].libvirt_uri == lab["h2"].libvirt_uri


def test_the_command_line_tool(lab: Lab) -> None:
    def tool(*words: str) -> subprocess.CompletedProcess[str]:
        program = Path(__file__).parents[2] / "scripts/lab"
        return subprocess.run([program, *words], capture_output=True, text=True, timeout=30, check=False)

    status = json.loads(tool("status", "--id", lab.id, "-o", "json").stdout)
    assert [node["name"] for node in status["nodes"]] == ["h1", "h2", "co"]
    assert status["nodes"][1]["libvirt_uri"] == lab["h2"].libvirt_uri
    assert tool("exec", "--id", lab.id, "h2", "--", "hostname").stdout == "h2\n"
    assert lab.id in tool("list").stdout.split()
    other = f"c{os.getpid()}"
    assert tool("up", "--id", other, "--hosts", "1").returncode == 0
    assert tool("down", "--id", other).returncode == 0
    absent = tool("status", "--id", other)
    assert (absent.returncode, "there is no lab" in absent.stderr) == (1, True)
    assert traces(other, lab.path.parent) == []


def test_a_process_of_another_namespace_is_never_taken_for_ours(lab: Lab) -> None:
    inode = namespace_inode(lab["h1"].namespace)
    assert inode is not None
    assert not in_namespace(os.getpid(), inode)
    assert socket.gethostname() != "h1"
