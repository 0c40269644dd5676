"""An in-memory coordinator and an in-memory agent, for the tests of the client and the command line.

The name of its guest determines what a migration does: see `SCRIPTS` and `REFUSALS`. Run as a program with a directory, it
serves both there, as ``coordinator.sock`` and ``agent.sock``, until it is killed.
"""

import asyncio
import sys
from collections.abc import AsyncIterator, Callable

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from agent.runtime.errors import DroverError, Reason
from agent.runtime.events import Bus
from agent.runtime.masks import masked
from agent.service.server import Server, start_server
from drover.agent.v1 import (
    admission_pb2,
    admission_pb2_grpc,
    handshake_pb2,
    host_pb2,
    host_pb2_grpc,
    migration_pb2,
    migration_pb2_grpc,
    options_pb2,
)
from drover.coordinator.v1 import host_pb2 as cluster_pb2
from drover.coordinator.v1 import host_pb2_grpc as cluster_pb2_grpc

MIB = 1 << 20

REFUSALS: dict[str, Callable[[], Exception]] = {
    "busy": lambda: DroverError(Reason.BUSY, "2 of 2 slots of b are taken", metadata={"limit": "2"}, retry_after=7),
    "closed": lambda: DroverError(Reason.HOST_CLOSED, "b is closed: its incoming_limit is 0", metadata={"alternatives": "c,d"}),
    "ghost": lambda: DroverError(Reason.DOMAIN_NOT_FOUND, 'no guest "ghost"', metadata={"domain": "ghost"}),
    "far": lambda: DroverError(Reason.HOST_UNREACHABLE, "host b (10.91.0.2:7400) cannot be reached: Connection refused"),
    "down": lambda: DroverError(
        Reason.HOST_UNREACHABLE, "h2 cannot be reached: Connection refused", metadata={"peer": "h2", "grpc_code": "UNAVAILABLE"}
    ),
    "late": lambda: DroverError(Reason.DEADLINE_EXCEEDED, "h2 is late", metadata={"peer": "h2", "grpc_code": "DEADLINE_EXCEEDED"}),
    "stopped": lambda: DroverError(Reason.DOMAIN_NOT_RUNNING, '"stopped" does not run'),
    "bug": lambda: RuntimeError("bug"),
    "newer": lambda: DroverError(Reason("OF_TOMORROW"), "a newer server's refusal", code=grpc.StatusCode.FAILED_PRECONDITION),
}

S = migration_pb2

_ACTIVE = {"state": S.MIGRATION_STATE_ACTIVE, "runs_on": "a"}
_PERFORM = _ACTIVE | {"phase": "perform"}
_DONE = {"state": S.MIGRATION_STATE_SUCCEEDED, "runs_on": "b"}

SCRIPTS: dict[str, list[dict[str, object]]] = {
    "fails": [
        _PERFORM,
        {
            "state": S.MIGRATION_STATE_FAILED,
            "runs_on": "a",
            "failure": handshake_pb2.Failure(reason="TRANSFER_FAILED", message='the stream broke; "fails" runs on a as before'),
        },
    ],
    "lost": [
        _PERFORM,
        {
            "state": S.MIGRATION_STATE_OUTCOME_UNKNOWN,
            "runs_on": "",
            "failure": handshake_pb2.Failure(reason="OUTCOME_UNKNOWN", message="host b does not answer: `drover migration resolve`"),
        },
    ],
    "crash": [
        _PERFORM,
        {
            "state": S.MIGRATION_STATE_FAILED,
            "runs_on": "",
            "source_guest": handshake_pb2.GuestFact(state=handshake_pb2.GUEST_STATE_CRASHED, reason="crashed"),
            "failure": handshake_pb2.Failure(reason="GUEST_CRASHED", message="the guest's QEMU died"),
        },
    ],
    "long": [_PERFORM],
    "waits": [
        {
            "state": S.MIGRATION_STATE_PENDING,
            "runs_on": "a",
            "waiting_for": "an incoming slot of b: 2 of 2 are taken",
            "wait_reason": migration_pb2.WAIT_REASON_SLOT,
        },
        {
            "state": S.MIGRATION_STATE_FAILED,
            "runs_on": "a",
            "failure": handshake_pb2.Failure(reason="BUSY", message="b gave no slot within 60 s: 2 of 2 slots of b are taken"),
        },
    ],
    "closes": [
        {
            "state": S.MIGRATION_STATE_FAILED,
            "runs_on": "a",
            "failure": handshake_pb2.Failure(reason="HOST_CLOSED", message="b is closed: its incoming_limit is 0"),
        },
    ],
    "tomorrow": [
        _PERFORM | {"state": 99},
        {
            "state": S.MIGRATION_STATE_FAILED,
            "source_guest": handshake_pb2.GuestFact(state=99, reason="of tomorrow"),  # type: ignore[arg-type]
            "failure": handshake_pb2.Failure(reason="OF_TOMORROW", message="what only a newer agent knows"),
        },
    ],
    "drops": [_PERFORM, _PERFORM, _DONE],
}
"""States of a guest's migration after PENDING, for guests that do otherwise than `_GOOD`."""

