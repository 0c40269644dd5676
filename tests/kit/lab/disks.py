"""A small disk of a node's own, which a test can fill."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

from tests.kit.lab.errors import LabError
from tests.kit.lab.processes import run

CHUNK = bytes(1 << 16)


@dataclass(frozen=True)
class Disk:
    """A file system in memory, mounted at `folder`: the same files for the node and for everybody outside it."""

    folder: Path

    @property
    def _filler(self) -> Path:
        return self.folder / ".filler"

    def mount(self, mib: int) -> None:
        """Before the node boots, so that it sees the mount too. Ends with the lab."""
        self.folder.mkdir(parents=True, exist_ok=True)
        run(["mount", "-t", "tmpfs", "-o", f"size={mib}m,mode=755", "tmpfs", self.folder])

    def fill(self) -> None:
        """From now on nothing more can be written to it (ENOSPC), not even one page.

        Raises `LabError` for a folder that is no mount of its own: it would be the machine's disk that is filled.
        """
        if not self.folder.is_mount():
            raise LabError(f"{self.folder} is no disk of its own, so it is not filled: make the lab with `disk_mib`")
        with contextlib.suppress(OSError), self._filler.open("ab", buffering=0) as filler:
            while filler.write(CHUNK):
                pass

    def free(self) -> None:
        """Undoes `fill`; nothing where it was not filled."""
        self._filler.unlink(missing_ok=True)


def unmount_below(folder: Path) -> None:
    """Undoes every mount in a folder, the innermost first."""
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for mount in sorted((mount for mount in mounts if mount.startswith(f"{folder}/")), reverse=True):
        run(["umount", mount])
