"""Channels to agents and coordinators."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc.aio

from agent.runtime.address import parse_address

MAX_MESSAGE_BYTES = 1 << 20
"""1 MiB: domain XML (512 KiB) and a cookie (64 KiB) with room to spare. The same in both directions, on both ends."""

KEEPALIVE_SECONDS = 10
"""Silence after which a peer is pinged."""
KEEPALIVE_TIMEOUT_SECONDS = 5
"""A ping that is not answered for this long ends the connection, and every call on it with UNAVAILABLE."""
MAX_RECONNECT_BACKOFF_SECONDS = 1
"""A peer that comes back is reconnected within about this time; a mesh of hosts is small, so this causes no storm."""

KEEPALIVE_OPTIONS = (
    ("grpc.keepalive_time_ms", KEEPALIVE_SECONDS * 1000),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_SECONDS * 1000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
)
"""The same for servers and channels."""

_RETRY = {
    "methodConfig": [
        {
            "name": [{}],
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.1s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
            },
        }
    ]
}
"""A peer that restarts or is overloaded is no error: every call is idempotent, so it is repeated for about two seconds. gRPC's core
answers CANCELLED in both cases; a call that is cancelled on this side is not repeated."""

_CHANNEL_OPTIONS = (
    *KEEPALIVE_OPTIONS,
    ("grpc.service_config", json.dumps(_RETRY)),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", MAX_RECONNECT_BACKOFF_SECONDS * 1000),
    ("grpc.max_reconnect_backoff_ms", MAX_RECONNECT_BACKOFF_SECONDS * 1000),
    # A proxy from the environment would carry the handshake of two hosts through a third.
    ("grpc.enable_http_proxy", 0),
    # Channels to one address would otherwise share one connection and its backoff after a failure.
    ("grpc.use_local_subchannel_pool", 1),
)


def open_channel(address: str) -> grpc.aio.Channel:
    """Return a channel to ``ip:port`` or ``unix:/path``. It connects at the first call and reconnects by itself; close it when done.

    Not encrypted until mutual TLS exists: for unix sockets, and where the operator allowed it. Raises `ValueError` for an invalid
    address."""
    parsed = parse_address(address)
    return grpc.aio.insecure_channel(str(parsed), options=_CHANNEL_OPTIONS)


async def all_pages(ask: Callable[[Any], Awaitable[Any]], request: Any) -> AsyncIterator[Any]:
    """Yield every answer of a list call (`agent.runtime.paging`), which `ask` makes. Changes `request`."""
    while True:
        response = await ask(request)
        yield response
        if not response.next_page_token:
            return
        request.page_token = response.next_page_token
