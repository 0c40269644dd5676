"""What a client asks of a migration, and the requests that it becomes."""

import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, Literal, TypedDict

from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask

from agent.runtime.errors import Reason
from coordinator.client.errors import InvalidRequest
from drover.agent.v1 import migration_pb2, options_pb2

if TYPE_CHECKING:
    from agent.hypervisor.options import Options

Importance = Literal["low", "medium", "high"]
WaitMode = Literal["wait", "fail-fast", "hybrid"]
"""What to do when the slots are taken; the first and the last need a `slot_wait`. wait: in the queues of the hosts. fail-fast: raise
`Busy` at once. hybrid: a named host as wait; any host: wait only if all are busy."""


class Changeable(TypedDict, total=False):
    """What may be changed while a migration waits or runs."""

    importance: "Importance | None"
    bandwidth: int
    """Most bytes per second. 0: no limit; at the start, that of the guest's own settings or of the network."""
    min_bandwidth: int
    """Least bytes per second that it is guaranteed. 0: none; at the start, that of the guest's own settings."""
    max_downtime: float
    """Longest pause of the guest at the switch-over, in seconds. 0: the hypervisor's default."""
    slot_wait: float
    """Seconds for which it may wait for its slots, from the start on, also while a host is away later. 0: it does not wait."""


class Asked(Changeable, total=False):
    """What may be asked of a new migration."""

    source: str
    """Name of the source host. Empty: the host that has the guest."""
    name: str
    """Name of the guest at the destination. Empty: unchanged."""
    network: str
    """Network for the guest's memory. Empty: chosen by Drover."""
    uri: str
    """Migration URI at the destination. Empty: proposed by it."""
    tenant: str
    """Tenant of the guest. Empty: that of its own settings."""
    wait_mode: "WaitMode | None"
    """None: wait with a `slot_wait`, fail-fast without."""
    options: "Options | None"
    migration_id: str
    """Yours, a UUID; empty: a new one. Repeating the call with the same id is safe, also after `Unreachable`."""


def start_request(domain: str, to: str, asked: Asked) -> migration_pb2.StartMigrationRequest:
    """Raises `InvalidRequest`."""
    spec = migration_pb2.MigrationSpec(
        domain=domain,
        destination_host=to,
        source_host=asked.get("source", ""),
        destination_name=asked.get("name", ""),
        network=asked.get("network", ""),
        uri=asked.get("uri", ""),
        tenant=asked.get("tenant", ""),
        options=options_message(asked.get("options")),
        importance=_value(migration_pb2.Importance, "importance", asked.get("importance")),
        wait_mode=_value(migration_pb2.WaitMode, "wait mode", asked.get("wait_mode")),
        bandwidth_bytes_per_second=asked.get("bandwidth", 0),
        min_bandwidth_bytes_per_second=asked.get("min_bandwidth", 0),
        max_downtime=_seconds(asked.get("max_downtime", 0.0)),
    )
    migration_id = asked.get("migration_id") or str(uuid.uuid4())
    return migration_pb2.StartMigrationRequest(migration_id=migration_id, spec=spec, slot_wait=_seconds(asked.get("slot_wait", 0.0)))


_FIELDS: Final[Mapping[str, str]] = {
    "bandwidth": "bandwidth_bytes_per_second",
    "min_bandwidth": "min_bandwidth_bytes_per_second",
}
"""Names on the wire, where they differ."""


def update_request(migration_id: str, changes: Changeable) -> migration_pb2.UpdateMigrationRequest:
    """Return the request to change what is given. Raises `InvalidRequest`."""
    given: dict[str, Any] = {_FIELDS.get(name, name): value for name, value in changes.items()}
    mask = FieldMask(paths=list(given))
    for name in ("max_downtime", "slot_wait"):
        if name in given:
            given[name] = _seconds(given[name])
    if "importance" in given:
        given["importance"] = _value(migration_pb2.Importance, "importance", given["importance"])
    return migration_pb2.UpdateMigrationRequest(
        migration_id=migration_id,
        request_id=str(uuid.uuid4()),
        settings=migration_pb2.MigrationSettings(**given),
        update_mask=mask,
    )


def _seconds(seconds: float) -> Duration | None:
    if not seconds:
        return None
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration


def _value(enum: Any, what: str, name: str | None) -> Any:
    """Return the value of an enum on the wire; None is its first one. Raises `InvalidRequest`."""
    names = list(enum.keys())
    prefix = names[0].removesuffix("UNSPECIFIED")
    if name is None:
        return enum.Value(names[0])
    known = [each.removeprefix(prefix).lower().replace("_", "-") for each in names[1:]]
    if name not in known:
        expected = f"{', '.join(known[:-1])} or {known[-1]}"
        raise InvalidRequest(f'{what} "{name}": expected {expected}', reason=Reason.INVALID_FIELD)
    return enum.Value(names[1 + known.index(name)])


def options_message(options: "Options | None") -> options_pb2.Options | None:
    """Return the options as a message. Raises `InvalidRequest` for an unknown option, and for a value that it does not take."""
    if not options:
        return None
    from agent.hypervisor.options import OPTIONS, unknown_option  # noqa: PLC0415 - most migrations need no table

    for name, value in options.items():
        if name not in OPTIONS:
            raise InvalidRequest(unknown_option(name), reason=Reason.UNKNOWN_OPTION, metadata={"option": name})
        if problem := OPTIONS[name].problem(value):
            raise InvalidRequest(f'option "{name}": {problem}', reason=Reason.INVALID_FIELD)
    return options_pb2.Options(**options)