_GOOD = [_ACTIVE | {"phase": "begin"}, _ACTIVE | {"phase": "prepare"}, _PERFORM, _PERFORM, _DONE]

HOST = host_pb2.Host(
    name="a",
    driver="sim",
    hypervisor="QEMU 7.2.22",
    incoming_limit=2,
    incoming_in_use=2,
    incoming_queue=1,
    outgoing_limit=3,
    prepared_limit=1,
    interfaces=[host_pb2.Interface(name="mig0", addresses=["10.92.0.1/24"], mtu=9000, line_bytes_per_second=125_000_000, up=True)],
    networks=[host_pb2.Network(name="mig0", address="127.92.0.1", roles=["migration"], line_bytes_per_second=125_000_000)],
    migration_features=options_pb2.MigrationFeatures(
        options={"live": options_pb2.OPTION_SUPPORT_SUPPORTED, "rdma": options_pb2.OPTION_SUPPORT_UNSUPPORTED},
        uri_transports=["tcp"],
        bandwidth=True,
        split_phases=True,
    ),
)
DOMAIN = host_pb2.Domain(name="vm1", uuid="u1", state=host_pb2.DOMAIN_STATE_RUNNING, memory_bytes=64 * MIB, vcpus=1, job="none")


SLOTS = [
    admission_pb2.SlotHolder(
        migration_id="11111111-0000-4000-8000-000000000001",
        direction=admission_pb2.SLOT_DIRECTION_INCOMING,
        kind=admission_pb2.SLOT_KIND_TRANSFERRING,
        epoch=1 << 32 | 1,
        peer_host="b",
        cost=2,
        age=Duration(seconds=90),
    ),
    admission_pb2.SlotHolder(
        migration_id="22222222-0000-4000-8000-000000000002",
        direction=admission_pb2.SLOT_DIRECTION_INCOMING,
        kind=admission_pb2.SLOT_KIND_PREPARED,
        waiting=True,
        peer_host="c",
        importance=migration_pb2.IMPORTANCE_HIGH,
        cost=1,
        position=1,
        age=Duration(seconds=3),
        estimate_low=Duration(seconds=10),
        estimate_high=Duration(seconds=30),
    ),
]


class Settings:
    """The settings that the fake servers were given; both answer from them."""

    def __init__(self) -> None:
        self.host = host_pb2.HostSettings()
        self.changes: dict[str, host_pb2.SettingsChange] = {}
        self.domain = host_pb2.DomainSettings()

    def update_host(self, request: host_pb2.UpdateHostRequest) -> None:
        for path in request.update_mask.paths:
            self.host.ClearField(path)  # type: ignore[arg-type]
            if request.settings.HasField(path) if path != "cordoned" else request.settings.cordoned:  # type: ignore[arg-type]
                setattr(self.host, path, getattr(request.settings, path))
            self.changes["cordon_change" if path == "cordoned" else "settings_change"] = request.change
        request.change.change_time.FromSeconds(1_700_000_000)

    def update_domain(self, request: host_pb2.UpdateDomainRequest) -> host_pb2.Domain:
        if request.domain != DOMAIN.name:
            raise DroverError(Reason.DOMAIN_NOT_FOUND, "no such guest", metadata={"domain": request.domain})
        for path in request.update_mask.paths:
            setattr(self.domain, path, getattr(request.settings, path))
        domain = host_pb2.Domain()
        domain.CopyFrom(DOMAIN)
        domain.settings.CopyFrom(self.domain)
        return domain

    def shown(self) -> host_pb2.Host:
        host = host_pb2.Host()
        host.CopyFrom(HOST)
        host.settings.CopyFrom(self.host)
        for field in ("incoming_limit", "outgoing_limit", "prepared_limit"):
            if self.host.HasField(field):
                setattr(host, field, getattr(self.host, field))
        for field, change in self.changes.items():
            getattr(host, field).CopyFrom(change)
        return host


