"""Starts many migrations, and sees from outside what they do: for the scenarios of `storms`."""

import asyncio
import contextlib
import importlib
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

from google.protobuf.field_mask_pb2 import FieldMask

from agent.runtime.errors import DroverError, Reason
from drover.agent.v1 import admission_pb2, admission_pb2_grpc, host_pb2
from drover.agent.v1 import migration_pb2 as pb
from tests.kit.cluster import Cluster, GuestSpec
from tests.kit.cluster.platforms import LabCluster
from tests.scenarios.conversation import FINAL, MIB, Talk, duration, new_id, state

LOW, MEDIUM, HIGH = pb.IMPORTANCE_LOW, pb.IMPORTANCE_MEDIUM, pb.IMPORTANCE_HIGH
GUESTS: Final = {
    name: GuestSpec(name, memory_mib=96 if name in ("s1", "s2", "s3") else 40, dirty=50, ticks=50)
    for name in (
        *(f"s{n}" for n in range(1, 9)),
        *(f"x{n}" for n in range(1, 5)),
        *(f"r{n}" for n in range(1, 7)),
        *(f"c{n}" for n in range(1, 5)),
        *(f"p{n}" for n in range(1, 9)),
    )
}
SETTINGS: Final = {"agent": {"lease_seconds": 8, "takeover_after_seconds": 4}}
RATE: Final = 16 * MIB
"""Limit of each transfer in bytes per second, so that each takes some seconds."""
WAIT_SECONDS: Final = 600.0
PATIENCE_SECONDS: Final = 120.0

Slots = Sequence[admission_pb2.SlotHolder]


@dataclass(frozen=True)
class Leg:
    """One guest's way."""

    guest: str
    source: str
    target: str
    importance: pb.Importance.ValueType = MEDIUM


