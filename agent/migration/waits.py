"""What a migration waits for: the reason, its figures, and the text. Pure."""

from copy import deepcopy

from agent.admission.estimate import likely
from agent.handshake.drive.view import View
from agent.handshake.machines.destination import DestinationState as Dst
from agent.handshake.machines.source import SourceState as Src
from agent.runtime.errors import DroverError, Reason
from drover.agent.v1 import migration_pb2 as pb


def note_wait(migration: pb.Migration, view: View) -> None:
    """Write into the migration for what it waits: the reason, its figures if it is a slot, and the text; or nothing."""
    slot = _slot_wait(migration, view)
    migration.wait_reason = reason = _reason(migration, view, slot)
    migration.waiting_for = _text(migration, view, slot)[:1000]
    migration.ClearField("wait")
    if slot is not None and slot.reason == reason:
        migration.wait.CopyFrom(slot)
    elif reason:
        source = reason in (pb.WAIT_REASON_SOURCE, pb.WAIT_REASON_OUTGOING_SLOT) or "source" in view.silent_since
        host = migration.source_host if source else migration.destination_host
        migration.wait.CopyFrom(pb.Wait(reason=reason, host=host))


def _text(migration: pb.Migration, view: View, slot: pb.Wait | None) -> str:
    if view.disputed:
        here, there = migration.source_host, migration.destination_host
        return (
            f"{there} to give up its copy: it was declared dead, the guest goes on at {here}, and {there} reports that it runs "
            f"there, too. The agent of {there} asks again within half a minute and stops that copy; "
            f"`drover migration watch {migration.migration_id}` shows it"
        )
    if slot is not None:
        return wait_text(slot)
    if _waits_for_slot(migration, view):
        return view.waiting_for or slot_of(migration.destination_host)
    records = (view.source_record, view.destination_record)
    waits = dict.fromkeys((view.waiting_for, *(record.waiting_for for record in records if record is not None)))
    return "; ".join(wait for wait in waits if wait)


def _waits_for_slot(migration: pb.Migration, view: View) -> bool:
    return view.untouched and migration.state in (pb.MIGRATION_STATE_PENDING, pb.MIGRATION_STATE_CANCELLING)


def _reason(migration: pb.Migration, view: View, slot: pb.Wait | None) -> pb.WaitReason.ValueType:
    source, destination = view.source_record, view.destination_record
    kinds = {
        pb.WAIT_REASON_DISPUTED_COPY: view.disputed,
        pb.WAIT_REASON_HOST_UNREACHABLE: view.silent_since,
        view.held_up: view.held_up and slot is None and _waits_for_slot(migration, view),
        slot.reason if slot is not None else pb.WAIT_REASON_SLOT: slot is not None or _waits_for_slot(migration, view),
        pb.WAIT_REASON_DECISION: view.waiting_for and view.states == (Src.PERFORMED, Dst.ARMED),
        pb.WAIT_REASON_HOST_NOT_READY: view.waiting_for,
        pb.WAIT_REASON_SOURCE: source is not None and source.waiting_for,
        pb.WAIT_REASON_DESTINATION: destination is not None and destination.waiting_for,
    }
    return next((reason for reason, waits in kinds.items() if waits), pb.WAIT_REASON_UNSPECIFIED)


def _slot_wait(migration: pb.Migration, view: View) -> pb.Wait | None:
    """Return the wait for a slot, with the hosts that could take the guest now; None: it waits for none, or a host is silent."""
    if view.wait is None or view.silent_since:
        return None
    wait = deepcopy(view.wait)
    if wait.reason == pb.WAIT_REASON_SLOT and not migration.spec.destination_host:
        wait.reason = pb.WAIT_REASON_ANY_HOST
    if view.untouched:
        wait.alternative_hosts.extend(view.alternatives)
    return wait


def error_waited_for(host: str, error: DroverError) -> str:
    """Return what a migration without a slot waits for, after an error."""
    if error.reason is Reason.BUSY and error.metadata.get("limit_value"):
        return f"{slot_of(host)}: {error.metadata.get('in_use')} of {error.metadata.get('limit_value')} are taken"
    return f"{error.message} (retrying)"


def slot_of(host: str, reason: pb.WaitReason.ValueType = pb.WAIT_REASON_SLOT) -> str:
    if reason == pb.WAIT_REASON_ANY_HOST:
        return f"a host that can take the guest, such as {host}"
    return f"an {'outgoing' if reason == pb.WAIT_REASON_OUTGOING_SLOT else 'incoming'} slot of {host}"


def wait_text(wait: pb.Wait) -> str:
    """Return what a migration waits for, for a person."""
    parts = [slot_of(wait.host, wait.reason)]
    if wait.limit:
        parts.append(f"{wait.in_use} of {wait.limit_value} are taken")
    if wait.position:
        parts.append(f"place {wait.position} of {max(wait.position, wait.queue_length)}")
    if wait.HasField("estimate_low") or wait.HasField("estimate_high"):
        low, high = wait.estimate_low.ToNanoseconds() / 1e9, wait.estimate_high.ToNanoseconds() / 1e9
        parts.append(f"likely {likely(low, high)}")
    if wait.alternative_hosts:
        parts.append(f"free now: {', '.join(wait.alternative_hosts)}")
    return f"{parts[0]}: {', '.join(parts[1:])}" if parts[1:] else parts[0]


def out_of_time(wait: pb.Wait) -> DroverError:
    """Return the BUSY of a migration whose time to wait is over, with the figures of its last wait."""
    figures = {name: getattr(wait, name) for name in ("limit", "limit_value", "in_use", "position", "queue_length", "host")}
    figures |= {"holders": ",".join(wait.holders), "alternatives": ",".join(wait.alternative_hosts)}
    text = f"it waited for {wait_text(wait)}. Nothing was done to the guest"
    return DroverError(Reason.BUSY, text, metadata={key: str(value) for key, value in figures.items() if value})
