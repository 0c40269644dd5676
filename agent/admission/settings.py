"""The limits of a host: those of the configuration file, and what was changed while the agent runs."""

import time
from dataclasses import dataclass
from typing import Final, Literal

import msgspec

from agent.admission.values import Direction, Limits
from agent.runtime.errors import invalid_field
from agent.runtime.masks import masked
from agent.runtime.wire import timestamp
from drover.agent.v1 import host_pb2 as pb

MOST: Final = 1000
"""Highest value of a limit, as in the configuration file."""

_LIMITS: Final[tuple[Literal["incoming_limit", "outgoing_limit", "prepared_limit"], ...]] = (
    "incoming_limit",
    "outgoing_limit",
    "prepared_limit",
)


@dataclass(frozen=True)
class Configured:
    """The limits of the configuration file."""

    incoming_limit: int = 2
    outgoing_limit: int = 2
    prepared_limit: int = 1
    slot_unit_memory: int = 0


class Change(msgspec.Struct, frozen=True):
    """Who changed settings, when (Unix time), and why."""

    changed_by: str
    time: float
    comment: str

    def to_proto(self) -> pb.SettingsChange:
        return pb.SettingsChange(changed_by=self.changed_by, change_time=timestamp(self.time), comment=self.comment)


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What was changed while the agent runs, and by whom. None: as configured."""

    incoming_limit: int | None = None
    outgoing_limit: int | None = None
    prepared_limit: int | None = None
    cordoned: bool = False
    change: Change | None = None
    """Last change of a limit."""
    cordon_change: Change | None = None

    def limits(self, direction: Direction, configured: Configured) -> Limits:
        """Return the limits that hold now."""
        now: dict[str, int] = {name: getattr(configured, name) for name in _LIMITS}
        now |= {name: limit for name in _LIMITS if (limit := getattr(self, name)) is not None}
        return Limits(now[f"{direction}_limit"], now["prepared_limit"], configured.slot_unit_memory)

    def changed(self, request: pb.UpdateHostRequest) -> "Settings":
        """Return the settings after an UpdateHost. Raises INVALID_FIELD; then nothing is changed."""
        after, fields = masked(self._to_proto(), request.settings, request.update_mask), set(request.update_mask.paths)
        limits = {name: getattr(after, name) if after.HasField(name) else None for name in _LIMITS}
        for name, limit in limits.items():
            if limit is not None and not 0 <= limit <= MOST:
                raise invalid_field(f"settings.{name}", f"must be 0 to {MOST}, not {limit}")
        change = Change(request.change.changed_by, time.time(), request.change.comment)
        return msgspec.structs.replace(
            self,
            **limits,
            cordoned=after.cordoned,
            change=change if fields & set(_LIMITS) else self.change,
            cordon_change=change if "cordoned" in fields else self.cordon_change,
        )

    def _to_proto(self) -> pb.HostSettings:
        limits = {name: getattr(self, name) for name in _LIMITS}
        return pb.HostSettings(cordoned=self.cordoned, **limits)

    def show(self, host: pb.Host) -> None:
        """Write them into a host's description."""
        host.settings.CopyFrom(self._to_proto())
        if self.change is not None:
            host.settings_change.CopyFrom(self.change.to_proto())
        if self.cordon_change is not None:
            host.cordon_change.CopyFrom(self.cordon_change.to_proto())
