"""Check whether the QEMU of a guest is stopped (SIGSTOP, a debugger). Then it answers nothing, and libvirt waits for it. Blocks."""

from pathlib import Path
from typing import Final

_STOPPED: Final = {"T": "stopped", "t": "stopped by a debugger"}
"""Text for the states in /proc/PID/stat."""


def stopped(name: str, run: Path | None, proc: Path = Path("/proc")) -> str:
    """Return a sentence that says that the guest's QEMU is stopped and how to continue it. Empty: it is not stopped, or that is not
    known. `run` is libvirt's run folder.
    """
    if run is None:
        return ""
    try:
        pid = int((run / "qemu" / f"{name}.pid").read_text())
        state = (proc / str(pid) / "stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, ValueError, IndexError):
        return ""
    how = _STOPPED.get(state)
    return f"the QEMU of {name} (process {pid}) is {how}; `kill -CONT {pid}` lets it continue" if how else ""