class Storm:
    """The migrations of a storm. `server`: address of the coordinator or agent that is asked for them."""

    def __init__(self, hosts: Cluster, server: str, legs: Sequence[Leg]) -> None:
        self.legs = legs
        self.ended: dict[str, pb.Migration] = {}
        self._hosts = hosts
        self._talk = Talk(server)
        self._ids = {leg: new_id() for leg in legs}

    async def __aenter__(self) -> Self:
        for leg in self.legs:
            await asyncio.to_thread(self._hosts.start_guest, leg.guest, leg.source)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._talk.channel.close()

    def id_of(self, leg: Leg) -> str:
        return self._ids[leg]

    def leg_of(self, migration_id: str) -> Leg:
        return next(leg for leg, known in self._ids.items() if known == migration_id)

    async def start(self, leg: Leg, rate: int = RATE, wait: float = WAIT_SECONDS) -> None:
        spec = pb.MigrationSpec(
            domain=leg.guest, destination_host=leg.target, importance=leg.importance, bandwidth_bytes_per_second=rate
        )
        request = pb.StartMigrationRequest(migration_id=self._ids[leg], spec=spec, slot_wait=duration(wait))
        await self._talk.call(self._talk.migrations.StartMigration, request)

    async def speed_up(self, leg: Leg, talk: Talk | None = None) -> None:
        """Give a crawling transfer the rate of the others, unless it has ended. `talk`: to another server."""
        talk = talk or self._talk
        request = pb.UpdateMigrationRequest(
            migration_id=self._ids[leg],
            settings=pb.MigrationSettings(bandwidth_bytes_per_second=RATE),
            update_mask=FieldMask(paths=["bandwidth_bytes_per_second"]),
        )
        try:
            await talk.call(talk.migrations.UpdateMigration, request)
        except DroverError as error:
            if error.reason is not Reason.MIGRATION_ENDED:
                raise

    async def ends(self) -> None:
        """Wait until all have ended, by the server."""
        self.ended = await _ends(self._talk, self._ids.values())

    async def ends_at_agents(self) -> None:
        """Wait until all have ended, by the agents of their sources."""
        for source in {leg.source for leg in self.legs}:
            async with Talk(self._hosts.agents[source].address) as talk:
                await _ends(talk, [self._ids[leg] for leg in self.legs if leg.source == source])

    async def until_slots(self, host: str, holds: Callable[[Slots], bool]) -> None:
        """Wait until it holds for the slots and the queue of a host."""
        end = time.monotonic() + 30
        while not holds(slots := await slots_of(self._hosts, host)):
            assert time.monotonic() < end, f"the slots of {host} are {slots}"
            await asyncio.sleep(0.05)  # nothing tells of the change of a queue

    async def until_listed(self, host: str, leg: Leg, *, waits: bool | None = None) -> None:
        """Wait until a host lists the migration; `waits`: among its slots, or in its queue; None: either."""
        await self.until_slots(
            host, lambda slots: any(slot.migration_id == self._ids[leg] and waits in (None, slot.waiting) for slot in slots)
        )

    async def until_moving(self, leg: Leg) -> None:
        """Wait until its memory flows, by the server."""
        await self._talk.watch(self._ids[leg], lambda migration: migration.progress.processed_bytes > 0)

    async def until_arrived(self, number: int) -> None:
        """Wait until so many have succeeded, by the server, and another one transfers."""
        end = time.monotonic() + PATIENCE_SECONDS
        while True:
            found = [await self._talk.get(each) for each in self._ids.values()]
            moving = [each for each in found if each.phase in ("perform", "finish")]
            if sum(state(each) == "succeeded" for each in found) >= number and moving:
                return
            lost = [each.failure.message for each in found if each.state in FINAL and state(each) != "succeeded"]
            assert not lost, lost
            assert time.monotonic() < end, f"not {number} of {[(state(each), each.phase) for each in found]}"
            await asyncio.sleep(0.1)

    # ---- the judgement

    async def assert_all_arrived(self) -> None:
        """Assert that each guest runs where it was to go, that its log is perfect, and that no slot is left on any host."""
        for leg, migration_id in self._ids.items():
            ended = self.ended[migration_id]
            assert (state(ended), ended.runs_on) == ("succeeded", leg.target), f"{leg.guest}: {ended.failure.message}"
            assert self._hosts.running_on(leg.guest) == [leg.target]
            guest = self._hosts.guests[leg.guest]
            await asyncio.to_thread(guest.wait_lines, 2)
            assert guest.judge().problems() == []
        for host in self._hosts.hosts:
            await self.until_slots(host, lambda slots: not slots)

    def transfers(self, source: str = "", target: str = "") -> list[tuple[float, float]]:
        """Return the start and end of the transfers of one source, or to one target, or of all."""
        found = []
        for leg in self.legs:
            if leg.source == (source or leg.source) and leg.target == (target or leg.target):
                timing = next(each for each in self.ended[self._ids[leg]].timings if each.phase == "perform")
                start = timing.start_time.ToNanoseconds() / 1e9
                found.append((start, start + timing.duration.ToNanoseconds() / 1e9))
        return found

    def granted(self, watcher: "Watcher") -> list[Leg]:
        """Return the legs in the order in which their target gave them slots."""
        return sorted(self.legs, key=lambda leg: watcher.epochs[self._ids[leg]])


async def _ends(talk: Talk, ids: Iterable[str]) -> dict[str, pb.Migration]:
    end, wanted = time.monotonic() + PATIENCE_SECONDS, list(ids)
    while True:
        found = {each: await talk.get(each) for each in wanted}
        if all(each.state in FINAL for each in found.values()):
            return found
        left = [f"{each.spec.domain}: {state(each)} {each.phase} {each.waiting_for}" for each in found.values()]
        assert time.monotonic() < end, "\n".join(left)
        await asyncio.sleep(0.2)  # a watch ends with its server, which some scenarios kill


async def slots_of(hosts: Cluster, host: str) -> Slots:
    """Return the slots of a host, then its queue in order, as its agent reports them; incoming before outgoing."""
    async with Talk(hosts.agents[host].address) as talk:
        stub = admission_pb2_grpc.AdmissionServiceStub(talk.channel)
        response = await talk.call(stub.ListSlots, admission_pb2.ListSlotsRequest())
    return sorted(response.slots, key=lambda slot: (slot.direction, slot.waiting, slot.position))


