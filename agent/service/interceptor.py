"""The outermost interceptor: checks each request before its handler sees it, and converts each error to a Drover error.

Calls of health and reflection are only counted. Never logged: requests and responses (cookies, XML), and the message of an
unexpected exception from the first ``<`` or byte string on."""

from __future__ import annotations  # the stubs of grpc are generic, its classes are not

import inspect
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, aclosing
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

    def entered(self, context: _Context) -> AbstractContextManager[None]:
        """Set the caller, and count the call while the block runs. Raises OVERLOADED."""
        uri = context.peer()
        set_caller(uri)
        return self.calls.one(uri)

    def publish(self, request: Any, started: float, reason: str = "") -> None:
        """Publish a call that has ended, unless it only reads."""
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
    if not method.name.startswith(OUR_SERVICES):
        return _wrap_counted(method, handler)
    coders = _tolerant(handler.request_deserializer), handler.response_serializer
    if handler.unary_unary is not None:
        return grpc.unary_unary_rpc_method_handler(_unary(method, handler.unary_unary), *coders)
    if handler.unary_stream is not None:
        return grpc.unary_stream_rpc_method_handler(_stream(method, handler.unary_stream), *coders)
    raise NotImplementedError(f"{method.name}: the wire has no streams of requests")


def _wrap_counted(method: _Method, handler: Any) -> _Handler:
    """Wrap a handler of health or reflection, which is counted and otherwise unchanged."""
    for kind in ("unary_unary", "unary_stream", "stream_stream"):
        behavior = getattr(handler, kind)
        if behavior is not None:
            counted = (_counted_stream if inspect.isasyncgenfunction(behavior) else _counted)(method, behavior)
            make: Any = getattr(grpc, f"{kind}_rpc_method_handler")
            return cast("_Handler", make(counted, handler.request_deserializer, handler.response_serializer))
    raise NotImplementedError("neither health nor reflection has such a call")


def _tolerant(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def deserializer(raw: bytes) -> Any:
        try:
            return deserialize(raw)
        except Exception:
            return _Malformed()

    return deserializer


def _unary(method: _Method, behavior: _Unary) -> _Unary:
    async def call(request: Any, context: _Context) -> Any:
        started = time.monotonic()
        try:
            with method.entered(context):
                _check(method.name, request)
                response = await behavior(request, context)
        except Exception as error:
            await _fail(method, request, started, error, context)
        method.publish(request, started)
        return response

    return call


def _stream(method: _Method, behavior: _Stream) -> _Stream:
    async def call(request: Any, context: _Context) -> AsyncIterator[Any]:
        started = time.monotonic()
        try:
            with method.entered(context):
                _check(method.name, request)
                # Closed at once when the caller leaves, not when the garbage collector finds it.
                async with aclosing(_generator(behavior(request, context))) as responses:
                    async for response in responses:
                        yield response
        except Exception as error:
            await _fail(method, request, started, error, context)

    return call


def _counted(method: _Method, behavior: _Unary) -> _Unary:
    async def call(request: Any, context: _Context) -> Any:
        try:
            with method.entered(context):
                return await behavior(request, context)
        except DroverError as error:
            await _abort(error, context)

    return call


def _counted_stream(method: _Method, behavior: _Stream) -> _Stream:
    async def call(request: Any, context: _Context) -> AsyncIterator[Any]:
        try:
            with method.entered(context):
                async with aclosing(_generator(behavior(request, context))) as responses:
                    async for response in responses:
                        yield response
        except DroverError as error:
            await _abort(error, context)

    return call


def _generator(responses: Any) -> Any:
    if not hasattr(responses, "aclose"):
        raise NotImplementedError("a streaming handler must be an async generator")
    return responses


def _check(method: str, request: Any) -> None:
    if isinstance(request, _Malformed):
        raise DroverError(Reason.INVALID_FIELD, f"the request of {method} is not a protobuf message of its type; nothing was done")
    check_request(request)


async def _fail(method: _Method, request: Any, started: float, error: Exception, context: _Context) -> NoReturn:
    """End the call with the status of the error. Always raises grpcio's `AbortError`."""
    if isinstance(error, grpc.aio.AbortError):
        raise error  # the handler has set a status itself
    ours = _as_drover_error(method.name, error)
    method.publish(request, started, ours.reason)
    await _abort(ours, context)


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
