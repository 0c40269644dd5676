"""The repair of libvirt's status file after libvirtd died, by QEMU's answers; with a minimal fake QEMU."""

import fcntl
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("libvirt", reason="libvirt-python is not installed")

from agent.hypervisor.libvirt import switchover
from agent.hypervisor.libvirt.hook import install, is_installed
from agent.hypervisor.libvirt.switchover import Outcome

UUID = "0b8c1f3e-54f1-5d0e-8f5e-d70000000001"
STATUS = """\
<domstatus state='paused' reason='migration' pid='{pid}'>
  <monitor path='{monitor}' type='unix'/>
  <job type='none' async='migration out' phase='{phase}' flags='0x8119' asyncStarted='1'>
    <migParams/>
  </job>
  <domain type='qemu'>
    <name>g1</name>
    <uuid>{uuid}</uuid>{more}
  </domain>
</domstatus>
"""


class Qemu(threading.Thread):
    """A monitor that answers with the given states of the migration in turn; a state with a ``!`` is sent as an event."""

    def __init__(self, path: Path, states: list[str], status: str) -> None:
        super().__init__(daemon=True)
        self.asked: list[str] = []
        self._states, self._status = states, status
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(path))
        self._server.listen(1)
        self.start()

    def run(self) -> None:
        client, _ = self._server.accept()
        with client, client.makefile("rb") as lines, self._server:
            client.sendall(b'{"QMP": {}}\n')
            for line in lines:
                command = json.loads(line)["execute"]
                self.asked.append(command)
                client.sendall(b"".join(json.dumps(answer).encode() + b"\n" for answer in self._answers(command)))

    def _answers(self, command: str) -> Iterator[object]:
        if command == "query-migrate":
            state = self._states.pop(0) if len(self._states) > 1 else self._states[0]
            yield {"return": {"status": state.strip("!")} if state else {}}
            while self._states[0].endswith("!"):
                yield {"event": "MIGRATION", "data": {"status": self._states[0].strip("!")}}
                if len(self._states) == 1:
                    break
                self._states.pop(0)
        else:
            yield {"return": {"status": self._status} if command == "query-status" else {}}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "qemu").mkdir()
    (tmp_path / "qemu/driver.pid").touch()
    return tmp_path


@pytest.fixture
def process() -> Iterator[int]:
    """A process whose command line looks like that of the guest's QEMU."""
    command = [sys.executable, "-c", "print(flush=True); input()", "-uuid", UUID]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()  # once it has printed, /proc has its command line
        yield process.pid
        process.kill()


Write = Callable[..., Path]


@pytest.fixture
def write(run: Path, process: int) -> Write:
    """Write libvirt's status file of the guest."""

    def write(phase: str = "perform3", more: str = "", uuid: str = UUID) -> Path:
        path = run / "qemu/g1.xml"
        path.write_text(STATUS.format(pid=process, monitor=run / "m.sock", phase=phase, uuid=uuid, more=more))
        return path

    return write


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(switchover._WAITS, "device", 0.2)
    monkeypatch.setattr(switchover, "MONITOR_SECONDS", 0.3)


@pytest.mark.parametrize(
    ("states", "status", "expected"),
    [
        (["active"], "running", Outcome.STAYS),
        (["setup"], "running", Outcome.STAYS),
        ([""], "running", Outcome.STAYS),
        (["failed"], "running", Outcome.STAYS),
        (["cancelled"], "running", Outcome.STAYS),
        (["pre-switchover"], "finish-migrate", Outcome.STAYS),
        # migrate-continue was executed just before
        (["pre-switchover", "device!", "completed!"], "postmigrate", Outcome.LEFT),
        (["device", "completed!"], "postmigrate", Outcome.LEFT),
        (["device"], "finish-migrate", Outcome.LEFT),
        (["device", "failed!"], "running", Outcome.STAYS),
        (["completed"], "postmigrate", Outcome.LEFT),
        # "completed" is of an earlier migration, after which the guest was kept
        (["completed"], "running", Outcome.STAYS),
    ],
)
def test_the_phase_is_what_libvirtd_would_have_written(
    states: list[str], status: str, expected: Outcome, run: Path, write: Write
) -> None:
    path = write()
    before = path.read_text()
    qemu = Qemu(run / "m.sock", list(states), status)
    assert switchover.mend(run, UUID, "g1") is expected
    after = before.replace("'perform3'", "'perform3_done'") if expected is Outcome.LEFT else before
    assert path.read_text() == after
    assert "migrate_cancel" not in qemu.asked
    assert sorted(file.name for file in path.parent.iterdir()) == ["driver.pid", "g1.xml"]


