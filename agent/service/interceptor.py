"""The outermost interceptor: checks each request before its handler sees it, and converts each error to a Drover error.

Calls of health and reflection are only counted. Never logged: requests and responses (cookies, XML), and the message of an
unexpected exception from the first ``<`` or byte string on."""

from __future__ import annotations  # the stubs of grpc are generic, its classes are not

import inspect
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, cast

import grpc
import grpc.aio
import structlog
from google.protobuf.message import Message

from agent.runtime.errors import DroverError, Reason
from agent.runtime.events import Bus, CallHandled
from agent.service.bounds import check_request
from agent.service.connections import Calls
from agent.service.identity import current_caller, set_caller
from agent.service.rights import RIGHTS, Right
from agent.service.status import to_status, trailing_metadata

_log = structlog.get_logger("drover.rpc")

OUR_SERVICES = "/drover."
MAX_LOGGED = 200
"""Characters that are logged of the message of an unexpected exception."""

_SECRET_MARKS = ("<", "b'", 'b"')

if TYPE_CHECKING:
    _Context = grpc.aio.ServicerContext[Any, Any]
    _Handler = grpc.RpcMethodHandler[Any, Any]
    _Unary = Callable[[Any, _Context], Awaitable[Any]]
    _Stream = Callable[[Any, _Context], AsyncIterator[Any]]


class _Malformed:
    """A request that is not a protobuf message of its type, which the handler's wrapper refuses. Our deserializer returns this
    instead of raising: grpcio would answer UNKNOWN and log a stack trace."""


@dataclass(frozen=True)
class _Method:
    """What the wrapper of a method's handler needs."""

    name: str
    right: Right
    calls: Calls
    bus: Bus

    @property
    def is_ours(self) -> bool:
        """Whether it is of a service of Drover; health and reflection are counted, and otherwise unchanged."""
        return self.name.startswith(OUR_SERVICES)

    @asynccontextmanager
    async def handled(self, request: Any, context: _Context) -> AsyncIterator[None]:
        """Name the caller, count the call, check its request, and end it with the status of the error that the block raises. Publish
        how it ended, also where its caller has left, unless it only reads."""
        started, reason, uri = time.monotonic(), "", context.peer()
        set_caller(uri)
        try:
            with self.calls.one(uri):
                if self.is_ours:
                    _check(self.name, request)
                yield
        except grpc.aio.AbortError:
            raise  # the handler has set a status itself
        except Exception as error:
            if not self.is_ours and not isinstance(error, DroverError):
                raise
            ours = _as_drover_error(self.name, error)
            reason = ours.reason
            await _abort(ours, context)
        except BaseException:  # the caller has left; what it asked for may go on
            reason = Reason.CANCELLED
            raise
        finally:
            self._publish(request, started, reason)

    def _publish(self, request: Any, started: float, reason: str) -> None:
        if self.right is not Right.READ:
            event = CallHandled(
                self.name,
                _migration_of(request),
                right=self.right,
                caller=str(current_caller()),
                milliseconds=round((time.monotonic() - started) * 1000, 2),
                reason=reason,
            )
            self.bus.publish(event)


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Must be the first of a server's interceptors. `calls` counts its calls; `bus` gets an event for each but reads."""

    def __init__(self, calls: Calls, bus: Bus) -> None:
        self._calls = calls
        self._bus = bus
        self._wrapped: dict[str, _Handler] = {}
        """By method, whose handler is the same at every call."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        method = handler_call_details.method
        if method not in self._wrapped:
            handler: Any = await continuation(handler_call_details) if method in RIGHTS else None
            if handler is None:
                return _unknown_method(method)  # not kept: a peer could fill the memory with names
            self._wrapped[method] = _wrap(_Method(method, RIGHTS[method], self._calls, self._bus), handler)
        return self._wrapped[method]


def _wrap(method: _Method, handler: Any) -> _Handler:
    for kind in ("unary_unary", "unary_stream", "stream_stream"):
        behavior = getattr(handler, kind)
        if behavior is not None:
            # Health writes the responses of its watch itself.
            streams = inspect.isasyncgenfunction(behavior) or (method.is_ours and kind == "unary_stream")
            deserializer = _tolerant(handler.request_deserializer) if method.is_ours else handler.request_deserializer
            make: Any = getattr(grpc, f"{kind}_rpc_method_handler")
            return cast(
                "_Handler", make((_stream if streams else _unary)(method, behavior), deserializer, handler.response_serializer)
            )
    raise NotImplementedError(f"{method.name} has a kind of handler that is not expected")


def _tolerant(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def deserializer(raw: bytes) -> Any:
        try:
            return deserialize(raw)
        except Exception:
            return _Malformed()

    return deserializer


def _unary(method: _Method, behavior: _Unary) -> _Unary:
    async def call(request: Any, context: _Context) -> Any:
        async with method.handled(request, context):
            return await behavior(request, context)

    return call


def _stream(method: _Method, behavior: _Stream) -> _Stream:
    async def call(request: Any, context: _Context) -> AsyncIterator[Any]:
        # Closed at once when the caller leaves, not when the garbage collector finds it.
        async with method.handled(request, context), aclosing(_generator(behavior(request, context))) as responses:
            async for response in responses:
                yield response

    return call


def _generator(responses: Any) -> Any:
    if not hasattr(responses, "aclose"):
        raise NotImplementedError("a streaming handler must be an async generator")
    return responses


def _check(method: str, request: Any) -> None:
    if isinstance(request, _Malformed):
        raise DroverError(Reason.INVALID_FIELD, f"the request of {method} is not a protobuf message of its type; nothing was done")
    check_request(request)


async def _abort(error: DroverError, context: _Context) -> NoReturn:
    status = to_status(error)
    await context.abort(error.code, status.message, trailing_metadata(status))
    raise AssertionError("abort() always raises")


def _as_drover_error(method: str, error: Exception) -> DroverError:
    if isinstance(error, DroverError):
        return error
    if isinstance(error, NotImplementedError):
        return DroverError(Reason.UNIMPLEMENTED, f"{method} is not implemented here")
    frames = "".join(traceback.format_tb(error.__traceback__))
    name = type(error).__name__
    _log.error("unexpected error (bug)", method=method, error=name, message=_without_secrets(str(error)), trace=frames)
    text = f"unexpected error (bug) in {method} ({name}); see the log of this process. The call may have taken effect"
    return DroverError(Reason.INTERNAL, f"{text}: read the record or the migration", metadata={"exception": name})


def _without_secrets(message: str) -> str:
    cuts = [position for mark in _SECRET_MARKS if (position := message.find(mark)) >= 0]
    return " ".join(message[: min([*cuts, MAX_LOGGED])].split())


def _migration_of(request: Any) -> str:
    """Return the id of the migration that a request is about, or empty. Unchecked: an invalid request may hold anything."""
    if not isinstance(request, Message):
        return ""
    named = getattr(request, "ref", request)
    return str(getattr(named, "migration_id", ""))[:36]


def _unknown_method(method: str) -> _Handler:
    async def call(request: Any, context: _Context) -> Any:
        error = DroverError(Reason.UNIMPLEMENTED, f"{method[:200]} is not known here; the reflection service lists the methods")
        await _abort(error, context)

    return grpc.unary_unary_rpc_method_handler(call)
