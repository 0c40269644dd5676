"""agent.hypervisor.libvirt.process: a stopped QEMU is reported, with the command that continues it."""

import os
import signal
import subprocess
from pathlib import Path

from agent.hypervisor.libvirt.process import stopped


def test_6_8_a_stopped_process_is_reported(tmp_path: Path) -> None:
    (tmp_path / "qemu").mkdir()
    with subprocess.Popen(["sleep", "60"]) as child:
        try:
            (tmp_path / "qemu" / "vm1.pid").write_text(f"{child.pid}\n")
            assert stopped("vm1", tmp_path) == ""
            child.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, child.pid, os.WSTOPPED)
            assert (
                stopped("vm1", tmp_path)
                == f"the QEMU of vm1 (process {child.pid}) is stopped; `kill -CONT {child.pid}` lets it continue"
            )
        finally:
            child.kill()
    assert stopped("vm1", tmp_path) == "", "the process has ended"


def test_6_8_an_unknown_process_is_not_reported(tmp_path: Path) -> None:
    assert stopped("vm1", None) == stopped("vm1", tmp_path) == stopped("\0", tmp_path) == ""
