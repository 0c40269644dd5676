"""Servicers built from a service's descriptor: each RPC calls the method of its name in snake case."""

from collections.abc import Callable
from typing import Any

from google.protobuf.descriptor import ServiceDescriptor

from agent.runtime.wire import methods_of


def servicer_of(base: Any, service: ServiceDescriptor, target: object) -> Any:
    """Return a servicer of the generated class `base`, whose RPCs call the methods of `target`: a unary one returns its response, a
    streaming one yields responses. Raises `AttributeError` for an RPC that `target` lacks."""
    body = {method.name: _served(getattr(target, name)) for name, method in methods_of(service).items()}
    return type(base.__name__, (base,), body)()


def _served(call: Callable[[Any], Any]) -> Callable[[Any, Any, Any], Any]:
    """Return the handler of an RPC: it returns what `call` returns, a coroutine or an async generator."""
    return lambda _servicer, request, _context: call(request)
