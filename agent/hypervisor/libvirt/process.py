"""Whether the QEMU of a guest is stopped (SIGSTOP, a debugger): it answers nothing then, and libvirt only waits for it. Blocks."""

from pathlib import Path
from typing import Final

_STOPPED: Final = {"T": "stopped", "t": "stopped by a debugger"}
"""States in /proc/PID/stat."""


def stopped(name: str, run: Path | None, proc: Path = Path("/proc")) -> str:
    """What to say of a QEMU that is stopped, and what lets it go on. Empty: it is not, or that cannot be told. `run` is libvirt's
    run folder.
    """
    if run is None:
        return ""
    try:
        pid = int((run / "qemu" / f"{name}.pid").read_text())
        state = (proc / str(pid) / "stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, ValueError, IndexError):
        return ""
    word = _STOPPED.get(state)
    return f"the QEMU of {name} (process {pid}) is {word}; `kill -CONT {pid}` lets it go on" if word else ""
