"""The agent: assembles its parts, serves, and stops in order."""

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Final

import grpc.aio
import structlog

from agent.admission.desk import Desk
from agent.admission.settings import Configured
from agent.admission.store import Place
from agent.config import AgentConfig, NetworkConfig
from agent.handshake.host.attempt import Attempt
from agent.handshake.host.engine import Engine
from agent.handshake.host.journal import Journal
from agent.handshake.host.phases import LocalHost
from agent.handshake.host.record_cache import RecordCache
from agent.handshake.host.records import AttemptRecord
from agent.hypervisor.base import HypervisorUnavailable
from agent.hypervisor.interface import Hypervisor
from agent.hypervisor.wire import features_to_proto
from agent.migration.migrations import Migrations
from agent.migration.takeover import take_over_silent, take_over_waiting
from agent.runtime.backoff import HYPERVISOR, Pauses
from agent.runtime.configuration import ConfigError, convert, load, make_state_dir
from agent.runtime.daemon import run_until_stopped
from agent.runtime.event_log import events_logged
from agent.runtime.events import Bus, HostChanged
from agent.runtime.log import logging_to_stderr
from agent.runtime.supervision import supervise
from agent.service import admission_service, handshake_service, host_service, migration_service, peers
from agent.service.channel import open_channel
from agent.service.host import AgentHost
from agent.service.peers import Channels, PeerDirectory
from agent.service.registration import keep_registered
from agent.service.server import Server, start_server
from drover.agent.v1 import admission_pb2_grpc, handshake_pb2_grpc, host_pb2, host_pb2_grpc, migration_pb2_grpc

log = structlog.get_logger()

STOP_SECONDS: Final = 10.0
"""How long a stopping agent waits for its migrations; the hypervisor and the agent's next start end the others."""


def run(config_path: str) -> None:
    """Serve until SIGTERM or SIGINT. Raises `ConfigError`, `AddressError`, JOURNAL_UNAVAILABLE."""
    config = load(config_path, AgentConfig)
    with logging_to_stderr(config.log_level):
        run_until_stopped(lambda stop: agent(config, stop))


@contextlib.asynccontextmanager
async def agent(config: AgentConfig, stop: asyncio.Event) -> AsyncIterator[Server]:
    """Run an agent while the block runs. `stop` ends a start that still waits for the hypervisor."""
    bus = Bus()
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(events_logged(bus))
        hypervisor = make_hypervisor(config)
        stack.push_async_callback(hypervisor.close)
        await _open(hypervisor, stop)
        info = await hypervisor.info()
        journal = Journal(make_state_dir(config.state_dir) / "journal.sqlite")
        await journal.open()
        stack.push_async_callback(journal.close)
        # Users may name any address, and the oldest channel is closed when there are too many. Channels between the two hosts of a
        # migration are kept apart: if one were closed, that host would seem unreachable.
        named, other_hosts = Channels(), Channels()
        stack.push_async_callback(named.close)
        stack.push_async_callback(other_hosts.close)
        other_side = functools.partial(peers.other_side, other_hosts)
        silent: asyncio.Queue[Attempt] = asyncio.Queue()
        local = LocalHost(
            name=config.name,
            hypervisor=hypervisor,
            networks=(),
            features=features_to_proto(info.features),
            lease_seconds=config.lease_seconds,
            takeover_after=config.takeover_after_seconds,
            bus=bus,
            simulated=config.hypervisor == "sim",
        )
        heard = RecordCache()
        waiting_silently: asyncio.Queue[Place] = asyncio.Queue()
        desk = Desk(
            config.name,
            Configured(config.incoming_limit, config.outgoing_limit, config.prepared_limit, config.slot_unit_memory),
            journal.admission,
            bus,
            lease=config.lease_seconds,
            takeover_after=config.takeover_after_seconds,
            check_open=local.check_not_draining,
            on_silent=waiting_silently.put_nowait,
        )
        engine = Engine(local, journal, desk, silent.put_nowait, other_side, heard)
        stack.push_async_callback(engine.close)
        host = AgentHost(info, hypervisor, engine, bus, [(n.definition(), n.address) for n in config.networks])
        stack.callback(supervise("watch interfaces", functools.partial(host.follow, watch_of(config, hypervisor))).cancel)
        await host.followed()
        address = config.advertised_address()
        directory = PeerDirectory(host, address, config.peers, named, heard, bus)
        migrations = Migrations(config.name, directory, journal, bus, config.fencing)
        stack.push_async_callback(migrations.close)
        check_name(config.name, [*await journal.active(), *await journal.unsettled()])
        await engine.recover()
        await migrations.recover()
        server = await _serve(config, host, migrations, bus)
        log.info("serving", host=config.name, addresses=server.addresses)
        taking_over = functools.partial(take_over_silent, silent, migrations, config.name, other_side)
        stack.callback(supervise("take over", taking_over).cancel)
        taking_over_waits = functools.partial(take_over_waiting, waiting_silently, migrations, config.name)
        stack.callback(supervise("take over waits", taking_over_waits).cancel)
        stack.callback(supervise("settle", engine.settle).cancel)
        stack.callback(supervise("keep current", host.keep_current).cancel)
        if config.coordinator:
            coordinator = open_channel(config.coordinator)
            stack.push_async_callback(coordinator.close)
            registering = functools.partial(keep_registered, coordinator, host, address)
            stack.callback(supervise("keep registered", registering).cancel)
        yield server
        await _stop(local, migrations, engine, server)


