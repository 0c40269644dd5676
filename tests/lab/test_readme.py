"""The session that the README shows, run as it stands there on real hosts."""

from pathlib import Path

import pytest

from tests.kit.cluster import Cluster
from tests.scenarios.documents import sockets
from tests.transcript import ROOT, run

pytestmark = pytest.mark.timeout(120)


def test_readme_transcript(cluster: Cluster, tmp_path: Path) -> None:
    guest = cluster.start_guest("vm1")
    run(ROOT / "README.md", tmp_path, sockets(cluster))
    assert cluster.copies(guest.name) == {"h1": "running"}
    guest.wait_lines(5)
    assert guest.judge().problems() == []