@pytest.mark.parametrize(
    ("state", "cancelled"),
    [
        ("active", True),
        ("pre-switchover", True),
        ("completed", False),
        ("device", False),
        ("failed", False),
        ("postcopy-active", False),
    ],
)
def test_only_a_transfer_before_the_switch_over_is_cancelled(state: str, cancelled: bool, run: Path, write: Write) -> None:
    write()
    qemu = Qemu(run / "m.sock", [state], "postmigrate")
    switchover.mend(run, UUID, "g1", cancel=True)
    assert ("migrate_cancel" in qemu.asked) is cancelled


def test_a_silent_qemu_counts_as_sending_the_last_of_the_memory(run: Path, write: Write) -> None:
    path = write()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(run / "m.sock"))
        server.listen(1)
        assert switchover.mend(run, UUID, "g1") is Outcome.LEFT
    assert "perform3_done" in path.read_text()


@pytest.mark.parametrize("phase", ["begin3", "perform3_done", "confirm3", "none"])
def test_other_phases_are_left_to_libvirt(phase: str, run: Path, write: Write) -> None:
    before = write(phase).read_text()
    assert switchover.mend(run, UUID, "g1") is None
    assert (run / "qemu/g1.xml").read_text() == before


def test_another_guest_with_the_name_is_left_alone(run: Path, write: Write) -> None:
    write(uuid="00000000-0000-0000-0000-000000000001")
    assert switchover.mend(run, UUID, "g1") is None


@pytest.mark.parametrize("text", ["", "<domstatus>", "<domstatus/>", "<a><job async='migration out' phase='perform3'/></a>"])
def test_a_file_that_is_not_understood_is_left_alone(text: str, run: Path) -> None:
    (run / "qemu/g1.xml").write_text(text)
    assert switchover.mend(run, UUID, "g1") is None
    assert (run / "qemu/g1.xml").read_text() == text


def test_a_second_job_in_the_guests_metadata_is_never_written_to(run: Path, write: Write) -> None:
    fake = "\n    <metadata><x:y xmlns:x='urn:x'>\n  <job async='migration out' phase='perform3'/></x:y></metadata>"
    before = write(more=fake).read_text()
    Qemu(run / "m.sock", ["completed"], "postmigrate")
    switchover.mend(run, UUID, "g1")
    assert (run / "qemu/g1.xml").read_text() == before


def test_a_dead_qemu_is_left_to_libvirt(run: Path, write: Write, process: int) -> None:
    path = write()
    assert switchover.mend(run, UUID, "g1") is None  # no monitor
    path.write_text(path.read_text().replace(f"pid='{process}'", f"pid='{os.getpid()}'"))
    assert switchover.mend(run, UUID, "g1") is None  # the pid belongs to another process by now
    assert "'perform3'" in path.read_text()


def test_marks(run: Path) -> None:
    assert list(switchover.marked(run)) == []
    switchover.mark(run, UUID, "g1")
    switchover.mark(run, UUID, "g1")
    assert list(switchover.marked(run)) == [(UUID, "g1")]
    for _ in range(2):
        switchover.unmark(run, UUID)
    assert list(switchover.marked(run)) == []


HOLD = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"


def test_libvirtd_is_gone_when_nobody_holds_its_lock(run: Path, write: Write) -> None:
    lock = run / "qemu/driver.pid"
    with subprocess.Popen([sys.executable, "-c", HOLD, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        assert not switchover.libvirtd_is_gone(run, 0.01)
        write()
        assert switchover.mend(run, UUID, "g1") is None
        assert switchover.mend_after_death(run / "nowhere", UUID, "g1") is None
        threading.Timer(0.05, holder.kill).start()
        assert switchover.libvirtd_is_gone(run, 5)
    assert switchover.libvirtd_is_gone(run)
    with lock.open("w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the query has taken no lock


def test_the_hook_runs_without_any_other_file(tmp_path: Path) -> None:
    assert not is_installed(tmp_path / "libvirt" / switchover.HOOK)
    hook = install(tmp_path / "libvirt")
    assert is_installed(hook)
    assert install(tmp_path / "libvirt") == hook
    for arguments in (["-", "start", "-", "start"], ["-", "shutdown", "-", "shutdown"]):
        done = subprocess.run([hook, *arguments], capture_output=True, text=True, check=True, env={}, cwd="/", timeout=10)
        assert done.stdout + done.stderr == ""
    hook.write_text(hook.read_text() + "# of an older Drover")
    assert not is_installed(hook)