def progress(number: int) -> handshake_pb2.Progress:
    return handshake_pb2.Progress(
        iteration=number,
        total_bytes=64 * MIB,
        processed_bytes=10 * number * MIB,
        remaining_bytes=MIB,
        bytes_per_second=100 * MIB,
        dirty_bytes_per_second=MIB,
        downtime=Duration(nanos=23_000_000),
        eta_low=Duration(seconds=2),
        eta_high=Duration(seconds=4),
    )


def timing(phase: str, milliseconds: int) -> handshake_pb2.PhaseTiming:
    nanos = milliseconds * 1_000_000
    return handshake_pb2.PhaseTiming(
        phase=phase, duration=Duration(nanos=nanos), hypervisor_duration=Duration(nanos=nanos - 500_000)
    )


class FakeMigrations(migration_pb2_grpc.MigrationServiceServicer):
    """A service that replays a script to every watcher. `Get` returns the state that was sent last."""

    def __init__(self) -> None:
        self.histories: dict[str, list[migration_pb2.Migration]] = {}
        self.shown: dict[str, int] = {}
        self.updates: list[migration_pb2.UpdateMigrationRequest] = []
        self.started: list[migration_pb2.StartMigrationRequest] = []
        self.watches: list[migration_pb2.WatchMigrationRequest] = []
        self.open_watches = 0
        self.changed = asyncio.Condition()

    async def StartMigration(self, request, context):  # type: ignore[no-untyped-def]  # noqa: N802
        self.started.append(request)
        name = request.spec.domain
        if name in REFUSALS:
            raise REFUSALS[name]()
        if name == "slow":
            print("slow", flush=True)
            await asyncio.Event().wait()
        if request.migration_id not in self.histories:
            steps = [{"state": S.MIGRATION_STATE_PENDING, "runs_on": "a"}, *SCRIPTS.get(name, _GOOD)]
            self.histories[request.migration_id] = [_migration(request, n, step) for n, step in enumerate(steps, start=1)]
        return migration_pb2.StartMigrationResponse(migration=self.histories[request.migration_id][0])

    def _history(self, migration_id: str) -> list[migration_pb2.Migration]:
        if migration_id not in self.histories:
            raise DroverError(Reason.MIGRATION_NOT_FOUND, f"no migration {migration_id}", metadata={"migration_id": migration_id})
        return self.histories[migration_id]

    @staticmethod
    def _next(history: list[migration_pb2.Migration]) -> migration_pb2.Migration:
        """Append a copy of the last state, to be changed."""
        history.append(migration_pb2.Migration.FromString(history[-1].SerializeToString()))
        history[-1].revision = len(history)
        return history[-1]

    def _now(self, migration_id: str) -> migration_pb2.Migration:
        return self._history(migration_id)[self.shown.get(migration_id, 0)]

    async def GetMigration(self, request, context):  # type: ignore[no-untyped-def]  # noqa: N802
        return migration_pb2.GetMigrationResponse(migration=self._now(request.migration_id))

    async def ListMigrations(self, request, context):  # type: ignore[no-untyped-def]  # noqa: N802
        return migration_pb2.ListMigrationsResponse(migrations=[self._now(i) for i in reversed(self.histories)])

    async def WatchMigration(self, request, context) -> AsyncIterator[migration_pb2.WatchMigrationResponse]:  # type: ignore[no-untyped-def]  # noqa: N802
        self.watches.append(request)
        history = self._history(request.migration_id)
        index = max(0, min(request.from_revision, len(history)) - 1)
        self.open_watches += 1
        try:
            while True:
                self.shown[request.migration_id] = index
                yield migration_pb2.WatchMigrationResponse(migration=history[index])
                if history[index].state in (4, 5, 6):
                    return
                if history[index].spec.domain == "drops" and len(self.watches) <= 2 and index == len(self.watches):
                    raise DroverError(Reason.HOST_UNREACHABLE, "dropped")
                index += 1
                async with self.changed:
                    await self.changed.wait_for(lambda index=index: len(history) > index)  # type: ignore[misc]
        finally:
            self.open_watches -= 1
            await self._notify()

    async def WatchMigrations(self, request, context) -> AsyncIterator[migration_pb2.WatchMigrationsResponse]:  # type: ignore[no-untyped-def]  # noqa: N802
        for migration_id in self.histories:
            yield migration_pb2.WatchMigrationsResponse(migration=self._now(migration_id))

    async def UpdateMigration(self, request, context):  # type: ignore[no-untyped-def]  # noqa: N802
        history = self._history(request.migration_id)
        if history[-1].state in (4, 5, 6):
            raise DroverError(Reason.MIGRATION_ENDED, f"migration {request.migration_id} has ended")
        self.updates.append(request)
        changed = self._next(history)
        changed.settings.CopyFrom(masked(changed.settings, request.settings, request.update_mask))
        changed.applied_bandwidth_bytes_per_second = changed.settings.bandwidth_bytes_per_second // MIB * MIB
        changed.applied_max_downtime.CopyFrom(changed.settings.max_downtime)
        return migration_pb2.UpdateMigrationResponse(migration=changed)

    async def CancelMigration(self, request, context):  # type: ignore[no-untyped-def]  # noqa: N802
        history = self._history(request.migration_id)
        if history[-1].state not in (4, 5, 6):
            cancelled = self._next(history)
            cancelled.state, cancelled.phase = S.MIGRATION_STATE_CANCELLED, ""
        await self._notify()
        return migration_pb2.CancelMigrationResponse(migration=history[-1])

    async def ResolveMigration(self, request, context):  # type: ignore[no-untyped-def]  # noqa: N802
        history = self._history(request.migration_id)
        if history[-1].state != S.MIGRATION_STATE_OUTCOME_UNKNOWN:
            raise DroverError(Reason.NOT_IN_DOUBT, f"{request.statement.dead_host} answers, so it is not dead")
        resolved = self._next(history)
        resolved.state, resolved.runs_on = S.MIGRATION_STATE_FAILED, resolved.source_host
        resolved.statement.CopyFrom(request.statement)
        await self._notify()
        return migration_pb2.ResolveMigrationResponse(migration=resolved)

    async def _notify(self) -> None:
        async with self.changed:
            self.changed.notify_all()


