"""The end of a QEMU process, from the log that libvirt keeps for each guest. Only this log has the cause. Blocks."""

import os
import re
from pathlib import Path
from typing import Final

from agent.hypervisor.base import HypervisorError, TransferFailed
from agent.hypervisor.libvirt.errors import echo_of

_TAIL_BYTES: Final = 16384
_LINES: Final = 3
_CHARACTERS: Final = 500

_START: Final = re.compile(r"^[\d :.+-]+: starting up ", re.MULTILINE)
_MESSAGE: Final = re.compile(r"^[\dT:.Z-]*\s*qemu[\w.-]*: (.+)$", re.MULTILINE)
_ENDED: Final = re.compile(r"^[\d :.+-]+: shutting down, reason=(\w+)$", re.MULTILINE)


def death(name: str, logs: Path | None) -> HypervisorError | None:
    """Return how the guest's latest QEMU died, with its last log messages; None where it did not die by itself, or that is not
    known."""
    text = _latest(name, logs)
    if _end(text) != "crashed":  # libvirt's reason for every process that ended without a request, whatever the cause
        return None
    last = "; ".join(line.strip() for line in _MESSAGE.findall(text)[-_LINES:])[:_CHARACTERS]
    return TransferFailed(f"the QEMU of {name} died{': ' if last else ' and its log gives no reason'}{last}", echo_of(last))


def destroyed(name: str, logs: Path | None) -> HypervisorError | None:
    """Return an error if the latest QEMU of a copy was destroyed, by whomever; None where it was not. A migration that libvirt
    cancels has another reason, ``failed``."""
    if _end(_latest(name, logs)) != "destroyed":
        return None
    return TransferFailed(f"the copy of {name} was destroyed while it waited for its memory, and not by Drover")


def _latest(name: str, logs: Path | None) -> str:
    """Return the log of the guest's latest QEMU, at most its last `_TAIL_BYTES`; empty where it cannot be read."""
    try:
        if logs is None:
            return ""
        with (logs / f"{name}.log").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            text = file.read(_TAIL_BYTES).decode(errors="replace")
    except (OSError, ValueError):
        return ""
    starts = list(_START.finditer(text))
    return text[starts[-1].start() :] if starts else text


def _end(text: str) -> str:
    """Return libvirt's reason for the end of the process; empty while it lives."""
    ended = _ENDED.search(text)
    return ended[1] if ended else ""
