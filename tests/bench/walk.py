"""`scripts/bench walk`: honest migrations, while a caller who is not their driver makes random calls of
phases and slots.

That caller can make a migration fail, as callers are not authenticated yet. But a guest never has two running copies and never none,
and every migration ends soon after the last call.
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from typing import Any, Final

import click
import grpc.aio

from agent.service.channel import open_channel
from agent.service.status import error_from_rpc
from coordinator.client import Client, DroverClientError
from drover.agent.v1 import admission_pb2, admission_pb2_grpc, handshake_pb2, handshake_pb2_grpc
from tests.bench.output import say, show_table
from tests.bench.outsider import Known, Outsider
from tests.kit.cluster import Cluster, GuestSpec, cluster

GUESTS: Final = tuple(GuestSpec(f"walk{number}", memory_mib=16, dirty=200) for number in range(1, 5))
SETTINGS: Final[Mapping[str, Any]] = {
    "agent": {"lease_seconds": 3, "takeover_after_seconds": 2, "incoming_limit": 4, "outgoing_limit": 4}
}
HOSTS: Final = 3
AT_ONCE: Final = 4
"""Calls of the outsider that are under way at once."""
CALL_SECONDS: Final = 5.0
LOOK_AROUND: Final = 40
"""Number of calls after which the outsider lists the migrations again."""
PEER_SHARE: Final = 4
"""Every n-th migration goes peer to peer, the others through the coordinator."""
SLOT_WAIT: Final = 10.0
"""Seconds for which every second migration waits for its slots; the others are refused by a busy host."""
BANDWIDTH: Final = 24 << 20
"""Bytes per second, so that a transfer is long enough to be hit by a call."""
QUIET_SECONDS: Final = 30.0
"""Longest time from the last call until everything has ended."""


@dataclass
class Walk:
    """The result of a walk."""

    calls: int
    seed: int
    seconds: float = 0.0
    answers: Counter[str] = field(default_factory=Counter)
    migrations: Counter[str] = field(default_factory=Counter)
    quiet_after: float | None = None
    """Seconds from the last call until everything had ended. None: not within `QUIET_SECONDS`."""
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems


async def measure(calls: int, seed: int) -> Walk:
    walk = Walk(calls, seed)
    with cluster("sim", GUESTS, hosts=HOSTS, settings=SETTINGS) as made:
        for spec in GUESTS:
            made.start_guest(spec.name)
        began = time.monotonic()
        async with AsyncExitStack() as stack:
            clients = {name: await stack.enter_async_context(Client(address)) for name, address in _servers(made).items()}
            channels = {host: await stack.enter_async_context(open_channel(agent.address)) for host, agent in made.agents.items()}
            honest = [asyncio.create_task(_migrate_for_ever(clients, spec.name, walk)) for spec in GUESTS]
            uuids = {name: guest.uuid for name, guest in made.guests.items()}
            agents = {host: agent.address for host, agent in made.agents.items()}
            outsider = Outsider(random.Random(seed), agents, uuids)
            await _call_at_random(outsider, channels, clients["co"], walk)
            walk.seconds = time.monotonic() - began
            for task in honest:
                task.cancel()
            await asyncio.gather(*honest, return_exceptions=True)
            await _wait_until_quiet(made, clients, channels, walk)
        _judge(made, walk)
    return walk


def _servers(made: Cluster) -> dict[str, str]:
    return {"co": made.server, **{host: agent.address for host, agent in made.agents.items()}}


# ---- the honest migrations


async def _migrate_for_ever(clients: Mapping[str, Client], guest: str, walk: Walk) -> None:
    number = 0
    while True:
        number += 1
        try:
            await _migrate(clients, guest, number, walk)
        except DroverClientError as error:
            walk.migrations[f"refused: {error.reason}"] += 1
            await asyncio.sleep(0.1)


async def _migrate(clients: Mapping[str, Client], guest: str, number: int, walk: Walk) -> None:
    found = [each for each in await clients["co"].list_domains() if each.name == guest and each.state.value == "running"]
    if len(found) != 1:
        await asyncio.sleep(0.1)
        return
    hosts = sorted(set(clients) - {"co", found[0].host})
    server = clients[found[0].host if number % PEER_SHARE == 0 else "co"]
    started = await server.start_migration(
        guest, hosts[number % len(hosts)], bandwidth=BANDWIDTH, slot_wait=SLOT_WAIT * (number % 2)
    )
    async for migration in server.watch_migration(started.id):
        if migration.state.ended:
            walk.migrations[migration.state.value] += 1


# ---- the outsider


async def _call_at_random(outsider: Outsider, channels: Mapping[str, grpc.aio.Channel], coordinator: Client, walk: Walk) -> None:
    made = 0
    looking = asyncio.Lock()

    async def work() -> None:
        nonlocal made
        while made < walk.calls:
            if made % LOOK_AROUND == 0 or not outsider.known:
                async with looking:
                    await _look_around(outsider, coordinator)
            if not outsider.known:
                await asyncio.sleep(0.05)
                continue
            made += 1
            if made % 5000 == 0:
                say(f"{made} calls, {walk.migrations.total()} migrations")
            host, method, request = outsider.next()
            walk.answers[f"{method} {await _call(outsider, channels[host], method, request)}"] += 1

    await asyncio.gather(*(work() for _ in range(AT_ONCE)))


async def _look_around(outsider: Outsider, coordinator: Client) -> None:
    for migration in reversed(await coordinator.list_migrations(limit=20)):
        known = outsider.known.setdefault(migration.id, Known(migration.domain, migration.source, migration.destination))
        known.attempt, known.uri = migration.proto.attempt, migration.proto.uri or known.uri
    for migration_id in [*outsider.known][:-50]:
        del outsider.known[migration_id]


async def _call(outsider: Outsider, channel: grpc.aio.Channel, method: str, request: Any) -> str:
    """Make the call; return "OK", or the reason of its error."""
    is_of_slots = method in ("AcquireSlot", "ReleaseSlot")
    stub = admission_pb2_grpc.AdmissionServiceStub if is_of_slots else handshake_pb2_grpc.HandshakeServiceStub
    try:
        answer = await getattr(stub(channel), method)(request, timeout=CALL_SECONDS)
    except grpc.aio.AioRpcError as error:
        return error_from_rpc(error, "agent").reason
    outsider.learn(request, answer)
    return "OK"


# ---- the end


async def _wait_until_quiet(
    made: Cluster, clients: Mapping[str, Client], channels: Mapping[str, grpc.aio.Channel], walk: Walk
) -> None:
    began = time.monotonic()
    left = ["?"]
    while left and time.monotonic() < began + QUIET_SECONDS:
        await asyncio.sleep(0.25)  # four kinds of things end, and no event tells of all of them
        left = await _left(made, clients, channels)
    if left:
        walk.problems += [f"{QUIET_SECONDS:g} s after the last call: {what}" for what in left]
    else:
        walk.quiet_after = time.monotonic() - began


async def _left(made: Cluster, clients: Mapping[str, Client], channels: Mapping[str, grpc.aio.Channel]) -> list[str]:
    left = []
    for name, client in clients.items():
        active = await client.list_migrations(active_only=True, limit=1000)
        left += [f"{name} has migration {each.id} of {each.domain}: {each.state.value} {each.phase}" for each in active]
    for host, channel in channels.items():
        request = handshake_pb2.ListRecordsRequest(active_only=True)
        stub = handshake_pb2_grpc.HandshakeServiceStub(channel)
        for record in (await stub.ListRecords(request, timeout=CALL_SECONDS)).records:
            state = handshake_pb2.RecordState.Name(record.state).removeprefix("RECORD_STATE_").lower()
            left.append(f"{host} has a record of {record.ref.migration_id} of {record.domain_name}: {state}")
        slots = admission_pb2_grpc.AdmissionServiceStub(channel)
        for slot in (await slots.ListSlots(admission_pb2.ListSlotsRequest(), timeout=CALL_SECONDS)).slots:
            left.append(f"{host} has a {'place' if slot.waiting else 'slot'} of {slot.migration_id}")
    domains = await clients["co"].list_domains()
    for guest in made.guests:
        copies = {each.host: f"{each.state.value} {each.job}".replace(" none", "") for each in domains if each.name == guest}
        if sorted(copies.values()) != ["running"]:
            left.append(f"{guest} is {copies or 'nowhere'}")
    return left


def _judge(made: Cluster, walk: Walk) -> None:
    """Judge the guests' own logs, which cover the whole time: two running copies write the same number twice."""
    for name, guest in made.guests.items():
        with suppress(Exception):
            guest.wait_lines(3, timeout=5.0)
        walk.problems += [f"{name}: {problem}" for problem in guest.judge().problems()]


