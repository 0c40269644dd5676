"""The Python client of a coordinator or of one agent. Import it from here: ``from coordinator.client import Busy, Client``.

`client` has the class `Client`, `errors` the tree of its errors, `types` and `host_types` what it returns, `request` has what
may be asked of a migration.
"""

import importlib
from typing import TYPE_CHECKING, Any

from coordinator.client.client import UNKNOWN_PATIENCE, Client
from coordinator.client.errors import (
    Busy,
    DeadlineExceeded,
    DroverClientError,
    InvalidRequest,
    MigrationCancelled,
    MigrationFailed,
    NotFound,
    OutcomeUnknown,
    Refused,
    ServerFailed,
    Unreachable,
    raise_unless_succeeded,
)

if TYPE_CHECKING:
    from agent.hypervisor.options import Options
    from coordinator.client.host_types import (
        Domain,
        DomainList,
        DomainState,
        Host,
        HostState,
        Interface,
        Network,
        SettingsChange,
        Slot,
    )
    from coordinator.client.networks import ClusterNetwork, NetworkDetails, Networks
    from coordinator.client.types import Failure, Migration, MigrationState, PhaseTiming, Progress, Wait

__all__ = [
    "UNKNOWN_PATIENCE",
    "Busy",
    "Client",
    "ClusterNetwork",
    "DeadlineExceeded",
    "Domain",
    "DomainList",
    "DomainState",
    "DroverClientError",
    "Failure",
    "Host",
    "HostState",
    "Interface",
    "InvalidRequest",
    "Migration",
    "MigrationCancelled",
    "MigrationFailed",
    "MigrationState",
    "Network",
    "NetworkDetails",
    "Networks",
    "NotFound",
    "Options",
    "OutcomeUnknown",
    "PhaseTiming",
    "Progress",
    "Refused",
    "ServerFailed",
    "SettingsChange",
    "Slot",
    "Unreachable",
    "Wait",
    "raise_unless_succeeded",
]

_LATER = ("coordinator.client.types", "coordinator.client.host_types", "coordinator.client.networks", "agent.hypervisor.options")
"""Modules of the types that the client takes and returns, imported at their first use so that a migration starts sooner."""


def __getattr__(name: str) -> Any:
    for module in _LATER if name in __all__ else ():
        if hasattr(found := importlib.import_module(module), name):
            return getattr(found, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
