"""The version of QEMU that each guest runs, and the one installed for it. They differ after a package upgrade. Blocks."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from agent.hypervisor.base import Domain
from agent.hypervisor.libvirt.host import emulator_of

_LOG_BYTES: Final = 2 << 20
"""libvirt's log daemon begins a new file at this size."""

_STARTED: Final = re.compile(rb"starting up libvirt version: [^\n]*?, qemu version: ([\d.]+)")


@dataclass(frozen=True)
class _Process:
    version: str
    emulator: str


class Versions:
    """Cache of the version and binary of each QEMU process; both are fixed for the life of the process."""

    def __init__(self, logs: Path | None) -> None:
        self._logs = logs
        self._known: Mapping[tuple[str, int], _Process] = {}

    def add(self, found: Iterable[tuple[Any, Domain]], installed: Mapping[str, str]) -> list[Domain]:
        """Return the guests with the versions of those that run, where they are known. `installed`: version by QEMU binary."""
        known: dict[tuple[str, int], _Process] = {}
        result = []
        for libvirts, domain in found:
            number = libvirts.ID()  # new for each process; negative without one
            if number >= 0:
                key = (domain.uuid, number)
                process = known[key] = self._known.get(key) or self._read(libvirts, domain.name)
                domain = replace(domain, running_version=process.version, installed_version=installed.get(process.emulator, ""))
            result.append(domain)
        self._known = known
        return result

    def _read(self, libvirts: Any, name: str) -> _Process:
        return _Process(started_version(self._logs / f"{name}.log") if self._logs else "", emulator_of(libvirts.XMLDesc()) or "")


def started_version(log: Path) -> str:
    """Return the version of the QEMU that was started last, from the line that libvirt logs at each start; empty without one."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _LOG_BYTES))
            found = _STARTED.findall(file.read(_LOG_BYTES))
    except OSError:
        return ""
    return found[-1].decode() if found else ""
