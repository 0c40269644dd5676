"""How a QEMU died, from the log that libvirt keeps for each guest: the one place that has the cause. Blocks."""

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
_DIED: Final = re.compile(r"^[\d :.+-]+: shutting down, reason=crashed$", re.MULTILINE)
"""libvirt's word for a process that ended without being told to, whatever the reason."""


def death(name: str, logs: Path | None) -> HypervisorError | None:
    """The death of the guest's latest QEMU with what it said last; None where it did not die by itself, or the log does not tell."""
    if logs is None:
        return None
    try:
        with (logs / f"{name}.log").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            text = file.read(_TAIL_BYTES).decode(errors="replace")
    except (OSError, ValueError):
        return None
    starts = list(_START.finditer(text))
    text = text[starts[-1].start() :] if starts else text
    if not _DIED.search(text):
        return None
    said = "; ".join(line.strip() for line in _SAID.findall(text)[-_LINES:])[:_CHARACTERS]
    return TransferFailed(f"the QEMU of {name} died{': ' if said else ', without a word in its log'}{said}", echo_of(said))
