"""A small disk of one node, which a test can fill."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

from tests.kit.lab.errors import LabError
from tests.kit.lab.processes import run

CHUNK = bytes(1 << 16)


@dataclass(frozen=True)
class Disk:
    """A file system in memory, mounted at `folder`: the same files inside the node and outside it."""

    folder: Path

    @property
    def _filler(self) -> Path:
        return self.folder / ".filler"

    def mount(self, mib: int) -> None:
        """Mount it, before the node boots, so that the node sees the mount too. It is unmounted with the lab."""
        self.folder.mkdir(parents=True, exist_ok=True)
        run(["mount", "-t", "tmpfs", "-o", f"size={mib}m,mode=755", "tmpfs", self.folder])

    def fill(self) -> None:
        """Fill it, so that not even one more page can be written (ENOSPC).

        Raises `LabError` if the folder is not a mount, as this would fill the machine's disk.
        """
        if not self.folder.is_mount():
            raise LabError(f"{self.folder} is not a disk of its own and was not filled: make the lab with `disk_mib`")
        with contextlib.suppress(OSError), self._filler.open("ab", buffering=0) as filler:
            while filler.write(CHUNK):
                pass

    def free(self) -> None:
        """Undo `fill`, if it was called."""
        self._filler.unlink(missing_ok=True)


def unmount_below(folder: Path) -> None:
    """Unmount everything below a folder, the innermost first."""
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for mount in sorted((mount for mount in mounts if mount.startswith(f"{folder}/")), reverse=True):
        run(["umount", mount])
