"""Short blocking calls to daemons that may be dead, stopped or unreachable: each has a deadline, and a channel of its own.

Each call has a new channel, because an old one remembers failures and waits before it connects again. All calls use the
daemons' unix sockets, so a cut management network separates the hosts from each other, but not the judge from them.
"""

import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import grpc

from agent.runtime.wire import duration
from drover.agent.v1 import admission_pb2, admission_pb2_grpc, handshake_pb2, handshake_pb2_grpc, host_pb2, host_pb2_grpc
from drover.agent.v1 import migration_pb2 as pb
from drover.agent.v1 import migration_pb2_grpc as rpc
from tests.kit.cluster import Daemon

T = TypeVar("T")
Slots = Sequence[admission_pb2.SlotHolder]

QUESTION_SECONDS = 3.0
"""Deadline of a query. A daemon that takes longer counts as silent."""

START_SECONDS = 15.0
"""Deadline of a start, which asks both hosts and takes the slot."""

PATIENCE_SECONDS = 8.0
"""Time for which hosts may be unknown or unreachable after a restart."""

FINAL = (pb.MIGRATION_STATE_SUCCEEDED, pb.MIGRATION_STATE_FAILED, pb.MIGRATION_STATE_CANCELLED)
RECORD_FINAL = frozenset({"removed", "kept", "running", "gone"})


class SilentError(Exception):
    """A daemon that gave no answer, or an error; the message says which."""


def ask(daemon: Daemon, call: Callable[[grpc.Channel], T]) -> T:
    """Return the result of `call` on a new channel to the daemon. Raises `SilentError`."""
    with grpc.insecure_channel(daemon.address) as channel:
        try:
            return call(channel)
        except grpc.RpcError as error:
            raise SilentError(f"{daemon.name}: {_details(error)}") from None


def start(daemon: Daemon, migration_id: str, spec: pb.MigrationSpec, wait: float = 0.0) -> pb.Migration:
    """Ask a coordinator or an agent to migrate. `wait`: its slot_wait. Raises `SilentError`, also for a refusal."""
    request = pb.StartMigrationRequest(migration_id=migration_id, spec=spec)
    if wait:
        request.slot_wait.CopyFrom(duration(wait))
    return ask(daemon, lambda channel: rpc.MigrationServiceStub(channel).StartMigration(request, timeout=START_SECONDS)).migration


def start_until_accepted(
    daemon: Daemon, migration_id: str, spec: pb.MigrationSpec, give_up: Callable[[], bool], wait: float = 0.0
) -> str:
    """Ask for a migration, and again until `give_up` or `PATIENCE_SECONDS`: hosts that were cut off or restarted may not be known
    yet.

    Returns the last refusal; empty if it was accepted.
    """
    end = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            start(daemon, migration_id, spec, wait)
        except SilentError as error:
            if give_up() or time.monotonic() > end:
                return str(error)
            time.sleep(0.2)
        else:
            return ""


def cancel(daemon: Daemon, migration_id: str) -> None:
    """Cancel the migration. Raises `SilentError`."""
    request = pb.CancelMigrationRequest(migration_id=migration_id)
    ask(daemon, lambda channel: rpc.MigrationServiceStub(channel).CancelMigration(request, timeout=QUESTION_SECONDS))


def abandon(daemon: Daemon, migration_id: str, *, source_kept: bool = False) -> None:
    """Abandon a copy by hand, as an operator with grpcurl would. Raises `SilentError`, also for a refusal."""
    request = handshake_pb2.AbandonRequest(ref=reference(migration_id), request_id=new_id(), source_kept=source_kept)
    ask(daemon, lambda channel: handshake_pb2_grpc.HandshakeServiceStub(channel).Abandon(request, timeout=QUESTION_SECONDS))


def declare_dead(daemon: Daemon, migration_id: str, host: str) -> None:
    """State that a host is dead. Raises `SilentError`, also for a refusal: a statement counts only once the host does not answer."""
    statement = handshake_pb2.Statement(dead_host=host, reason="chaos", said_by="tests.bench")
    request = pb.ResolveMigrationRequest(migration_id=migration_id, request_id=new_id(), statement=statement)
    ask(daemon, lambda channel: rpc.MigrationServiceStub(channel).ResolveMigration(request, timeout=QUESTION_SECONDS))


def migration(daemon: Daemon, migration_id: str) -> pb.Migration | None:
    """Return the migration, or None if the daemon does not know it. Raises `SilentError`."""
    request = pb.GetMigrationRequest(migration_id=migration_id)

    def get(channel: grpc.Channel) -> pb.Migration:
        return rpc.MigrationServiceStub(channel).GetMigration(request, timeout=QUESTION_SECONDS).migration

    return ask(daemon, lambda channel: _known(lambda: get(channel)))


def record(agent: Daemon, migration_id: str) -> handshake_pb2.Record | None:
    """Return an agent's record of the newest attempt, or None if it has none. Raises `SilentError`."""
    request = handshake_pb2.GetRecordRequest(ref=handshake_pb2.AttemptRef(migration_id=migration_id))

    def get(channel: grpc.Channel) -> handshake_pb2.Record:
        return handshake_pb2_grpc.HandshakeServiceStub(channel).GetRecord(request, timeout=QUESTION_SECONDS).record

    return ask(agent, lambda channel: _known(lambda: get(channel)))


def slots(agent: Daemon) -> Slots:
    """Return the slots and the queues of both directions. Raises `SilentError`."""
    stub, request = admission_pb2_grpc.AdmissionServiceStub, admission_pb2.ListSlotsRequest(page_size=1000)
    return list(ask(agent, lambda channel: stub(channel).ListSlots(request, timeout=QUESTION_SECONDS)).slots)


def reference(migration_id: str) -> handshake_pb2.AttemptRef:
    return handshake_pb2.AttemptRef(migration_id=migration_id, attempt=1)


def update_host(agent: Daemon, settings: host_pb2.HostSettings) -> None:
    """Set the limits of a host, and whether it is cordoned, to these settings. Raises `SilentError`."""
    request = host_pb2.UpdateHostRequest(settings=settings)
    request.update_mask.paths[:] = host_pb2.HostSettings.DESCRIPTOR.fields_by_name
    ask(agent, lambda channel: host_pb2_grpc.HostServiceStub(channel).UpdateHost(request, timeout=QUESTION_SECONDS))


def new_id() -> str:
    return str(uuid.uuid4())


def state_of(found: pb.Migration) -> str:
    """Return the state in lower case, such as "succeeded"."""
    return pb.MigrationState.Name(found.state).removeprefix("MIGRATION_STATE_").lower()


def record_state(found: handshake_pb2.Record | None) -> str:
    """Return the state in lower case, such as "armed"; "none" if there is no record."""
    return "none" if found is None else handshake_pb2.RecordState.Name(found.state).removeprefix("RECORD_STATE_").lower()


def _known(call: Callable[[], T]) -> T | None:
    try:
        return call()
    except grpc.RpcError as error:
        if _code(error) is grpc.StatusCode.NOT_FOUND:
            return None
        raise


def _code(error: Any) -> grpc.StatusCode:
    code: grpc.StatusCode = error.code()
    return code


def _details(error: Any) -> str:
    return f"{_code(error).name}: {error.details()}"
