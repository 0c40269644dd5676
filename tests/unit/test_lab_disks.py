"""tests.kit.lab.disks: only a disk of the lab is ever filled."""

from pathlib import Path

import pytest

from tests.kit.lab import LabError, disks


def test_a_folder_that_is_no_disk_of_its_own_is_not_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a lab without `disk_mib` the folder is on the machine's own disk."""
    monkeypatch.setattr(disks, "CHUNK", b"")  # so that nothing is written if this test fails
    disk = disks.Disk(tmp_path)
    with pytest.raises(LabError, match="not a disk of its own"):
        disk.fill()
    assert list(tmp_path.iterdir()) == []
