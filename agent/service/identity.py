"""Who makes a call, as this server sees it; nothing that the caller says of itself.

gRPC tells neither which connection of a unix socket a call came by nor its peer credentials. What is known of such a caller comes
from the kernel all the same: the socket's mode is 0600 (`agent.service.server`), so only its owner and root can connect.
"""

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
    """Address and port of the other end; empty for a unix socket."""
    uid: int | None
    """Owner of the unix socket; root passes for it. None over TCP."""

    def __str__(self) -> str:
        return self.address if self.uid is None else f"{self.transport}:uid={self.uid}"


_caller: ContextVar[Caller | None] = ContextVar("caller", default=None)


def current_caller() -> Caller | None:
    """The caller of the RPC that this task handles, or that started this task. None: no RPC did."""
    return _caller.get()


def set_caller(uri: str) -> None:
    """For the rest of this task and the tasks that it starts. `uri`: what gRPC's ``context.peer()`` returns."""
    _caller.set(caller_of(uri))


@functools.lru_cache(maxsize=1024)
def caller_of(uri: str) -> Caller:
    """The caller at an address in gRPC's form: ``ipv4:10.91.0.2:55010``, ``ipv6:%5Bfd92::1%5D:55010`` or ``unix:``."""
    family, _, address = uri.partition(":")
    return Caller("unix", "", os.geteuid()) if family == "unix" else Caller("tcp", unquote(address), None)
