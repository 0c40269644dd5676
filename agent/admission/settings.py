"""The limits of a host: those of the configuration file, and what was changed while the agent runs."""

import time
from dataclasses import dataclass
from typing import Final

import msgspec

from agent.admission.values import Direction, Limits
from agent.runtime.errors import invalid_field
from agent.runtime.wire import timestamp
from drover.agent.v1 import host_pb2 as pb

MOST: Final = 1000
"""Highest value of a limit, as in the configuration file."""

_LIMITS: Final = ("incoming_limit", "outgoing_limit", "prepared_limit")


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

        def value(name: str) -> int:
            changed: int | None = getattr(self, name)
            return getattr(configured, name) if changed is None else changed

        return Limits(value(f"{direction}_limit"), value("prepared_limit"), configured.slot_unit_memory)

    def changed(self, request: pb.UpdateHostRequest) -> "Settings":
        """Return the settings after an UpdateHost. Raises INVALID_FIELD; then nothing is changed."""
        fields = list(request.update_mask.paths)
        if not fields:
            raise invalid_field(
                "update_mask", f"must name the fields to change, of {', '.join(pb.HostSettings.DESCRIPTOR.fields_by_name)}"
            )
        changes: dict[str, object] = {}
        for field in fields:
            if field in _LIMITS:
                given = request.settings.HasField(field)  # type: ignore[arg-type]
                limit: int | None = getattr(request.settings, field) if given else None
                if limit is not None and not 0 <= limit <= MOST:
                    raise invalid_field(f"settings.{field}", f"must be 0 to {MOST}, not {limit}")
                changes[field] = limit
            elif field == "cordoned":
                changes[field] = request.settings.cordoned
            else:
                raise invalid_field("update_mask", f'"{field}" is no field that can be changed')
        change = Change(request.change.changed_by, time.time(), request.change.comment)
        if "cordoned" in changes:
            changes["cordon_change"] = change
        if changes.keys() & set(_LIMITS):
            changes["change"] = change
        return msgspec.structs.replace(self, **changes)

    def show(self, host: pb.Host) -> None:
        """Write them into a host's description."""
        host.settings.cordoned = self.cordoned
        for name in _LIMITS:
            if getattr(self, name) is not None:
                setattr(host.settings, name, getattr(self, name))
        if self.change is not None:
            host.settings_change.CopyFrom(self.change.to_proto())
        if self.cordon_change is not None:
            host.cordon_change.CopyFrom(self.cordon_change.to_proto())
