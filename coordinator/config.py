"""The coordinator's configuration file; read it with `agent.runtime.configuration.load`."""

from typing import Annotated

import msgspec

from agent.migration.fencing import FencingConfig
from agent.runtime.configuration import Name, check_listen, check_path
from agent.runtime.log import LogLevel


class CoordinatorConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The keys of the coordinator's configuration file."""

    name: Name = "coordinator"
    listen: Annotated[tuple[str, ...], msgspec.Meta(min_length=1, max_length=16)] = ("unix:/run/drover/coordinator.sock",)
    """Addresses on which it serves: ``unix:/path`` or ``ip:port``."""
    state_dir: str = "/var/lib/drover/coordinator"
    """Directory of the store."""
    heartbeat_seconds: Annotated[float, msgspec.Meta(ge=0.1, le=300)] = 5
    """Interval at which agents send a sign of life. A host that is silent for three intervals counts as unreachable."""
    fencing: FencingConfig | None = None
    """The command that makes sure that a silent host is dead. None: only an operator can state it."""
    allow_insecure_tcp: bool = False
    """Serve TCP beyond loopback without encryption or identity. For test networks only."""
    log_level: LogLevel = "info"

    def __post_init__(self) -> None:
        check_listen(self.listen, self.allow_insecure_tcp)
        check_path("state_dir", self.state_dir)
