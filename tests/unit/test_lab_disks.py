"""tests.kit.lab.disks: only a disk of the lab's own is filled."""

from pathlib import Path

import pytest

from tests.kit.lab import LabError, disks


def test_a_folder_that_is_no_disk_of_its_own_is_not_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a test asks for `disks` in a lab that has none: the folder is on the machine's own disk."""
    monkeypatch.setattr(disks, "CHUNK", b"")  # were it filled all the same, nothing would be written
    disk = disks.Disk(tmp_path)
    with pytest.raises(LabError, match="not a disk of its own"):
        disk.fill()
    assert list(tmp_path.iterdir()) == []