async def set_limits(hosts: Cluster, incoming: int, outgoing: int, prepared: int) -> None:
    """Set the limits of all hosts while they run."""
    settings = host_pb2.HostSettings(incoming_limit=incoming, outgoing_limit=outgoing, prepared_limit=prepared)
    mask = FieldMask(paths=["incoming_limit", "outgoing_limit", "prepared_limit"])
    for agent in hosts.agents.values():
        async with Talk(agent.address) as talk:
            await talk.call(talk.hosts.UpdateHost, host_pb2.UpdateHostRequest(settings=settings, update_mask=mask))


class Watcher:
    """Samples what a host's agent says of its incoming slots, and what the hypervisors of the other hosts say of transfers."""

    def __init__(self, hosts: Cluster, host: str) -> None:
        self.most_by_slots = 0
        """Most transferring units at once."""
        self.epochs: dict[str, int] = {}
        """Of the slots by migration; a later grant has a higher one."""
        self.first_epochs: dict[str, int] = {}
        """Of the first slot of each migration."""
        self.most_by_hypervisor = 0
        """Most guests at once that libvirt sends to any host. Zero on simulated hosts."""
        self._hosts = hosts
        self._host = host
        self._tasks: list[asyncio.Task[None]] = []
        self._stop = threading.Event()

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(self._watch_slots())]
        if isinstance(self._hosts, LabCluster):
            others = [host.libvirt_uri for host in self._hosts.lab.hosts if host.name != self._host]
            self._tasks.append(asyncio.create_task(asyncio.to_thread(self._watch_jobs, others)))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stop.set()
        await asyncio.gather(*self._tasks)

    async def _watch_slots(self) -> None:
        async with Talk(self._hosts.agents[self._host].address) as talk:
            stub = admission_pb2_grpc.AdmissionServiceStub(talk.channel)
            while not self._stop.is_set():
                with contextlib.suppress(DroverError):  # it is being restarted
                    found = (await talk.call(stub.ListSlots, admission_pb2.ListSlotsRequest())).slots
                    moving = [slot.cost for slot in found if _transfers(slot)]
                    self.most_by_slots = max(self.most_by_slots, sum(moving))
                    self.epochs |= {slot.migration_id: slot.epoch for slot in found if _is_incoming(slot) and slot.epoch}
                    self.first_epochs = self.epochs | self.first_epochs
                await asyncio.sleep(0.05)  # the sampling

    def _watch_jobs(self, uris: Sequence[str]) -> None:
        """A guest moves once, so those that two sweeps find moving have moved together at the moment between the two."""
        libvirt = importlib.import_module("libvirt")  # needed for real hosts only
        with contextlib.ExitStack() as stack:
            connections = [stack.enter_context(contextlib.closing(libvirt.open(uri))) for uri in uris]
            before: set[str] = set()
            while not self._stop.wait(0.05):  # the sampling
                now = {name for connection in connections for name in _moving(connection)}
                self.most_by_hypervisor = max(self.most_by_hypervisor, len(before & now))
                before = now


def _is_incoming(slot: admission_pb2.SlotHolder) -> bool:
    return slot.direction == admission_pb2.SLOT_DIRECTION_INCOMING


def _transfers(slot: admission_pb2.SlotHolder) -> bool:
    return _is_incoming(slot) and not slot.waiting and slot.kind == admission_pb2.SLOT_KIND_TRANSFERRING


def _moving(connection: Any) -> list[str]:
    """Return the guests that run on this host and whose memory libvirt sends."""
    libvirt = importlib.import_module("libvirt")
    found = []
    for domain in connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_RUNNING):
        with contextlib.suppress(libvirt.libvirtError):  # it has just left, or does not answer in time
            stats = domain.jobStats()
            if stats.get("type", 0) and stats.get("memory_processed", 0) > 0 and stats.get("memory_remaining", 0) > 0:
                found.append(domain.name())
    return found
