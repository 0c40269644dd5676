"""Requests of the handshake, a plan for them, and waits for conditions without an event."""

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from agent.handshake.drive.driver import Driver
from agent.handshake.drive.plan import Plan
from agent.handshake.host.records import AttemptRecord, Role
from agent.hypervisor.wire import features_to_proto
from agent.runtime.errors import DroverError, Reason
from agent.runtime.failure import Failure
from drover.agent.v1 import handshake_pb2 as pb
from drover.agent.v1 import host_pb2, migration_pb2, options_pb2
from tests.unit.fake_hypervisor import FEATURES, UUID

ID = "6f1c0f4e-2f0a-4b5e-9d55-0d8f5a1e9b01"
REF = pb.AttemptRef(migration_id=ID, attempt=1)
ADDRESSES = {"h1": "127.92.0.1", "h2": "127.92.0.2", "h3": "127.92.0.3"}
PATIENCE = 20.0
"""Deadline in seconds of what ends soon, long enough for a busy machine."""
CANCELLED = Failure(Reason.CANCELLED, "cancelled on request")


def _answering() -> pb.PathProbe:
    """Answer on a destination's migration address, for sources that are tested without a destination."""
    nonce, listening = b"n" * 32, socket.create_server((ADDRESSES["h2"], 0))

    def answer() -> None:
        while True:
            with listening.accept()[0] as connection:
                connection.sendall(nonce)

    threading.Thread(target=answer, daemon=True).start()
    return pb.PathProbe(address=f"{ADDRESSES['h2']}:{listening.getsockname()[1]}", nonce=nonce)


PROBE = _answering()


def destination_record(state: str = "prepared", **fields: Any) -> pb.Record:
    """Return h2's record of the attempt, as a driver relays it."""
    values: dict[str, Any] = {"ref": REF, "host": "h2", "peer_host": "h1", "domain_uuid": UUID, "uri": "tcp://127.92.0.2:49152"}
    return pb.Record(**{**values, "state": pb.RecordState.Value(f"RECORD_STATE_{state.upper()}"), **fields})


def source_record(state: str, **fields: Any) -> pb.Record:
    """Return h1's record of the attempt, as a driver relays it."""
    return destination_record(state, **{"host": "h1", "peer_host": "h2", "uri": "", **fields})


async def until(condition: Callable[[], Any], within: float = PATIENCE) -> None:
    async with asyncio.timeout(within):
        while not condition():  # noqa: ASYNC110 - the facts of fakes have no event
            await asyncio.sleep(0.005)


async def finished(driver: Driver, within: float = PATIENCE) -> None:
    async with asyncio.timeout(within):
        await driver.run()


FIRST_EPOCH = (1 << 32) + 2
"""Of the first slot that the first life of an agent grants; its place was the number before."""


def make_plan(**changes: Any) -> Plan:
    values: dict[str, Any] = {
        "domain_name": "web1",
        "domain_uuid": UUID,
        "destination_name": "web1",
        "source_host": "h1",
        "source_agent": "10.91.0.1:7400",
        "destination_host": "h2",
        "destination_agent": "10.91.0.2:7400",
        "network": "mig",
        "uri": "",
        "settings": migration_pb2.MigrationSettings(),
        "options": options_pb2.Options(),
        "requirements": requirements(),
        "network_choice": migration_pb2.NetworkChoice(network="mig", destination_address=ADDRESSES["h2"]),
        "destination_features": features_to_proto(FEATURES),
    }
    return Plan(**{**values, **changes})


def requirements(uuid: str = UUID) -> host_pb2.GuestRequirements:
    return host_pb2.GuestRequirements(name="web1", uuid=uuid, memory_bytes=1 << 20, vcpus=1, arch="x86_64", machine="pc")


def reserve(**fields: Any) -> pb.ReserveSlotRequest:
    return pb.ReserveSlotRequest(
        **{"ref": REF, "requirements": requirements(), "source_host": "h1", "source_agent": "10.91.0.1:7400", **fields}
    )


def begin(**fields: Any) -> pb.BeginRequest:
    return pb.BeginRequest(
        **{"ref": REF, "domain": "web1", "destination_host": "h2", "destination_agent": "10.91.0.2:7400", "probe": PROBE, **fields}
    )


def prepare(epoch: int = FIRST_EPOCH, **fields: Any) -> pb.PrepareRequest:
    return pb.PrepareRequest(**{"ref": REF, "slot_epoch": epoch, "domain_xml": "<domain/>", "cookie_in": b"begun", **fields})


def perform(**fields: Any) -> pb.PerformRequest:
    return pb.PerformRequest(
        **{
            "ref": REF,
            "uri": "tcp://127.92.0.2:49152",
            "cookie_in": b"prepared",
            "destination_record": destination_record(),
            **fields,
        }
    )


def finish(**fields: Any) -> pb.FinishRequest:
    return pb.FinishRequest(**{"ref": REF, **fields})


def confirm(decision: pb.Decision.ValueType, **fields: Any) -> pb.ConfirmRequest:
    state = {pb.DECISION_RUNNING: "running", pb.DECISION_GONE: "gone"}.get(decision, "armed")
    return pb.ConfirmRequest(**{"ref": REF, "decision": decision, "destination_record": destination_record(state), **fields})


def statement(dead_host: str) -> pb.Statement:
    said = pb.Statement(dead_host=dead_host, reason="power pulled", said_by="root@admin1")
    said.say_time.GetCurrentTime()
    return said


def record(role: Role, state: str, **fields: Any) -> AttemptRecord:
    """Return a record as in a journal."""
    uris = {"uri": "tcp://127.92.0.2:49152", "domain_xml": "<domain/>"} if state not in ("reserved", "beginning") else {}
    values: dict[str, Any] = {
        "domain_name": "web1",
        "domain_uuid": UUID,
        "destination_name": "web1",
        "peer_host": "h2" if role is Role.SOURCE else "h1",
        "peer_agent": "10.91.0.2:7400",
        "epoch": FIRST_EPOCH,
        "proved": ADDRESSES["h2"],
        "listen": ADDRESSES["h2"] if role is Role.DESTINATION else "",
        "cookies": {"begin": b"begun", "prepare": b"prepared"},
        "revision": 5,
        **uris,
    }
    return AttemptRecord(role=role, state=state, **{"migration_id": ID, "attempt": 1, **values, **fields})


async def fails(call: Awaitable[Any], *reasons: Reason) -> DroverError:
    """Return the error that the call raises; its reason must be one of these."""
    with pytest.raises(DroverError) as raised:
        await call
    assert raised.value.reason in reasons
    return raised.value