def _migration(request: migration_pb2.StartMigrationRequest, revision: int, step: dict[str, object]) -> migration_pb2.Migration:
    migration = migration_pb2.Migration(
        migration_id=request.migration_id,
        spec=request.spec,
        slot_wait=request.slot_wait if request.slot_wait.ToNanoseconds() else None,
        attempt=1,
        source_host="a",
        destination_host=request.spec.destination_host,
        domain_name=request.spec.domain,
        domain_uuid="u1",
        network="mig0",
        revision=revision,
        create_time=Timestamp(seconds=1_700_000_000),
        age=Duration(seconds=90),
        driver="fake",
        **step,  # type: ignore[arg-type]
    )
    if migration.state == S.MIGRATION_STATE_FAILED:
        migration.duration.CopyFrom(Duration(seconds=9))
        migration.hypervisor_duration.CopyFrom(Duration(seconds=1))
    if migration.phase == "perform" or migration.state in (S.MIGRATION_STATE_SUCCEEDED, S.MIGRATION_STATE_FAILED):
        migration.progress.CopyFrom(progress(revision))
    if migration.state == S.MIGRATION_STATE_SUCCEEDED:
        migration.timings.extend(timing(phase, n) for n, phase in enumerate(("begin", "prepare", "perform", "finish"), start=10))
        migration.duration.CopyFrom(Duration(nanos=500_000_000))
        migration.hypervisor_duration.CopyFrom(Duration(nanos=490_000_000))
        migration.warnings.append("the management network carried the memory")
    return migration


