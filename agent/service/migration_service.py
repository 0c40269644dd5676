"""`drover.agent.v1.MigrationService`: a thin adapter over `agent.migration.migrations`, served by agents and by the coordinator."""

from collections.abc import AsyncIterator
from typing import Any

import grpc.aio

from agent.hypervisor.options import OPTIONS, Option, shown
from agent.migration.collection import newest_first
from agent.migration.migrations import Migrations
from agent.migration.uptime import with_age
from agent.runtime.paging import Paging
from drover.agent.v1 import migration_pb2 as pb
from drover.agent.v1 import migration_pb2_grpc as rpc

SERVICE = pb.DESCRIPTOR.services_by_name["MigrationService"].full_name

_Context = grpc.aio.ServicerContext[Any, Any]


class MigrationServicer(rpc.MigrationServiceServicer):
    def __init__(self, migrations: Migrations) -> None:
        self._migrations = migrations

    async def StartMigration(self, request: pb.StartMigrationRequest, context: _Context) -> pb.StartMigrationResponse:  # noqa: N802
        started = await self._migrations.start(request.migration_id, request.spec, request.slot_wait.ToNanoseconds() / 1e9)
        return pb.StartMigrationResponse(migration=with_age(started))

    async def GetMigration(self, request: pb.GetMigrationRequest, context: _Context) -> pb.GetMigrationResponse:  # noqa: N802
        return pb.GetMigrationResponse(migration=with_age(self._migrations.collection.get(request.migration_id).migration))

    async def ListMigrations(self, request: pb.ListMigrationsRequest, context: _Context) -> pb.ListMigrationsResponse:  # noqa: N802
        paging = Paging(request, int, int, str, default=100)
        listed = self._migrations.collection.list(active_only=request.active_only)
        page = paging.take((newest_first(migration), with_age(migration)) for migration in listed)
        return pb.ListMigrationsResponse(
            migrations=page.items, next_page_token=page.token, revision=self._migrations.collection.revision
        )

    async def WatchMigration(  # noqa: N802
        self, request: pb.WatchMigrationRequest, context: _Context
    ) -> AsyncIterator[pb.WatchMigrationResponse]:
        async for migration in self._migrations.collection.watch(request.migration_id, request.from_revision):
            yield pb.WatchMigrationResponse(migration=with_age(migration))

    async def WatchMigrations(  # noqa: N802
        self, request: pb.WatchMigrationsRequest, context: _Context
    ) -> AsyncIterator[pb.WatchMigrationsResponse]:
        async for change in self._migrations.collection.watch_all(request.from_revision):
            response = pb.WatchMigrationsResponse(revision=change.revision)
            if change.migration is not None:
                response.migration.CopyFrom(with_age(change.migration))
            elif change.removed:
                response.removed_migration_id = change.removed
            yield response

    async def DescribeOptions(self, request: pb.DescribeOptionsRequest, context: _Context) -> pb.DescribeOptionsResponse:  # noqa: N802
        return pb.DescribeOptionsResponse(options=[_description(option) for option in OPTIONS.values()])

    async def ResolveMigration(  # noqa: N802
        self, request: pb.ResolveMigrationRequest, context: _Context
    ) -> pb.ResolveMigrationResponse:
        return pb.ResolveMigrationResponse(
            migration=with_age(await self._migrations.resolve(request.migration_id, request.statement))
        )

    async def UpdateMigration(self, request: pb.UpdateMigrationRequest, context: _Context) -> pb.UpdateMigrationResponse:  # noqa: N802
        changed = await self._migrations.update(request.migration_id, request.settings, request.update_mask)
        return pb.UpdateMigrationResponse(migration=with_age(changed))

    async def CancelMigration(self, request: pb.CancelMigrationRequest, context: _Context) -> pb.CancelMigrationResponse:  # noqa: N802
        return pb.CancelMigrationResponse(migration=with_age(await self._migrations.cancel(request.migration_id)))


def _description(option: Option) -> pb.OptionDescription:
    number = option.kind is int
    return pb.OptionDescription(
        name=option.name,
        description=option.text,
        values=() if number else option.typed,
        min=option.bounds[0] if number else 0,
        max=option.bounds[1] if number else 0,
        default_value="" if option.default is None else shown(option.default),
        needs=option.needs,
    )
