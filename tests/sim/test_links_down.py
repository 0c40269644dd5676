"""A network that is down is passed by until its link is back (requirement N8)."""

from collections.abc import Iterator

import grpc
import pytest

from agent.hypervisor.sim.control import ask
from agent.runtime.errors import DroverError, Reason
from drover.coordinator.v1 import host_pb2, host_pb2_grpc
from tests.kit.cluster import Cluster, GuestSpec, cluster
from tests.kit.lab.processes import wait_until
from tests.scenarios.conversation import Talk, state


@pytest.fixture(name="made", scope="module")
def _made() -> Iterator[Cluster]:
    with cluster("sim", [GuestSpec("moves")], networks=2) as made:
        made.start_guest("moves")
        yield made


def set_link(made: Cluster, host: str, network: str, *, up: bool) -> None:
    """Take a link up or down, and wait until the coordinator knows that."""
    ask(made.path / "run" / f"{host}.sim", {"links": {network: up}})

    def seen() -> bool:
        with grpc.insecure_channel(made.server) as channel:
            host_ = host_pb2_grpc.HostServiceStub(channel).GetHost(host_pb2.GetHostRequest(name=host), timeout=10).host.host
        return [side.down for side in host_.networks if side.name == network] == [not up]

    wait_until(seen, 10, f"{network} of {host} to be {'up' if up else 'down'}")


async def test_8_5_links_that_are_down_are_passed_by_until_they_are_up(made: Cluster) -> None:
    async with Talk(made.server) as talk:
        set_link(made, "h2", "mig1", up=False)
        moved = await talk.migrate("moves", "h2")
        assert (state(moved), moved.network) == ("succeeded", "mig2")
        assert "mig1: it is down on h2" in [f"{out.name}: {out.why}" for out in moved.network_choice.ruled_out]
        set_link(made, "h1", "mig2", up=False)
        with pytest.raises(DroverError, match="mig1: it is down on h2; mig2: it is down on h1") as error:
            await talk.start("moves", "h1")
        assert error.value.reason is Reason.NETWORK_NOT_FOUND
        assert error.value.metadata["wait"] == "network"
        set_link(made, "h2", "mig1", up=True)
        moved = await talk.migrate("moves", "h1")
        assert (state(moved), moved.network) == ("succeeded", "mig1")
    wait_until(lambda: made.running_on("moves") == ["h1"], 10, "the guest to run on h1")
