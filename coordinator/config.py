"""The coordinator's configuration; read with `agent.config.load`."""

from typing import Annotated

import msgspec

from agent.config import ConfigError, Name, check_listen, check_path, load
from agent.migration.fencing import FencingConfig
from agent.runtime.log import LogLevel

__all__ = ["ConfigError", "CoordinatorConfig", "load"]


class CoordinatorConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The coordinator of a cluster."""

    name: Name = "coordinator"
    listen: Annotated[tuple[str, ...], msgspec.Meta(min_length=1, max_length=16)] = ("unix:/run/drover/coordinator.sock",)
    """Addresses on which it serves: ``unix:/path`` or ``ip:port``."""
    state_dir: str = "/var/lib/drover/coordinator"
    """Directory of the store."""
    heartbeat_seconds: Annotated[float, msgspec.Meta(ge=0.1, le=300)] = 5
    """Agents say this often that they are there; after three times this a host counts as unreachable."""
    fencing: FencingConfig | None = None
    """What makes sure that a host which never comes back is dead. None: only an operator can say so."""
    allow_insecure_tcp: bool = False
    """Serve TCP beyond loopback with neither encryption nor identity. For test networks only."""
    log_level: LogLevel = "info"

    def __post_init__(self) -> None:
        check_listen(self.listen, self.allow_insecure_tcp)
        check_path("state_dir", self.state_dir)