class FakeCluster(cluster_pb2_grpc.HostServiceServicer):
    def __init__(self) -> None:
        self.settings = Settings()

    async def UpdateHost(self, request, context):  # type: ignore[no-untyped-def]  # noqa: N802
        self._host(request.name)
        self.settings.update_host(request.update)
        return cluster_pb2.UpdateHostResponse(host=self._host(request.name))

    async def UpdateDomain(self, request, context):  # type: ignore[no-untyped-def]  # noqa: N802
        domain = self.settings.update_domain(request.update)
        return cluster_pb2.UpdateDomainResponse(domain=cluster_pb2.PlacedDomain(host="a", domain=domain))

    async def ListSlots(self, request, context):  # type: ignore[no-untyped-def]  # noqa: N802
        self._host(request.name)
        return cluster_pb2.ListSlotsResponse(slots=SLOTS if request.name == "a" else [])

    async def ListHosts(self, request, context):  # type: ignore[no-untyped-def]  # noqa: N802
        return cluster_pb2.ListHostsResponse(hosts=[self._host("a"), self._host("b")])

    async def GetHost(self, request, context):  # type: ignore[no-untyped-def]  # noqa: N802
        return cluster_pb2.GetHostResponse(host=self._host(request.name))

    async def RemoveHost(self, request, context):  # type: ignore[no-untyped-def]  # noqa: N802
        if request.name == "a":
            raise DroverError(Reason.HOST_IN_USE, "a is up; stop its agent first", metadata={"host": "a"})
        return cluster_pb2.RemoveHostResponse()

    async def ListDomains(self, request, context):  # type: ignore[no-untyped-def]  # noqa: N802
        domains = [cluster_pb2.PlacedDomain(host="a", domain=DOMAIN)] if request.host in ("", "a") else []
        return cluster_pb2.ListDomainsResponse(domains=domains, unreachable_hosts=[] if request.host else ["b"])

    def _host(self, name: str) -> cluster_pb2.ClusterHost:
        if name not in ("a", "b"):
            raise DroverError(Reason.HOST_NOT_FOUND, f'no host "{name}"', metadata={"host": name})
        state = cluster_pb2.HOST_STATE_UP if name == "a" else cluster_pb2.HOST_STATE_UNREACHABLE
        host = cluster_pb2.ClusterHost(host=self.settings.shown(), agent_address=f"unix:/{name}.sock", state=state)
        host.host.name = name
        host.last_seen_time.FromSeconds(1_700_000_000)
        host.last_seen_age.FromSeconds(90)
        host.last_seen_by_wall_clock = name == "b"
        host.unreachable_reason = "" if name == "a" else "the answer of unix:/b.sock is refused: host.name has 999 bytes"
        host.clock_skew.FromSeconds(3600 if name == "b" else 0)
        return host


class FakeAgentHost(host_pb2_grpc.HostServiceServicer):
    def __init__(self) -> None:
        self.settings = Settings()

    async def GetHost(self, request, context):  # type: ignore[no-untyped-def]  # noqa: N802
        return host_pb2.GetHostResponse(host=self.settings.shown())

    async def UpdateHost(self, request, context):  # type: ignore[no-untyped-def]  # noqa: N802
        self.settings.update_host(request)
        return host_pb2.UpdateHostResponse(host=self.settings.shown())

    async def UpdateDomain(self, request, context):  # type: ignore[no-untyped-def]  # noqa: N802
        return host_pb2.UpdateDomainResponse(domain=self.settings.update_domain(request))

    async def ListDomains(self, request, context):  # type: ignore[no-untyped-def]  # noqa: N802
        return host_pb2.ListDomainsResponse(domains=[DOMAIN])


class FakeSlots(admission_pb2_grpc.AdmissionServiceServicer):
    async def ListSlots(self, request, context):  # type: ignore[no-untyped-def]  # noqa: N802
        return admission_pb2.ListSlotsResponse(slots=SLOTS)


async def serve_coordinator(address: str, migrations: FakeMigrations) -> Server:
    def add(server) -> None:  # type: ignore[no-untyped-def]
        migration_pb2_grpc.add_MigrationServiceServicer_to_server(migrations, server)
        cluster_pb2_grpc.add_HostServiceServicer_to_server(FakeCluster(), server)  # type: ignore[abstract]

    return await start_server([address], add, [], Bus())


async def serve_agent(address: str, migrations: FakeMigrations) -> Server:
    def add(server) -> None:  # type: ignore[no-untyped-def]
        migration_pb2_grpc.add_MigrationServiceServicer_to_server(migrations, server)
        host_pb2_grpc.add_HostServiceServicer_to_server(FakeAgentHost(), server)  # type: ignore[abstract]
        admission_pb2_grpc.add_AdmissionServiceServicer_to_server(FakeSlots(), server)  # type: ignore[abstract]

    return await start_server([address], add, [], Bus())


async def _main(directory: str) -> None:
    migrations = FakeMigrations()  # type: ignore[abstract]
    coordinator = await serve_coordinator(f"unix:{directory}/coordinator.sock", migrations)
    agent = await serve_agent(f"unix:{directory}/agent.sock", migrations)
    print("ready", flush=True)
    await asyncio.gather(coordinator.wait(), agent.wait())


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1]))
