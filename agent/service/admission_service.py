"""`drover.agent.v1.AdmissionService`, served by an engine."""

from typing import Final

from agent.handshake.host.engine import Engine
from agent.service.adapter import servicer_of
from drover.agent.v1 import admission_pb2 as pb
from drover.agent.v1 import admission_pb2_grpc as rpc

_DESCRIPTOR: Final = pb.DESCRIPTOR.services_by_name["AdmissionService"]
SERVICE: Final = _DESCRIPTOR.full_name


def admission_servicer(engine: Engine) -> rpc.AdmissionServiceServicer:
    """Return the servicer of an engine: each RPC is the engine's method of that name."""
    servicer: rpc.AdmissionServiceServicer = servicer_of(rpc.AdmissionServiceServicer, _DESCRIPTOR, engine)
    return servicer
