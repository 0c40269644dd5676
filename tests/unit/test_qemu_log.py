"""agent.hypervisor.libvirt.qemu_log: how a QEMU process ended, from libvirt's log of its guest."""

from pathlib import Path

import pytest

pytest.importorskip("libvirt")

from agent.hypervisor.libvirt.qemu_log import death, destroyed
from agent.runtime.failure import ECHO

START = "2026-11-25 18:37:55.100+0000: starting up libvirt version: 9.0.0, qemu version: 7.2.22\nPATH=/usr/bin \\\n-S\n"
OOM = "2026-11-25T18:37:56.1Z qemu-system-x86_64: cannot set up guest memory 'pc.ram': Cannot allocate memory\n"
STREAM = "2026-11-25T18:37:57.1Z qemu-system-x86_64: load of migration failed: Input/output error\n"
CRASHED = "2026-11-25 18:37:58.412+0000: shutting down, reason=crashed\n"
FAILED = "2026-11-25 18:37:58.412+0000: shutting down, reason=failed\n"
DESTROYED = "2026-11-25 18:37:58.412+0000: shutting down, reason=destroyed\n"


@pytest.mark.parametrize(
    ("log", "message"),
    [
        (START + CRASHED, "the QEMU of vm1 died and its log gives no reason"),
        (START + OOM + CRASHED, "the QEMU of vm1 died: cannot set up guest memory 'pc.ram': Cannot allocate memory"),
        (START + OOM + DESTROYED, None),
        (START + OOM, None),
        (START + OOM + CRASHED + START, None),
        (START + OOM + CRASHED + START + CRASHED, "the QEMU of vm1 died and its log gives no reason"),
        (
            START + "x" * 40_000 + "\n" + OOM + CRASHED,
            "the QEMU of vm1 died: cannot set up guest memory 'pc.ram': Cannot allocate memory",
        ),
        ("", None),
    ],
)
def test_6_14_a_death_with_the_last_log_lines(tmp_path: Path, log: str, message: str | None) -> None:
    (tmp_path / "vm1.log").write_text(log)
    found = death("vm1", tmp_path)
    assert (str(found) if found else None) == message
    assert found is None or ECHO not in found.native


@pytest.mark.parametrize(
    ("log", "is_so"),
    [
        (START + DESTROYED, True),
        (START + CRASHED, False),
        (START + FAILED, False),
        (START, False),
        (START + DESTROYED + START, False),
        (START + FAILED + START + DESTROYED, True),
        ("", False),
    ],
)
def test_6_14_a_destroyed_copy_is_reported(tmp_path: Path, log: str, is_so: bool) -> None:
    (tmp_path / "vm1.log").write_text(log)
    found = destroyed("vm1", tmp_path)
    assert (found is not None) == is_so
    assert found is None or "the copy of vm1 was destroyed while it waited" in str(found)


def test_6_14_a_broken_stream_is_a_consequence_and_no_cause(tmp_path: Path) -> None:
    (tmp_path / "vm1.log").write_text(START + STREAM + CRASHED)
    found = death("vm1", tmp_path)
    assert found is not None
    assert found.native[ECHO] == "true"


def test_6_14_an_unreadable_log_gives_none(tmp_path: Path) -> None:
    assert death("vm1", tmp_path) is None
    assert death("\0", tmp_path) is None
