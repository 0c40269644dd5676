"""The session of docs/operations.md, run as it stands there."""

from pathlib import Path

import pytest

from tests.kit.cluster import GuestSpec, cluster
from tests.scenarios.documents import sockets
from tests.transcript import ROOT, run

GUESTS = [GuestSpec("db1", memory_mib=256), GuestSpec("web1"), GuestSpec("web2"), GuestSpec("web3")]


@pytest.mark.timeout(120)
def test_8_the_storm_of_the_operators_guide(tmp_path: Path) -> None:
    with cluster("sim", GUESTS, hosts=3, networks=2) as made:
        for guest in GUESTS:
            made.start_guest(guest.name)
        run(ROOT / "docs" / "operations.md", tmp_path, sockets(made))
        for guest in GUESTS:
            assert len(made.running_on(guest.name)) == 1
            assert made.guests[guest.name].judge().problems() == []
