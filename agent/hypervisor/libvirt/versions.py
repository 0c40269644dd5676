"""Which version of QEMU each guest runs, and which one is installed for it: they differ once a package was upgraded. Blocks."""

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
    """Remembers what was read of each process: it stays as long as the process does."""

    def __init__(self, logs: Path | None) -> None:
        self._logs = logs
        self._known: Mapping[tuple[str, int], _Process] = {}

    def add(self, found: Iterable[tuple[Any, Domain]], installed: Mapping[str, str]) -> list[Domain]:
        """The guests with the versions of those that run, where they can be told. `installed`: by QEMU binary."""
        known: dict[tuple[str, int], _Process] = {}
        result = []
        for libvirts, domain in found:
            number = libvirts.ID()  # new for each process; below zero without one
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
    """The version of the QEMU that was started last, from the line that libvirt writes then; empty where there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _LOG_BYTES))
            found = _STARTED.findall(file.read(_LOG_BYTES))
    except OSError:
        return ""
    return found[-1].decode() if found else ""
