"""Every command that the documentation shows is run as it stands there."""

from pathlib import Path

import pytest

from clusterkit import Cluster
from tests.transcript import ROOT, run


@pytest.mark.timeout(120)
def test_protocol_transcript(cluster: Cluster, tmp_path: Path) -> None:
    guest = cluster.start_guest("web1")
    run(ROOT / "docs" / "protocol.md", tmp_path, sockets(cluster))
    assert cluster.copies(guest.name) == {"h2": "running"}
    guest.wait_lines(5)
    assert guest.judge().problems() == []


def sockets(cluster: Cluster) -> dict[str, str]:
    """The variables that the documents use."""
    return {
        "H1": str(cluster.agents["h1"].socket),
        "H2": str(cluster.agents["h2"].socket),
        "DROVER_SERVER": cluster.server,
    }
