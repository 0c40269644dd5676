"""Issue 6, line 29: a caller's mistake is never INTERNAL, and leaves no traceback."""

import asyncio
import json
import random
import uuid
from collections import Counter
from collections.abc import Iterator
from typing import Any

import grpc.aio
import pytest
from google.protobuf.message_factory import GetMessageClass

from agent.runtime.errors import DroverError, Reason
from agent.service.channel import open_channel
from agent.service.status import STATUS_KEY, error_from_rpc
from drover.agent.v1 import admission_pb2, handshake_pb2, host_pb2, migration_pb2
from drover.coordinator.v1 import host_pb2 as cluster_pb2
from drover.coordinator.v1 import network_pb2
from tests.bench.hostile import Hostile
from tests.kit.cluster import Cluster, GuestSpec, cluster

pytestmark = pytest.mark.timeout(120)

CALLS = 40
"""Of each method at each server."""
SERVICES = {
    "agent": [m.DESCRIPTOR.services_by_name[s] for m, s in (
        (handshake_pb2, "HandshakeService"), (host_pb2, "HostService"), (migration_pb2, "MigrationService"),
        (admission_pb2, "AdmissionService"))],
    "coordinator": [m.DESCRIPTOR.services_by_name[s] for m, s in (
        (cluster_pb2, "HostService"), (migration_pb2, "MigrationService"), (network_pb2, "NetworkService"))],
}  # fmt: skip


@pytest.fixture(name="made", scope="module")
def _made() -> Iterator[Cluster]:
    settings = {"agent": {"lease_seconds": 2, "takeover_after_seconds": 2}}
    with cluster("sim", [GuestSpec("one"), GuestSpec("two"), GuestSpec("off", running=False)], settings=settings) as made:
        for name in ("one", "two", "off"):
            made.start_guest(name)
        yield made


async def one_call(channel: grpc.aio.Channel, method: Any, request: Any, leave_after: float | None) -> DroverError | None:
    """The error, if there is one. A caller that leaves learns none."""
    kind: Any = channel.unary_stream if method.server_streaming else channel.unary_unary
    answer = GetMessageClass(method.output_type)
    made: Any = kind(
        f"/{method.containing_service.full_name}/{method.name}",
        request_serializer=type(request).SerializeToString,
        response_deserializer=answer.FromString,
    )
    call = made(request, timeout=leave_after or 20)
    try:
        if method.server_streaming:
            await call.read()
            call.cancel()
        else:
            await call
    except grpc.aio.AioRpcError as error:
        if leave_after is not None and error.code() in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED):
            return None
        found = error_from_rpc(error, "server")
        if STATUS_KEY not in dict(error.trailing_metadata() or ()):  # gRPC's own words, not ours
            raise AssertionError(f"{method.full_name} of {request} gets {error.code()}: {error.details()}") from None
        return found
    return None


@pytest.mark.parametrize("seed", [1, 2])
async def test_6_29_no_request_is_answered_with_internal(made: Cluster, seed: int) -> None:
    rng = random.Random(seed)
    agents = {name: f"unix:{daemon.socket}" for name, daemon in made.agents.items()}
    ids = [str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(6)]
    hostile = Hostile(
        rng, ids=ids, guests=["one", "two", "off", made.guests["one"].uuid], hosts=list(agents), agents=list(agents.values())
    )
    servers = {**dict.fromkeys(agents.values(), SERVICES["agent"]), made.server: SERVICES["coordinator"]}
    todo = [
        (address, method)
        for address, services in servers.items()
        for each in services
        for method in each.methods
        for _ in range(CALLS)
    ]
    rng.shuffle(todo)
    channels = {address: open_channel(address) for address in servers}
    told: Counter[str] = Counter()
    internal = []

    async def work() -> None:
        while todo:
            address, method = todo.pop()
            request = hostile.make(GetMessageClass(method.input_type))
            error = await one_call(channels[address], method, request, rng.choice((None, None, 0.001, 0.005)))
            told[error.reason if error else "OK"] += 1
            if error and (error.reason is Reason.INTERNAL or error.code is grpc.StatusCode.INTERNAL):
                internal.append(f"{method.full_name}: {error.message} of {request}"[:600])

    await asyncio.gather(*(work() for _ in range(6)))
    for channel in channels.values():
        await channel.close()
    assert internal == []
    assert {"OK", Reason.WRONG_PHASE, Reason.RECORD_NOT_FOUND, Reason.INVALID_FIELD} <= set(told)
    for daemon in made.daemons():
        for line in daemon.log.read_text().splitlines():
            said = json.loads(line)
            assert "exception" not in said, said.get("exception") or line
            assert said["event"] not in ("unexpected error (bug)", "library message"), line
