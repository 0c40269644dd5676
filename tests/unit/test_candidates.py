"""agent.service.peers: the choice among peers without a coordinator (issue 8, point 3)."""

import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agent.handshake.host.record_cache import RecordCache
from agent.runtime.errors import Reason
from agent.runtime.events import Bus
from agent.service.peers import CANDIDATE_SECONDS, Channels, PeerDirectory
from drover.agent.v1 import migration_pb2 as pb
from tests.unit.asking import fails
from tests.unit.fake_directory import _host
from tests.unit.two_agents import Pair


async def test_8_3_a_peer_that_hangs_holds_up_no_choice(agents: Callable[..., Any], pair: Pair, tmp_path: Path) -> None:
    quick, channels = await agents("quick"), Channels()
    with socket.socket(socket.AF_UNIX) as hangs:
        hangs.bind(f"{tmp_path}/slow.sock")
        hangs.listen()
        took = await four_choices(pair, channels, {"slow": f"unix:{tmp_path}/slow.sock", "quick": quick.address})
    assert max(took) < CANDIDATE_SECONDS + 2
    assert took[-1] < CANDIDATE_SECONDS, "the breaker does not ask it again"
    await channels.close()


async def four_choices(pair: Pair, channels: Channels, peers: dict[str, str]) -> list[float]:
    """Return how long each took."""
    directory = PeerDirectory(_host(pair.source), "10.91.0.1:7400", peers, channels, RecordCache(), Bus())
    directory._candidates._rand = lambda: 1.0
    took = []
    for _ in range(4):
        began = time.monotonic()
        error = await fails(directory.candidates(pb.MigrationSpec(domain="web1")), Reason.NO_HOST)
        took.append(time.monotonic() - began)
        assert "slow: it does not answer" in error.message
        assert "quick: it does not answer" not in error.message
    return took
