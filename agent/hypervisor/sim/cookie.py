"""The simulator's migration cookie."""

from typing import Annotated, Self

import msgspec
from msgspec import Meta

from agent.hypervisor.base import InvalidDocument
from agent.hypervisor.sim.config import Base
from agent.hypervisor.sim.stream import TOKEN_BYTES

MAX_COOKIE = 4096


class Cookie(Base, kw_only=True, frozen=True):
    host_uuid: Annotated[str, Meta(max_length=253)] = ""
    uuid: Annotated[str, Meta(max_length=36)] = ""
    token: Annotated[bytes, Meta(max_length=TOKEN_BYTES)] = b""

    def encode(self) -> bytes:
        return msgspec.json.encode(self)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Decode a cookie; an empty one gives the defaults. Raises `InvalidDocument` for one that is not the simulator's."""
        if not data:
            return cls()
        if len(data) > MAX_COOKIE:
            raise InvalidDocument(f"the cookie has {len(data)} bytes; at most {MAX_COOKIE} are accepted")
        try:
            return msgspec.json.decode(data, type=cls)
        except (msgspec.DecodeError, UnicodeError) as error:
            raise InvalidDocument(f"not a cookie of the simulator: {error}") from error