# ---- report


def tell(walk: Walk) -> None:
    rows = list(_by_method(walk.answers))
    show_table(f"{walk.calls} calls in {walk.seconds:.0f} s, seed {walk.seed}", ("METHOD", "OK", "REFUSED", "MOST OFTEN"), rows)
    ended = [(word, str(number)) for word, number in walk.migrations.most_common()]
    show_table("Honest migrations", ("END", "NUMBER"), ended)
    if walk.quiet_after is not None:
        click.echo(f"\nAll had ended {walk.quiet_after:.1f} s after the last call.")
    for problem in walk.problems:
        click.echo(f"problem: {problem}")


def _by_method(answers: Counter[str]) -> Iterable[tuple[str, ...]]:
    for method in sorted({key.partition(" ")[0] for key in answers}):
        refused = Counter({key.partition(" ")[2]: n for key, n in answers.items() if key.startswith(f"{method} ")})
        fine = refused.pop("OK", 0)
        yield method, str(fine), str(refused.total()), refused.most_common(1)[0][0] if refused else ""


def to_json(walk: Walk) -> dict[str, Any]:
    return {
        "calls": walk.calls,
        "seed": walk.seed,
        "seconds": round(walk.seconds, 1),
        "answers": dict(walk.answers),
        "migrations": dict(walk.migrations),
        "quiet_after": walk.quiet_after,
        "problems": walk.problems,
    }
