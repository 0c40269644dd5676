"""The client of another host's agent."""

import contextlib
import functools
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Final

import grpc.aio
from google.protobuf.descriptor import ServiceDescriptor

from agent.handshake.host.phases import wait_of
from agent.handshake.host.signs import MAX_WAIT
from agent.runtime.breaker import Breaker
from agent.runtime.errors import Reason
from agent.runtime.wire import methods_of
from agent.service.bounds import checked_answer
from agent.service.status import errors_of
from drover.agent.v1 import admission_pb2, admission_pb2_grpc, handshake_pb2_grpc, host_pb2, host_pb2_grpc
from drover.agent.v1 import handshake_pb2 as pb

CALL_SECONDS: Final = MAX_WAIT + 10.0
"""Deadline of a call that waits for the hypervisor."""
QUESTION_SECONDS: Final = 5.0
"""Deadline of a call that does not; a call with a `wait` has this much more."""

_STUBS: Final[Mapping[ServiceDescriptor, Any]] = {
    pb.DESCRIPTOR.services_by_name["HandshakeService"]: handshake_pb2_grpc.HandshakeServiceStub,
    admission_pb2.DESCRIPTOR.services_by_name["AdmissionService"]: admission_pb2_grpc.AdmissionServiceStub,
    host_pb2.DESCRIPTOR.services_by_name["HostService"]: host_pb2_grpc.HostServiceStub,
}
_METHODS: Final = {name: (method, stub) for service, stub in _STUBS.items() for name, method in methods_of(service).items()}
_QUESTIONS: Final = frozenset(
    {"reserve_slot", "release_slot", "list_slots", "get_record", "get_host", "get_domain", "set_bandwidth", "set_max_downtime"}
)
"""Calls that answer at once, or are repeated soon. All others may wait for the hypervisor."""

_BEFORE: Final = frozenset({"AcquireSlot", "ReserveSlot"})
"""Calls before anything is done to a guest, which many migrations that wait repeat: a breaker keeps them from a silent host."""

NO_ANSWER: Final = frozenset({Reason.HOST_UNREACHABLE, Reason.DEADLINE_EXCEEDED})
"""Errors that mean that a host does not answer."""


class RemotePeer:
    """An `OtherHost` over a channel: it has every method of these services in snake case, and checks each answer.

    `channel` returns the channel for a call (another one after the agent has moved), and its errors pass through. `name`: the
    host's, for errors. `heard` gets the record in each answer about an attempt; None if there was no answer. `breaker`: for calls
    before anything is done to a guest."""

    def __init__(
        self,
        channel: Callable[[], grpc.aio.Channel],
        name: str,
        heard: Callable[[pb.AttemptRef, pb.Record | None], None] = lambda _ref, _record: None,
        breaker: Breaker | None = None,
    ) -> None:
        self._channel = channel
        self._name = name
        self._heard = heard
        self._breaker = breaker
        self._made: tuple[grpc.aio.Channel, dict[Any, Any]] | None = None

    def __getattr__(self, name: str) -> Callable[[Any], Any]:
        if name not in _METHODS:
            raise AttributeError(f"{type(self).__name__} has no method {name}")
        method, stub = _METHODS[name]
        if method.server_streaming:
            return functools.partial(self._watch, method.name, stub)
        return functools.partial(self._call, method.name, stub, QUESTION_SECONDS if name in _QUESTIONS else CALL_SECONDS)

    async def _call(self, method: str, stub: Any, timeout: float, request: Any) -> Any:
        if "wait" in request.DESCRIPTOR.fields_by_name:
            timeout = wait_of(request.wait, unset=0.0) + QUESTION_SECONDS
        response = None
        try:
            breaker = self._breaker if method in _BEFORE else None
            with breaker.guard(self._name) if breaker is not None else contextlib.nullcontext(), errors_of(self._name):
                response = checked_answer(await getattr(self._stub(stub), method)(request, timeout=timeout), self._name)
        finally:
            if "ref" in request.DESCRIPTOR.fields_by_name:
                self._heard(request.ref, response.record if response is not None else None)
        return response

    async def _watch(self, method: str, stub: Any, request: Any) -> AsyncIterator[Any]:
        with errors_of(self._name):
            call = getattr(self._stub(stub), method)(request)
            try:
                async for response in call:
                    yield checked_answer(response, self._name)
            finally:
                call.cancel()  # otherwise, leaving the loop early leaks the call

    def _stub(self, stub: Any) -> Any:
        """Return the stub of that class, made once for each channel: it holds an object for each method."""
        channel = self._channel()
        if self._made is None or self._made[0] is not channel:
            self._made = channel, {}
        stubs = self._made[1]
        if stub not in stubs:
            stubs[stub] = stub(channel)
        return stubs[stub]
