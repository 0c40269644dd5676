"""The registration of this host with its coordinator, which then queries the host itself."""

from typing import Final

import grpc.aio
import structlog

from agent.runtime.backoff import REGISTRATION, SYSTEM_CLOCK, Clock, Pauses
from agent.service.host import AgentHost
from agent.service.implausible import drop_implausible
from drover.coordinator.v1 import host_pb2, host_pb2_grpc

log = structlog.get_logger()

_HEARTBEAT_SECONDS: Final = (1.0, 60.0)
"""Bounds of the interval between registrations that the coordinator asks for."""
_CALL_SECONDS: Final = 5.0


async def keep_registered(channel: grpc.aio.Channel, host: AgentHost, address: str, clock: Clock = SYSTEM_CLOCK) -> None:
    """Register this host at intervals for ever. A coordinator that is away or refuses is tried again; no migration waits for it."""
    stub = host_pb2_grpc.HostServiceStub(channel)
    outcome = ""  # the last outcome in the log: only a change is logged
    pauses = Pauses(REGISTRATION, clock)
    while True:
        try:
            # Coordinators of older versions use more than name and UUID.
            request = host_pb2.RegisterHostRequest(host=host.describe(), agent_address=address)
            response = await stub.RegisterHost(request, timeout=_CALL_SECONDS)
        except grpc.aio.AioRpcError as error:
            if outcome != (outcome := f"{error.code().name}: {error.details()}"):
                log.warning("the coordinator does not accept this host", code=error.code().name, error=error.details())
            await pauses.pause()
        else:
            pauses.succeeded()
            drop_implausible(response)
            asked = response.heartbeat_interval.ToNanoseconds() / 1e9
            if outcome != (outcome := "registered"):
                log.info("registered with the coordinator")
            shortest, longest = _HEARTBEAT_SECONDS
            await clock.sleep(min(max(asked, shortest), longest))
