"""The Python client: for a coordinator (the whole cluster) or one agent (the guests of its host, peer to peer).

::

    async with Client("unix:/run/drover/coordinator.sock") as client:
        migration = await client.migrate("vm1", to="host-b")
        print(migration.duration, migration.progress.downtime)

Deadlines: every call has one (`timeout`, seconds; a migration's start has `start_timeout`, as hosts are asked and a slot is
taken before it answers). A watch ends with the migration; keepalive notices a silent server within 15 s, and the watch then
tries to reach it again for up to `reconnect` seconds. Closing the client, or cancelling a task that waits, cancels no migration.
Errors: see the tree in `coordinator.client.errors`.
"""

import asyncio
import importlib
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import aclosing
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar, Unpack, cast

import grpc.aio
from google.protobuf.message import Message

from agent.runtime.errors import Reason
from agent.service.channel import all_pages, open_channel
from agent.service.implausible import drop_implausible
from coordinator.client.errors import (
    DeadlineExceeded,
    DroverClientError,
    InvalidRequest,
    ServerFailed,
    Unreachable,
    client_error,
    outcome_unknown,
    raise_unless_succeeded,
)
from coordinator.client.host_calls import HostCalls
from coordinator.client.request import Asked, Changeable, start_request, update_request
from drover.agent.v1 import handshake_pb2, migration_pb2, migration_pb2_grpc

if TYPE_CHECKING:
    from coordinator.client.networks import Networks
    from coordinator.client.types import Migration

T = TypeVar("T")

TIMEOUT = 10.0
"""Seconds for a call that reads, cancels, or opens a watch."""
START_TIMEOUT = 60.0
"""Seconds for the start of a migration."""
RECONNECT = 30.0
"""Seconds for which a watch tries to reach a server again that went away."""
UNKNOWN_PATIENCE = 10.0
"""Seconds for which `wait` lets an unknown outcome become known (an agent restarts) before it raises `OutcomeUnknown`."""


