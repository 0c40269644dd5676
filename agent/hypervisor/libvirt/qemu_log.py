"""How a QEMU ended, from the log that libvirt keeps for each guest: the one place that has the cause. Blocks."""

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
_SAID: Final = re.compile(r"^[\dT:.Z-]*\s*qemu[\w.-]*: (.+)$", re.MULTILINE)
_ENDED: Final = re.compile(r"^[\d :.+-]+: shutting down, reason=(\w+)$", re.MULTILINE)


def death(name: str, logs: Path | None) -> HypervisorError | None:
    """The death of the guest's latest QEMU with what it said last; None where it did not die by itself, or the log does not tell."""
    text = _latest(name, logs)
    if _end(text) != "crashed":  # libvirt's word for a process that ended without being told to, whatever the reason
        return None
    said = "; ".join(line.strip() for line in _SAID.findall(text)[-_LINES:])[:_CHARACTERS]
    return TransferFailed(f"the QEMU of {name} died{': ' if said else ', without a word in its log'}{said}", echo_of(said))


def destroyed(name: str, logs: Path | None) -> HypervisorError | None:
    """That the latest QEMU of a copy was destroyed, not saying by whom; None where it was not. A migration that libvirt cancels ends
    it with another word, ``failed``."""
    if _end(_latest(name, logs)) != "destroyed":
        return None
    return TransferFailed(f"the copy of {name} was destroyed by somebody, and not by Drover, while it waited for its memory")


def _latest(name: str, logs: Path | None) -> str:
    """What stands in the log of the guest's latest QEMU; empty where it cannot be read."""
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
    """libvirt's word for how it ended; empty while it lives."""
    ended = _ENDED.search(text)
    return ended[1] if ended else ""
