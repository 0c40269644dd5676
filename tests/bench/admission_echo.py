"""A bare grpc.aio server with the messages of AdmissionService and the server options of an agent, and nothing behind it.

Run as ``python -m tests.bench.admission_echo ADDRESS``; prints "serving" when it serves.
"""

import asyncio
import sys
import time
from typing import Any

import grpc.aio

from agent.service.server import _SERVER_OPTIONS as SERVER_OPTIONS
from drover.agent.v1 import admission_pb2 as pb
from drover.agent.v1 import admission_pb2_grpc as rpc


class Echo(rpc.AdmissionServiceServicer):
    """Answers with messages of the size of an agent's."""

    async def AcquireSlot(self, request: pb.AcquireSlotRequest, context: Any) -> pb.AcquireSlotResponse:  # noqa: N802
        slot = pb.SlotHolder(
            migration_id=request.migration_id,
            direction=request.direction,
            kind=request.kind,
            epoch=1 << 33,
            peer_host=request.peer_host,
            importance=request.importance,
            cost=1,
        )
        slot.since_time.FromNanoseconds(time.time_ns())
        slot.expire_time.FromNanoseconds(time.time_ns())
        return pb.AcquireSlotResponse(slot=slot)

    async def ReleaseSlot(self, request: pb.ReleaseSlotRequest, context: Any) -> pb.ReleaseSlotResponse:  # noqa: N802
        return pb.ReleaseSlotResponse()

    async def ListSlots(self, request: pb.ListSlotsRequest, context: Any) -> pb.ListSlotsResponse:  # noqa: N802
        return pb.ListSlotsResponse()


async def main(address: str) -> None:
    server = grpc.aio.server(options=SERVER_OPTIONS)
    rpc.add_AdmissionServiceServicer_to_server(Echo(), server)
    server.add_insecure_port(address)
    await server.start()
    print("serving", flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