class Client(HostCalls):
    """A connection to a coordinator or to one agent, at ``unix:/path`` or ``ip:port``. Use it with ``async with``. It connects at
    the first call. Any number of tasks of one event loop can share it.
    """

    def __init__(self, address: str, *, timeout: float = TIMEOUT, start_timeout: float = START_TIMEOUT) -> None:
        self.address = address
        self.timeout = timeout
        self.start_timeout = start_timeout
        self._channel: grpc.aio.Channel | None = None

    async def __aenter__(self) -> "Client":
        try:
            self._channel = open_channel(self.address)
        except ValueError as error:
            raise InvalidRequest(str(error), reason=Reason.INVALID_FIELD) from None
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._channel is not None:
            await self._channel.close()
            self._channel = self._host_questions = None

    async def migrate(self, domain: str, to: str = "", *, timeout: float | None = None, **asked: Unpack[Asked]) -> "Migration":
        """Move a guest to the host `to`, or to any; return when it runs there and nothing is left at the source.

        Arguments as in `start_migration`; `timeout` is the longest wait in seconds (None: as long as the migration takes).
        Cancelling this await does not cancel the migration; `cancel_migration` does. Raises as `start_migration` and `wait`.
        """
        migration = await self.start_migration(domain, to, **asked)
        return await self.wait(migration.id, timeout=timeout)

    async def start_migration(self, domain: str, to: str = "", **asked: Unpack[Asked]) -> "Migration":
        """Start a migration; return when everything is checked and the slot is taken, or with `slot_wait` as soon as it is checked
        and durable. A refusal has changed nothing.

        `domain`: name or UUID of the guest. `to`: name of the destination host (on an agent also the address of a peer); empty: any
        host that can take the guest. The others are those of `Asked`, each with its meaning there. Raises `Busy` for a busy host
        without `slot_wait`.
        """
        request = start_request(domain, to, asked)
        response = await self._call(self._migrations.StartMigration(request, timeout=self.start_timeout))
        return _migration(response.migration)

    async def update_migration(self, migration_id: str, **changes: Unpack[Changeable]) -> "Migration":
        """Change settings of a migration that waits or runs, durably; what is not given stays. Return it with what is applied to a
        transfer that runs, as the source's hypervisor reports it.

        Raises `Refused` for one that has ended, `InvalidRequest`, `NotFound`. `Unreachable`: the source does not answer; if the
        error's metadata has "saved", the change is saved and will be applied.
        """
        response = await self._call(self._migrations.UpdateMigration(update_request(migration_id, changes), timeout=self.timeout))
        return _migration(response.migration)

    async def get_migration(self, migration_id: str) -> "Migration":
        """Return the migration. Raises `NotFound`."""
        request = migration_pb2.GetMigrationRequest(migration_id=migration_id)
        response = await self._call(self._migrations.GetMigration(request, timeout=self.timeout))
        return _migration(response.migration)

    async def list_migrations(self, *, active_only: bool = False, limit: int = 100) -> "list[Migration]":
        """Return at most `limit` migrations, the newest first."""
        request = migration_pb2.ListMigrationsRequest(active_only=active_only, page_size=limit)
        found: list[Migration] = []
        async for page in self._pages(self._migrations.ListMigrations, request):
            found += map(_migration, page.migrations)
            if len(found) >= limit:
                break
        return found[:limit]

    async def cancel_migration(self, migration_id: str) -> "Migration":
        """Ask that a migration end with the guest running at the source: possible until the commit. Too late, or twice, is no error.
        The migration may still be CANCELLING when this returns: see `wait`.
        """
        request = migration_pb2.CancelMigrationRequest(migration_id=migration_id, request_id=str(uuid.uuid4()))
        response = await self._call(self._migrations.CancelMigration(request, timeout=self.timeout))
        return _migration(response.migration)

    async def resolve_migration(self, migration_id: str, *, dead_host: str, reason: str, said_by: str) -> "Migration":
        """State that a host which does not answer is dead, so that the migration can end without its record. If that is wrong, two
        copies of the guest may run. Raises `Refused` if the host answers or the migration has ended.
        """
        statement = handshake_pb2.Statement(dead_host=dead_host, reason=reason, said_by=said_by)
        request = migration_pb2.ResolveMigrationRequest(migration_id=migration_id, request_id=str(uuid.uuid4()), statement=statement)
        response = await self._call(self._migrations.ResolveMigration(request, timeout=self.timeout))
        return _migration(response.migration)

    async def watch_migration(
        self, migration_id: str, *, from_revision: int = 0, reconnect: float = RECONNECT
    ) -> "AsyncGenerator[Migration, None]":
        """Yield the migration now and after every change, until it has ended. A slow reader misses changes, never the last one.

        Leaving the loop ends the watch; ``contextlib.aclosing`` ends it without waiting for the garbage collector. If the server
        goes away, the watch reconnects and goes on from the last revision. Raises `Unreachable` after `reconnect` seconds without
        the server, and at once if it was never reached.
        """
        last: Migration | None = None
        loop = asyncio.get_running_loop()
        backoff = importlib.import_module("agent.runtime.backoff")  # imported here: the start of a migration does not wait for it
        give_up_at, pauses = loop.time() + reconnect, backoff.Pauses(backoff.CLIENT_WATCH)
        while last is None or not last.state.ended:
            since = last.revision if last is not None else from_revision
            try:
                async with aclosing(self._watch_once(migration_id, since, again=last is not None)) as changes:
                    async for migration in changes:
                        give_up_at = loop.time() + reconnect
                        pauses.succeeded()
                        if last is None or migration.revision != last.revision:
                            last = migration
                            yield migration
            except DroverClientError as error:
                lost = isinstance(error, Unreachable) or error.reason == Reason.WATCH_TOO_SLOW
                if last is None or not lost or loop.time() >= give_up_at:
                    raise
            if last is None:
                text = f"the server at {self.address} ended the watch of migration {migration_id} without sending its state"
                raise ServerFailed(text, reason=Reason.INTERNAL)
            if not last.state.ended:
                await pauses.pause()  # a server that refuses at once must not be asked in a tight loop

    async def wait(
        self, migration_id: str, *, timeout: float | None = None, unknown_patience: float = UNKNOWN_PATIENCE
    ) -> "Migration":
        """Wait for the end of a migration; return it if it succeeded.

        `timeout` in seconds (None: as long as it takes); `unknown_patience`: seconds for an unknown outcome to become known.

        Raises `MigrationFailed`, `MigrationCancelled`, `OutcomeUnknown`, each with the `migration`; `NotFound`, `Unreachable`;
        `DeadlineExceeded` after `timeout`, while the migration goes on.
        """
        last: Migration | None = None
        changes = self.watch_migration(migration_id)
        loop = asyncio.get_running_loop()
        end = None if timeout is None else loop.time() + timeout
        unknown_until: float | None = None
        try:
            while last is None or not last.state.ended:
                bound = min((time for time in (end, unknown_until) if time is not None), default=None)
                async with asyncio.timeout_at(bound):
                    last = await anext(changes)
                unknown_until = (unknown_until or loop.time() + unknown_patience) if last.state.in_doubt else None
        except TimeoutError:
            if unknown_until is not None and last is not None:
                raise outcome_unknown(last) from None
            text = f"migration {migration_id} has not ended within {timeout:g} s; it goes on"
            raise DeadlineExceeded(text, reason=Reason.DEADLINE_EXCEEDED, migration=last) from None
        finally:
            await changes.aclose()
        return raise_unless_succeeded(last)

    async def _watch_once(self, migration_id: str, from_revision: int, again: bool) -> "AsyncGenerator[Migration, None]":
        """Yield from one watch stream. `again`: wait until the server, which answered before, can be connected to."""
        request = migration_pb2.WatchMigrationRequest(migration_id=migration_id, from_revision=from_revision)
        call = self._migrations.WatchMigration(request, wait_for_ready=again)
        try:
            bound: float | None = self.timeout  # the server sends the first message at once, and the next at any time
            while True:
                async with asyncio.timeout(bound):
                    response = await self._call(cast(Awaitable[Any], call.read()))
                if response is grpc.aio.EOF:
                    return
                bound = None
                yield _migration(response.migration)
        except TimeoutError:
            text = f"the server at {self.address} did not answer within {self.timeout:g} s"
            raise DeadlineExceeded(text, reason=Reason.DEADLINE_EXCEEDED) from None
        finally:
            call.cancel()

    def _pages(self, method: Any, request: Any) -> AsyncIterator[Any]:
        return all_pages(lambda page: self._call(method(page, timeout=self.timeout)), request)

    async def _call(self, call: Awaitable[T]) -> T:
        try:
            answer = await call
        except grpc.aio.AioRpcError as error:
            status = importlib.import_module("agent.service.status")  # imported here: slow, and only an error needs it
            raise client_error(status.error_from_rpc(error, f"the server at {self.address}")) from error
        if isinstance(answer, Message):  # the end of a stream is none
            drop_implausible(answer)
        return answer

    @property
    def networks(self) -> "Networks":
        """The cluster's networks; a coordinator's only."""
        module = importlib.import_module("coordinator.client.networks")
        return cast("Networks", module.Networks(self._open, self.timeout, self._call))

    @property
    def _open(self) -> grpc.aio.Channel:
        if self._channel is None:
            raise RuntimeError('the client is not open; use "async with Client(...) as client"')
        return self._channel

    @property
    def _migrations(self) -> "migration_pb2_grpc.MigrationServiceAsyncStub":
        return migration_pb2_grpc.MigrationServiceStub(self._open)


def _migration(message: migration_pb2.Migration) -> "Migration":
    types = importlib.import_module("coordinator.client.types")
    return cast("Migration", types.Migration.from_proto(message))
