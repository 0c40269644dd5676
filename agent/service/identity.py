"""The caller of an RPC as this server sees it, never as the caller claims.

gRPC reveals neither the connection nor the peer credentials of a call over a unix socket. The kernel vouches for such callers all
the same: the socket's mode is 0600 (`agent.service.server`), so only its owner and root can connect."""

import functools
import os
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal
from urllib.parse import unquote


@dataclass(frozen=True)
class Caller:
    transport: Literal["unix", "tcp"]
    address: str
    """Remote address and port; empty for a unix socket."""
    uid: int | None
    """Owner of the unix socket, which also stands for root. None over TCP."""

    def __str__(self) -> str:
        return self.address if self.uid is None else f"{self.transport}:uid={self.uid}"


_caller: ContextVar[Caller | None] = ContextVar("caller", default=None)


def current_caller() -> Caller | None:
    """Return the caller of the RPC that this task handles, or that started this task; None if no RPC did."""
    return _caller.get()


def set_caller(uri: str) -> None:
    """Set the caller for the rest of this task and the tasks that it starts. `uri`: from gRPC's ``context.peer()``."""
    _caller.set(caller_of(uri))


@functools.lru_cache(maxsize=1024)
def caller_of(uri: str) -> Caller:
    """Return the caller at an address in gRPC's form: ``ipv4:10.91.0.2:55010``, ``ipv6:%5Bfd92::1%5D:55010`` or ``unix:``."""
    family, _, address = uri.partition(":")
    return Caller("unix", "", os.geteuid()) if family == "unix" else Caller("tcp", unquote(address), None)
