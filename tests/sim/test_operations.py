"""The session of docs/operations.md, run as it stands there, with the addresses of simulated hosts."""

from pathlib import Path

import pytest

from tests.kit.cluster import GuestSpec, cluster
from tests.scenarios.documents import sockets
from tests.transcript import ROOT, run

GUESTS = {"db1": GuestSpec("db1", memory_mib=256)} | {name: GuestSpec(name) for name in ("web1", "web2", "web3")}
ADDRESSES = {"10.92.0.": "127.91.0.", "10.93.0.": "127.92.0."}


@pytest.mark.timeout(180)
def test_8_the_storm_of_the_operators_guide(tmp_path: Path) -> None:
    with cluster("sim", GUESTS.values(), hosts=3, networks=2) as made:
        for name in GUESTS:
            made.start_guest(name)
        run(ROOT / "docs" / "operations.md", tmp_path, sockets(made), ADDRESSES)
        assert {name: made.running_on(name) for name in GUESTS} == {"db1": ["h2"], "web1": ["h2"], "web2": ["h2"], "web3": ["h3"]}
        assert [guest.judge().problems() for guest in made.guests.values()] == [[], [], [], []]
