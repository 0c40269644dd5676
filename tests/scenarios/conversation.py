"""Short ways to say to a cluster what scenarios say again and again."""

import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc.aio
from google.protobuf.field_mask_pb2 import FieldMask

from agent.runtime.wire import duration
from agent.service.channel import open_channel
from agent.service.remote_peer import RemotePeer
from agent.service.status import error_from_rpc
from drover.agent.v1 import handshake_pb2, host_pb2, host_pb2_grpc
from drover.agent.v1 import migration_pb2 as pb
from drover.agent.v1 import migration_pb2_grpc as rpc
from tests.kit.cluster import Cluster

FINAL = (pb.MIGRATION_STATE_SUCCEEDED, pb.MIGRATION_STATE_FAILED, pb.MIGRATION_STATE_CANCELLED)
MIB = 1 << 20
CRAWL = MIB
"""The least limit of a transfer: it does not end before it is told to, however long the test takes for what it does meanwhile."""


class Talk:
    """One program that speaks gRPC to the coordinator or an agent. Errors are `DroverError`s."""

    def __init__(self, address: str) -> None:
        self.channel = open_channel(address)
        self.migrations = rpc.MigrationServiceStub(self.channel)
        self.hosts = host_pb2_grpc.HostServiceStub(self.channel)
        self.handshake = RemotePeer(lambda: self.channel, address)

    async def __aenter__(self) -> "Talk":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.channel.close()

    async def call(self, method: Any, request: Any) -> Any:
        try:
            return await method(request, timeout=20)
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error, "the server") from None

    async def start(self, domain: str, to: str, migration_id: str = "", slot_wait: float = 0.0, **spec: Any) -> pb.Migration:
        request = pb.StartMigrationRequest(migration_id=migration_id or new_id(), slot_wait=duration(slot_wait))
        request.spec.CopyFrom(pb.MigrationSpec(domain=domain, destination_host=to, **spec))
        response: pb.StartMigrationResponse = await self.call(self.migrations.StartMigration, request)
        return response.migration

    async def watch(self, migration_id: str, until: Callable[[pb.Migration], bool]) -> pb.Migration:
        """The first state for which `until` holds."""
        call = self.migrations.WatchMigration(pb.WatchMigrationRequest(migration_id=migration_id), timeout=40)
        try:
            async for response in call:
                if until(response.migration):
                    return response.migration
        finally:
            call.cancel()
        raise AssertionError("the migration ended, and what was waited for never came")

    async def get(self, migration_id: str) -> pb.Migration:
        request = pb.GetMigrationRequest(migration_id=migration_id)
        response: pb.GetMigrationResponse = await self.call(self.migrations.GetMigration, request)
        return response.migration

    async def list(self, *, active_only: bool = False) -> pb.ListMigrationsResponse:
        request = pb.ListMigrationsRequest(active_only=active_only)
        response: pb.ListMigrationsResponse = await self.call(self.migrations.ListMigrations, request)
        return response

    async def changes(self, from_revision: int) -> AsyncIterator[pb.WatchMigrationsResponse]:
        """What a watch of all migrations says. Errors are `DroverError`s."""
        call = self.migrations.WatchMigrations(pb.WatchMigrationsRequest(from_revision=from_revision), timeout=40)
        try:
            async for response in call:
                yield response
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error, "the server") from None
        finally:
            call.cancel()

    async def end(self, migration_id: str) -> pb.Migration:
        return await self.watch(migration_id, lambda m: m.state in FINAL)

    async def migrate(self, domain: str, to: str, **spec: Any) -> pb.Migration:
        return await self.end((await self.start(domain, to, **spec)).migration_id)

    async def cancel(self, migration_id: str) -> None:
        await self.call(self.migrations.CancelMigration, pb.CancelMigrationRequest(migration_id=migration_id))

    async def host(self) -> host_pb2.Host:
        response: host_pb2.GetHostResponse = await self.call(self.hosts.GetHost, host_pb2.GetHostRequest())
        return response.host


async def update(talk: Talk, migration_id: str, **fields: Any) -> pb.Migration:
    """Change the fields that are given."""
    settings, mask = pb.MigrationSettings(**fields), FieldMask(paths=list(fields))
    request = pb.UpdateMigrationRequest(migration_id=migration_id, settings=settings, update_mask=mask)
    response: pb.UpdateMigrationResponse = await talk.call(talk.migrations.UpdateMigration, request)
    return response.migration


async def speed_up(talk: Talk, migration_id: str) -> None:
    """Take the limit away from a transfer that crawls."""
    await update(talk, migration_id, bandwidth_bytes_per_second=0)


def new_id() -> str:
    return str(uuid.uuid4())


def state(migration: pb.Migration) -> str:
    return pb.MigrationState.Name(migration.state).removeprefix("MIGRATION_STATE_").lower()


def record_state(record: handshake_pb2.Record) -> str:
    return handshake_pb2.RecordState.Name(record.state).removeprefix("RECORD_STATE_").lower()


async def assert_idle(cluster: Cluster) -> None:
    """No slot is taken on any host."""
    for name, agent in cluster.agents.items():
        async with Talk(agent.address) as talk:
            assert (await talk.host()).incoming_in_use == 0, f"{name} leaks a slot"


__all__ = ["CRAWL", "FINAL", "MIB", "Talk", "assert_idle", "duration", "new_id", "record_state", "speed_up", "state", "update"]
