"""The coordinator: assembles store, hosts and migrations, serves them, and stops in order."""

import contextlib
import functools
import socket
from collections.abc import AsyncIterator
from typing import Final

import grpc.aio
import structlog

from agent.migration.migrations import Migrations
from agent.runtime.configuration import load, make_state_dir
from agent.runtime.daemon import run_until_stopped
from agent.runtime.event_log import events_logged
from agent.runtime.events import Bus
from agent.runtime.log import logging_to_stderr
from agent.runtime.supervision import supervise
from agent.service import migration_service
from agent.service.server import Server, start_server
from coordinator.config import CoordinatorConfig
from coordinator.hosts import host_service
from coordinator.hosts.directory import ClusterDirectory
from coordinator.hosts.hosts import HostRegistry
from coordinator.networks import network_service
from coordinator.networks.table import NetworkTable
from coordinator.store import SqliteStore
from coordinator.store.migration_log import ENDED, StoredMigrations
from drover.agent.v1 import migration_pb2_grpc
from drover.coordinator.v1 import host_pb2_grpc, network_pb2_grpc

log = structlog.get_logger()

STOP_SECONDS: Final = 5.0
"""How long a coordinator that stops waits for its migrations; the source's agents take over those that have not ended."""


def run(config_path: str) -> None:
    """Serve until SIGTERM or SIGINT. Raises `ConfigError`, `AddressError`."""
    config = load(config_path, CoordinatorConfig)
    with logging_to_stderr(config.log_level):
        run_until_stopped(lambda _: coordinator(config))


@contextlib.asynccontextmanager
async def coordinator(config: CoordinatorConfig) -> AsyncIterator[Server]:
    """Run a coordinator; yield its server."""
    bus = Bus()
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(events_logged(bus))
        store = await SqliteStore.open(make_state_dir(config.state_dir) / "store.sqlite", expendable=[ENDED])
        stack.push_async_callback(store.close)
        identity = f"{config.name} on {socket.gethostname()} ({config.listen[-1]})"
        networks = NetworkTable(store, bus)
        await networks.open()
        registry = HostRegistry(
            store,
            bus,
            config.heartbeat_seconds,
            coordinator=identity[:200],
            seen=networks.seen_by,
            changed=networks.changed,
        )
        await registry.open()
        stack.push_async_callback(registry.close)
        directory = ClusterDirectory(registry, bus, networks=networks.defined)
        migrations = Migrations(config.name, directory, StoredMigrations(store), bus, config.fencing)
        stack.push_async_callback(migrations.close)
        await migrations.recover()
        for network in networks.all():  # they may have changed since the migrations were saved
            migrations.collection.set_rules(network.name, network.rules)
        revoking = functools.partial(network_service.finish_revoking, networks, migrations.collection)
        stack.callback(supervise("finish revoking", revoking).cancel)
        server = await _serve(config, registry, migrations, networks, bus)
        log.info("serving", name=config.name, addresses=server.addresses)
        yield server
        log.info("stopping")
        migrations.runner.draining = True
        await migrations.idle(STOP_SECONDS)
        await server.stop(grace=0.2)


async def _serve(
    config: CoordinatorConfig, registry: HostRegistry, migrations: Migrations, networks: NetworkTable, bus: Bus
) -> Server:
    def add(server: grpc.aio.Server) -> None:
        host_pb2_grpc.add_HostServiceServicer_to_server(host_service.HostServicer(registry, migrations), server)
        network_servicer = network_service.NetworkServicer(networks, registry, migrations.collection)
        network_pb2_grpc.add_NetworkServiceServicer_to_server(network_servicer, server)
        migration_pb2_grpc.add_MigrationServiceServicer_to_server(migration_service.MigrationServicer(migrations), server)

    return await start_server(config.listen, add, [host_service.SERVICE, network_service.SERVICE, migration_service.SERVICE], bus)
