"""`scripts/bench admission`: what reservations cost an agent, next to a bare grpc.aio echo with the same messages.

The contenders take turns, so that a period of load on the machine affects all of them. One process of the bench is the client of
all; on two cores it costs about as much as a server, so the CPU time of the servers is measured, too.
"""

import asyncio
import contextlib
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc.aio

from agent.runtime.errors import Reason
from agent.runtime.wire import duration
from agent.service.channel import open_channel
from agent.service.status import error_from_rpc
from drover.agent.v1 import admission_pb2 as pb
from drover.agent.v1 import admission_pb2_grpc as rpc
from drover.agent.v1 import handshake_pb2, handshake_pb2_grpc, host_pb2, host_pb2_grpc, migration_pb2
from tests.bench.output import say
from tests.bench.processes import read_process
from tests.bench.stats import Series
from tests.kit.cluster import Cluster, GuestSpec, cluster

ECHO, ACQUIRE, RESERVE = "echo", "acquire and release", "reserve and abandon"
CHANNELS: Final = 4
"""Connections; a connection carries at most 256 calls at once."""
CALL_SECONDS: Final = 30.0
PROBES: Final = 200
"""Calls of one who does not wait, beside a full queue."""
GUEST = GuestSpec("asks", memory_mib=64)

Pair = Callable[[grpc.aio.Channel, int], Awaitable[None]]
"""One reservation and its end."""


@dataclass(frozen=True)
class Setting:
    seconds: float
    """Of each contender in each round."""
    rounds: int
    at_once: int
    """Reservations under way at once."""
    waiting: int
    """Sources that wait at once for one slot."""


@dataclass
class Figures:
    """The reservations of one contender."""

    rates: list[float] = field(default_factory=list)
    """Pairs per second, by round."""
    cpu_ms: list[float] = field(default_factory=list)
    """Of the server for each pair, by round."""
    took_ms: list[float] = field(default_factory=list)
    """Each pair."""

    @property
    def rate(self) -> float:
        return Series.of(self.rates).p50

    @property
    def cpu(self) -> float:
        return Series.of(self.cpu_ms).p50


@dataclass
class Queue:
    """What happens beside a full queue. Times in ms."""

    hand_over: Series
    """From the request that frees the slot until the next one has it."""
    refused: Series
    """Until BUSY is answered to one who does not wait."""
    echo: Series
    """One call of the echo, at the same rate."""
    grants_per_second: float
    starved: int
    """Sources that never had the slot."""


@dataclass
class Result:
    setting: Setting
    figures: dict[str, Figures] = field(default_factory=dict)
    queue: Queue | None = None
    load: tuple[float, float] = (0.0, 0.0)

    def ratio(self, contender: str) -> float:
        return self.figures[contender].rate / self.figures[ECHO].rate


def measure(setting: Setting) -> Result:
    """Measure all; each part has a cluster of its own."""
    result = Result(setting)
    before = os.getloadavg()[0]
    with _echo_server() as (echo, pid):
        with _agents(1000) as made:
            asyncio.run(_rates(setting, result, made, echo, pid))
        with _agents(1) as made:
            result.queue = asyncio.run(_queue(setting, made.agents["h2"].address, echo))
    result.load = before, os.getloadavg()[0]
    return result


def _agents(limit: int) -> contextlib.AbstractContextManager[Cluster]:
    return cluster("sim", [GUEST], lab_id="admission", settings={"agent": {"incoming_limit": limit}})


@contextlib.contextmanager
def _echo_server() -> Iterator[tuple[str, int]]:
    with tempfile.TemporaryDirectory(prefix="drover-echo-") as folder:
        address = f"unix:{Path(folder) / 'echo.sock'}"
        server = subprocess.Popen([sys.executable, "-m", "tests.bench.admission_echo", address], stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            assert server.stdout.readline().strip() == "serving"
            yield address, server.pid
        finally:
            server.kill()
            server.wait(timeout=10)


@contextlib.asynccontextmanager
async def _channels(address: str, number: int = CHANNELS) -> AsyncIterator[Sequence[grpc.aio.Channel]]:
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(open_channel(address)) for _ in range(number)]