def check_name(name: str, records: Iterable[AttemptRecord]) -> None:
    """Raise `ConfigError` if open migrations, or guests that came here lately, know this host by another name."""
    for record in records:
        if record.host not in ("", name):
            raise ConfigError(
                f"name: this host was {record.host}, and other hosts know it by that name while a migration is open (migration "
                f'{record.migration_id} with {record.peer_host}); start the agent as "{record.host}" until '
                "`drover migration list --active` shows nothing there and on the other hosts, then change the name"
            )


def watch_of(config: AgentConfig, hypervisor: Hypervisor) -> Callable[[], AsyncIterator[tuple[host_pb2.Interface, ...]]]:
    """Return the watch of this host's interfaces: by its kernel, or as the simulation is told."""
    if config.hypervisor == "sim":
        from agent.hypervisor.sim import SimHypervisor  # noqa: PLC0415

        assert isinstance(hypervisor, SimHypervisor)
        return hypervisor.watch_interfaces
    from agent.network.rtnetlink import watch_interfaces  # noqa: PLC0415 - it imports much, and a simulated host needs none

    addresses = (network.address for network in config.networks)
    return functools.partial(watch_interfaces, [address for address in addresses if "%" in address])


def make_hypervisor(config: AgentConfig) -> Hypervisor:
    """Import and return the configured driver, as a host needs only that one's library. Raises `ConfigError` without it."""
    if config.hypervisor == "sim":
        from agent.hypervisor.sim import SimHypervisor  # noqa: PLC0415
        from agent.hypervisor.sim.config import SimConfig, uuid_of  # noqa: PLC0415

        defaults = {"host_uuid": uuid_of(config.name), "interfaces": [_simulated(n) for n in config.networks if n.address]}
        return SimHypervisor(convert({**defaults, **(config.sim or {})}, SimConfig, "[sim]"))
    try:
        from agent.hypervisor.libvirt import LibvirtHypervisor  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError(f"hypervisor = libvirt needs libvirt-python: pip install '.[libvirt]' ({error})") from error

    return LibvirtHypervisor(config.libvirt.uri, (config.libvirt.first_port, config.libvirt.last_port))


def _simulated(network: NetworkConfig) -> dict[str, object]:
    """Return the interface of a simulated host on a network whose address is configured."""
    return {"name": network.name, "addresses": [f"{network.address}/{64 if ':' in network.address else 24}"]}


async def _open(hypervisor: Hypervisor, stop: asyncio.Event) -> None:
    """Wait for the hypervisor's daemon, which may start after the agent. Raises `SystemExit` once `stop` is set."""
    pauses = Pauses(HYPERVISOR)
    while True:
        try:
            return await hypervisor.open()
        except HypervisorUnavailable as error:
            log.warning("the hypervisor does not answer; asking again", error=str(error))
        await pauses.pause(stop)
        if stop.is_set():
            raise SystemExit(0)


async def _serve(config: AgentConfig, host: AgentHost, migrations: Migrations, bus: Bus) -> Server:
    def add(server: grpc.aio.Server) -> None:
        handshake_pb2_grpc.add_HandshakeServiceServicer_to_server(handshake_service.handshake_servicer(host.engine), server)
        admission = admission_service.admission_servicer(host.engine)
        admission_pb2_grpc.add_AdmissionServiceServicer_to_server(admission, server)
        host_pb2_grpc.add_HostServiceServicer_to_server(host_service.HostServicer(host), server)
        migration_pb2_grpc.add_MigrationServiceServicer_to_server(migration_service.MigrationServicer(migrations), server)

    services = (handshake_service, admission_service, host_service, migration_service)
    return await start_server(config.listen, add, [service.SERVICE for service in services], bus)


async def _stop(local: LocalHost, migrations: Migrations, engine: Engine, server: Server) -> None:
    """Accept no new work, and stop once everything has ended, at the latest after `STOP_SECONDS`."""
    local.bus.publish(HostChanged(local.name, change="stopping", message=f"{len(engine.active())} attempts have not ended"))
    local.draining = migrations.runner.draining = True
    engine.changed.ring()
    engine.desk.drain()
    async with asyncio.timeout(STOP_SECONDS + 1):
        await asyncio.gather(migrations.idle(STOP_SECONDS), engine.idle(STOP_SECONDS))
    await server.stop(grace=0.2)
