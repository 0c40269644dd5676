"""What a program can check in the documentation: links lead somewhere, tables are complete."""

import re
from pathlib import Path

import pytest

from agent.handshake.machines.failpoints import all_points
from agent.runtime.errors import Reason
from tests.transcript import ROOT

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def anchors(document: Path) -> set[str]:
    """Return the anchors that GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", document.read_text()):
        path, _, anchor = target.partition("#")
        found = (document.parent / path).resolve() if path else document
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


def test_every_failpoint_has_its_rows() -> None:
    table = (ROOT / "docs/failpoints.md").read_text()
    for mode in ("managed", "p2p"):
        missing = [point for point in all_points() if not re.search(rf"^\| {re.escape(point)} \| [\w ]+ \| {mode} ", table, re.M)]
        assert missing == []


def test_what_an_operator_reads_names_only_reasons_that_there_are() -> None:
    words = set(re.findall(r"`([A-Z]+(?:_[A-Z]+)+|BUSY)`", (ROOT / "docs/operations.md").read_text()))
    assert words
    assert words <= {reason.value for reason in Reason}


@pytest.mark.parametrize("document", ["architecture.md", "checklists.md"])
def test_7_the_maps_name_files_that_there_are(document: str) -> None:
    """A file may be named by the end of its path, as the map shows its folder."""
    named = re.findall(r"[`/ ]((?:[a-z_0-9]+/)*[a-z_0-9]+\.(?:py|proto|md))`?", (ROOT / "docs" / document).read_text())
    there = [f"/{path.relative_to(ROOT)}" for path in ROOT.rglob("*.*") if ".venv" not in path.parts]
    assert named
    assert [name for name in named if not any(path.endswith(f"/{name}") for path in there)] == []