# ---- rates


async def _rates(setting: Setting, result: Result, made: Cluster, echo: str, echo_pid: int) -> None:
    agent = made.agents["h2"]
    made.start_guest(GUEST.name)
    async with _channels(made.agents["h1"].address, 1) as (channel,):
        asked = host_pb2.GetDomainRequest(domain=GUEST.name)
        known = await host_pb2_grpc.HostServiceStub(channel).GetDomain(asked, timeout=CALL_SECONDS)
    pid = agent.running().pid
    contenders: dict[str, tuple[str, int, Pair]] = {
        ECHO: (echo, echo_pid, acquire_and_release),
        ACQUIRE: (agent.address, pid, acquire_and_release),
        RESERVE: (agent.address, pid, _reserving(known.requirements)),
    }
    for number in range(setting.rounds):
        for name, (address, server, pair) in contenders.items():
            figures = result.figures.setdefault(name, Figures())
            await _round(setting, address, server, pair, figures)
            say(f"round {number + 1}: {name:20s} {figures.rates[-1]:7.0f}/s, {figures.cpu_ms[-1]:.2f} ms of CPU each")


async def _round(setting: Setting, address: str, pid: int, pair: Pair, figures: Figures) -> None:
    async with _channels(address) as channels:
        await asyncio.gather(*(pair(channel, 0) for channel in channels))  # connects
        cpu, began, done = read_process(pid).cpu_seconds, time.monotonic(), 0

        async def work(number: int) -> None:
            nonlocal done
            while time.monotonic() < began + setting.seconds:
                start = time.monotonic()
                await pair(channels[number % len(channels)], number)
                figures.took_ms.append((time.monotonic() - start) * 1e3)
                done += 1

        await asyncio.gather(*map(work, range(setting.at_once)))
        seconds = time.monotonic() - began
    figures.rates.append(done / seconds)
    figures.cpu_ms.append((read_process(pid).cpu_seconds - cpu) / done * 1e3)


def _asks(migration_id: str, source: str, wait: float = 0.0) -> pb.AcquireSlotRequest:
    request = pb.AcquireSlotRequest(
        migration_id=migration_id,
        request_id=migration_id,
        direction=pb.SLOT_DIRECTION_INCOMING,
        kind=pb.SLOT_KIND_TRANSFERRING,
        peer_host=source,
        importance=migration_pb2.IMPORTANCE_MEDIUM,
        memory_bytes=1 << 30,
        driver="bench",
    )
    if wait:
        request.wait.CopyFrom(duration(wait))
    return request


def _gives(migration_id: str) -> pb.ReleaseSlotRequest:
    return pb.ReleaseSlotRequest(migration_id=migration_id, request_id=migration_id, direction=pb.SLOT_DIRECTION_INCOMING)


async def acquire_and_release(channel: grpc.aio.Channel, number: int) -> None:
    migration_id, stub = str(uuid.uuid4()), _stub(channel)
    answer = await stub.AcquireSlot(_asks(migration_id, f"s{number}"), timeout=CALL_SECONDS)
    assert answer.HasField("slot"), answer
    await stub.ReleaseSlot(_gives(migration_id), timeout=CALL_SECONDS)


def _stub(channel: grpc.aio.Channel) -> Any:
    return rpc.AdmissionServiceStub(channel)


