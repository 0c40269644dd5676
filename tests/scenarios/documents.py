"""Every command that the documentation shows is run as it stands there."""

import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.kit.cluster import Cluster
from tests.transcript import ROOT, run

PROTOCOL = ROOT / "docs" / "protocol.md"


@pytest.mark.timeout(120)
def test_6_28_protocol_transcript(cluster: Cluster, tmp_path: Path) -> None:
    _run_protocol(cluster, "web1", tmp_path)


@pytest.mark.timeout(120)
def test_6_28_protocol_transcript_with_buf_curl(cluster: Cluster, tmp_path: Path) -> None:
    text = PROTOCOL.read_text()
    grpcurl, buf = (re.search(rf"call\(\) {{ {tool} .*}}$", text, re.M) for tool in ("grpcurl", "buf curl"))
    assert grpcurl is not None
    assert buf is not None
    other_guest = {"web1": "web2", "6f1c0f4e-2f0a-4b5e-9d55-0d8f5a1e9b01": "6f1c0f4e-2f0a-4b5e-9d55-0d8f5a1e9b02"}
    its_words = {grpcurl[0]: buf[0], "Code: FailedPrecondition": '"code": "failed_precondition"'}
    _run_protocol(cluster, "web2", tmp_path, {**its_words, **other_guest})


def _run_protocol(cluster: Cluster, guest_name: str, folder: Path, instead: Mapping[str, str] | None = None) -> None:
    guest = cluster.start_guest(guest_name)
    run(PROTOCOL, folder, sockets(cluster), instead)
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
