"""`drover.agent.v1.HandshakeService`, served by an engine."""

from typing import Final

from agent.handshake.host.engine import Engine
from agent.service.adapter import servicer_of
from drover.agent.v1 import handshake_pb2 as pb
from drover.agent.v1 import handshake_pb2_grpc as rpc

_DESCRIPTOR: Final = pb.DESCRIPTOR.services_by_name["HandshakeService"]
SERVICE: Final = _DESCRIPTOR.full_name


def handshake_servicer(engine: Engine) -> rpc.HandshakeServiceServicer:
    """Return the servicer of an engine: each RPC is the engine's method of that name."""
    servicer: rpc.HandshakeServiceServicer = servicer_of(rpc.HandshakeServiceServicer, _DESCRIPTOR, engine)
    return servicer