def _reserving(requirements: host_pb2.GuestRequirements) -> Pair:
    """Return the pair that makes a record and ends it, for guests of these requirements."""

    async def reserve_and_abandon(channel: grpc.aio.Channel, number: int) -> None:
        stub: Any = handshake_pb2_grpc.HandshakeServiceStub(channel)
        ref = handshake_pb2.AttemptRef(migration_id=str(uuid.uuid4()), attempt=1)
        wanted = host_pb2.GuestRequirements()
        wanted.CopyFrom(requirements)
        wanted.uuid = str(uuid.uuid4())
        wanted.name = f"guest-{wanted.uuid}"
        request = handshake_pb2.ReserveSlotRequest(ref=ref, request_id="r", requirements=wanted, source_host=f"s{number}")
        await stub.ReserveSlot(request, timeout=CALL_SECONDS)
        await stub.Abandon(handshake_pb2.AbandonRequest(ref=ref, request_id="a"), timeout=CALL_SECONDS)

    return reserve_and_abandon


# ---- the queue


async def _queue(setting: Setting, address: str, echo: str) -> Queue:
    """Keep `waiting` sources waiting for one slot, which each gives back at once, for the time of a round."""
    hand_over: list[float] = []
    had: set[int] = set()
    freed = [time.monotonic()]
    stop = asyncio.Event()
    async with (
        _channels(address, setting.waiting // 200 + 1) as channels,
        _channels(address, 1) as (beside,),
        _channels(echo, 1) as (other,),
    ):

        async def source(number: int) -> None:
            stub = _stub(channels[number % len(channels)])
            while not stop.is_set():
                migration_id = str(uuid.uuid4())
                while True:
                    answer = await stub.AcquireSlot(_asks(migration_id, f"s{number}", wait=25.0), timeout=CALL_SECONDS)
                    if answer.HasField("slot"):
                        break
                hand_over.append((time.monotonic() - freed[0]) * 1e3)
                had.add(number)
                freed[0] = time.monotonic()
                await stub.ReleaseSlot(_gives(migration_id), timeout=CALL_SECONDS)

        holder = str(uuid.uuid4())
        await _stub(beside).AcquireSlot(_asks(holder, "holder"), timeout=CALL_SECONDS)
        tasks = [asyncio.create_task(source(number)) for number in range(setting.waiting)]
        try:
            await _until_waiting(_stub(beside), setting.waiting)
            refused = [await _took(_refused(beside)) for _ in range(PROBES)]
            echoed = [await _took(_stub(other).AcquireSlot(_asks(holder, "s"), timeout=CALL_SECONDS)) for _ in range(PROBES)]
            freed[0] = began = time.monotonic()
            await _stub(beside).ReleaseSlot(_gives(holder), timeout=CALL_SECONDS)
            done, _ = await asyncio.wait(tasks, timeout=max(setting.seconds * setting.rounds, 10.0), return_when="FIRST_EXCEPTION")
            for task in done:
                task.result()
            seconds = time.monotonic() - began
        finally:
            stop.set()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    return Queue(Series.of(hand_over), Series.of(refused), Series.of(echoed), len(hand_over) / seconds, setting.waiting - len(had))


async def _until_waiting(stub: Any, number: int) -> None:
    for _ in range(600):
        found, request = 0, pb.ListSlotsRequest()
        while True:
            page = await stub.ListSlots(request, timeout=CALL_SECONDS)
            found += sum(slot.waiting for slot in page.slots)
            request.page_token = page.next_page_token
            if not request.page_token:
                break
        if found >= number:
            return
        await asyncio.sleep(0.1)
    raise RuntimeError(f"only {found} of {number} sources wait after a minute")


async def _refused(channel: grpc.aio.Channel) -> None:
    try:
        await _stub(channel).AcquireSlot(_asks(str(uuid.uuid4()), "late"), timeout=CALL_SECONDS)
    except grpc.aio.AioRpcError as error:
        if error_from_rpc(error, "the agent").reason is not Reason.BUSY:
            raise
    else:
        raise RuntimeError("a slot was granted while another migration had the only one")


async def _took(call: Awaitable[Any]) -> float:
    began = time.monotonic()
    await call
    return (time.monotonic() - began) * 1e3
