"""Servicers built from a service's descriptor: each RPC calls the method of its name in snake case."""

import functools
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import grpc.aio
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor

_Context = grpc.aio.ServicerContext[Any, Any]


def methods_of(service: ServiceDescriptor) -> Mapping[str, MethodDescriptor]:
    """Return the RPCs of a service by their names in snake case: ``ReserveSlot`` is ``reserve_slot``."""
    return {re.sub(r"(?<!^)(?=[A-Z])", "_", method.name).lower(): method for method in service.methods}


def servicer_of(base: Any, service: ServiceDescriptor, target: object) -> Any:
    """Return a servicer of the generated class `base`, whose RPCs call the methods of `target`: a unary one returns its response, a
    streaming one yields responses. Raises `AttributeError` for an RPC that `target` lacks."""
    body = {}
    for name, method in methods_of(service).items():
        body[method.name] = (_stream if method.server_streaming else _unary)(getattr(target, name))
    return type(base.__name__, (base,), body)()


def _unary(call: Callable[[Any], Awaitable[Any]]) -> Callable[[Any, Any, _Context], Awaitable[Any]]:
    @functools.wraps(call)
    async def serve(_servicer: Any, request: Any, _context: _Context) -> Any:
        return await call(request)

    return serve


def _stream(call: Callable[[Any], AsyncIterator[Any]]) -> Callable[[Any, Any, _Context], AsyncIterator[Any]]:
    @functools.wraps(call)
    async def serve(_servicer: Any, request: Any, _context: _Context) -> AsyncIterator[Any]:
        async for response in call(request):
            yield response

    return serve
