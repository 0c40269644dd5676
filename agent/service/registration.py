"""Tells the coordinator again and again that there is a host at this address; what the host is like, the coordinator asks."""

from typing import Final

import grpc.aio
import structlog

from agent.runtime.backoff import REGISTRATION, SYSTEM_CLOCK, Clock, Pauses
from agent.service.host import AgentHost
from agent.service.implausible import drop_implausible
from drover.coordinator.v1 import host_pb2, host_pb2_grpc

log = structlog.get_logger()

_HEARTBEAT_SECONDS: Final = (1.0, 60.0)
"""Bounds of the interval, whatever heartbeat the coordinator asks for."""
_CALL_SECONDS: Final = 5.0


async def keep_registered(channel: grpc.aio.Channel, host: AgentHost, address: str, clock: Clock = SYSTEM_CLOCK) -> None:
    """For ever. A coordinator that is away, or refuses, is asked again; migrations do not wait for it."""
    stub = host_pb2_grpc.HostServiceStub(channel)
    told = ""  # what the log said last: only a change is worth a line
    pauses = Pauses(REGISTRATION, clock)
    while True:
        try:
            # Name and UUID would do; a coordinator of an older version takes all of it from here.
            request = host_pb2.RegisterHostRequest(host=host.describe(), agent_address=address)
            response = await stub.RegisterHost(request, timeout=_CALL_SECONDS)
        except grpc.aio.AioRpcError as error:
            if told != (told := f"{error.code().name}: {error.details()}"):
                log.warning("the coordinator does not take this host", code=error.code().name, error=error.details())
            await pauses.pause()
        else:
            pauses.succeeded()
            drop_implausible(response)
            asked = response.heartbeat_interval.ToNanoseconds() / 1e9
            if told != (told := "registered"):
                log.info("registered with the coordinator")
            shortest, longest = _HEARTBEAT_SECONDS
            await clock.sleep(min(max(asked, shortest), longest))
