"""Two engines on fake hypervisors, and links between them and a driver that can be cut."""

import asyncio
import contextlib
import functools
import itertools
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, MutableSequence
from pathlib import Path
from typing import Any, TypeVar

from structlog.testing import capture_logs
from structlog.typing import EventDict

import agent.handshake.host.journal
from agent.admission.desk import Desk
from agent.admission.settings import Configured
from agent.admission.store import Place
from agent.admission.values import Ask, Claim, Direction, Kind, Slot
from agent.handshake.drive.driver import Driver
from agent.handshake.drive.plan import Plan
from agent.handshake.host.attempt import Attempt
from agent.handshake.host.engine import Engine
from agent.handshake.host.journal import Journal
from agent.handshake.host.peer import OtherHost
from agent.handshake.host.phases import LocalHost
from agent.handshake.host.record_cache import RecordCache
from agent.handshake.host.records import AttemptRecord, decode, state_from_proto
from agent.hypervisor.reasons import translated
from agent.hypervisor.wire import domain_to_proto, features_to_proto
from agent.runtime.errors import DroverError, Reason
from agent.runtime.events import Bus
from agent.runtime.intact import add_functions
from agent.runtime.wire import methods_of
from drover.agent.v1 import admission_pb2, host_pb2
from drover.agent.v1 import handshake_pb2 as pb
from tests.unit.asking import ADDRESSES, ID, PATIENCE, REF, make_plan, until
from tests.unit.clocks import QUICK
from tests.unit.fake_hypervisor import FEATURES, FakeHypervisor, Wire, guest

T = TypeVar("T")

JOURNAL_DOWN = DroverError(Reason.JOURNAL_UNAVAILABLE, "the disk is full")


class MemoryDatabase:
    """A replacement of `agent.runtime.sqlite.Database` without a file and without a thread."""

    def __init__(self) -> None:
        self._connection = sqlite3.connect(":memory:", isolation_level=None)
        add_functions(self._connection)
        for migration in agent.handshake.host.journal._SCHEMA:
            self._connection.executescript(migration) if isinstance(migration, str) else migration(self._connection)

    async def transaction(self, fn: Callable[[sqlite3.Connection], T]) -> T:
        await asyncio.sleep(0)
        return fn(self._connection)

    read = transaction

    async def close(self) -> None:
        self._connection.close()


class FakeJournal(Journal):
    """A journal in memory. `fails`: the errors of the next writes; `down`: all fail; `held`: writes wait for it."""

    def __init__(self, calls: list[str] | None = None) -> None:
        self._memory = MemoryDatabase()
        self._db = self._memory  # type: ignore[assignment]
        self.path = Path("/journal.sqlite")
        self._numbers = itertools.count(1)
        self._ends = itertools.count(1)
        self._ids = set()
        self.calls = calls if calls is not None else []
        self.fails: list[Exception | None] = []
        self.down: Callable[[AttemptRecord], bool] = lambda record: False
        self.refused = 0
        self.pause = 0.0
        """How long a write takes, in seconds."""
        self.held: asyncio.Event | None = None
        self.waiting = asyncio.Event()
        """Set once a write waits for `held`."""

    def row(self, migration_id: str = ID) -> AttemptRecord | None:
        """The durable records."""
        rows = self._memory._connection.execute("SELECT body FROM attempts WHERE migration_id = ? ORDER BY attempt", (migration_id,))
        bodies = [row[0] for row in rows]
        return decode(bodies[-1]) if bodies else None

    def keep(self, record: AttemptRecord) -> None:
        """Write a record as an earlier life of the agent would have."""
        writing = super().put_attempt(record)
        with contextlib.suppress(StopIteration):
            while True:
                writing.send(None)

    async def put_attempt(self, record: AttemptRecord) -> None:
        await asyncio.sleep(self.pause)
        if self.held is not None:
            self.waiting.set()
            await self.held.wait()
        error = self.fails.pop(0) if self.fails else None
        if error is not None or self.down(record):
            self.refused += 1
            raise error or JOURNAL_DOWN
        await super().put_attempt(record)
        self.calls.append(f"journal {record.state}")


class Agent:
    """One host: an engine that can be stopped and started again on the same journal and hypervisor."""

    def __init__(self, name: str, wire: Wire | None = None, *, lease: float = 60.0, takeover: float = 60.0, slots: int = 2) -> None:
        self.name = name
        self.calls: list[str] = []
        """Journal writes and effects, in order."""
        self.bus = Bus()
        self.hypervisor = FakeHypervisor(name, wire, self.calls)
        self.journal = FakeJournal(self.calls)
        self.taken_over: asyncio.Queue[Attempt] = asyncio.Queue()
        self.silent: asyncio.Queue[Place] = asyncio.Queue()
        """Outgoing places whose drivers went silent."""
        self.other_side: OtherHost | None = None
        self.heard = RecordCache()
        self.lease, self.takeover, self.slots = lease, takeover, slots
        self.prepared = 0
        """Most migrations that are prepared beside those that transfer, from the next start on."""
        self.engine = self._engine()
        self._settling: asyncio.Task[None] | None = None
        self.stopped = asyncio.Event()
        """Set when the agent stops; then it answers no call any more."""

    def _engine(self) -> Engine:
        networks = (host_pb2.Network(name="mig", address=ADDRESSES[self.name], roles=["migration"]),)
        host = LocalHost(
            self.name,
            self.hypervisor,
            networks,
            features_to_proto(FEATURES),
            self.lease,
            self.takeover,
            self.bus,
            simulated=True,
            clock=QUICK,
        )
        desk = Desk(
            self.name,
            Configured(incoming_limit=self.slots, outgoing_limit=self.slots, prepared_limit=self.prepared),
            self.journal.admission,
            self.bus,
            lease=self.lease,
            takeover_after=self.takeover,
            check_open=host.check_not_draining,
            on_silent=self.silent.put_nowait,
            clock=QUICK,
        )
        return Engine(host, self.journal, desk, self.taken_over.put_nowait, lambda _: self.other_side, self.heard)

    async def restart(self, *, settling: bool = False) -> None:
        await self._close_engine()
        self.stopped.set()
        self.engine, self.stopped = self._engine(), asyncio.Event()
        await self.engine.recover()
        if settling:
            self.settle()

    def settle(self) -> None:
        """Ask the sources from now on, as the agent's process does."""
        self._settling = asyncio.create_task(self.engine.settle())

    async def _close_engine(self) -> None:
        if self._settling is not None:
            self._settling.cancel()
            await asyncio.wait({self._settling})
        await self.engine.close()

    async def close(self) -> None:
        await self._close_engine()
        await self.journal.close()
        await self.hypervisor.close()

    def keep(self, record: AttemptRecord) -> None:
        """Write a record as an earlier life of the agent would have."""
        self.journal.keep(record)

    def room(self, left: int) -> None:
        """Let migrations from another host hold all incoming slots but so many."""
        queue = self.engine.desk.queues[Direction.INCOMING]
        book = queue.book
        for claim in book.claims():
            if claim.ask.peer == "h9":
                book.free(claim, queue.now)
        for number in range(book.limits.limit - left):
            slot = Slot(Kind.TRANSFERRING, 1, number, queue.now, attached=True)
            book.adopt(Claim(Ask(f"foreign{number}", peer="h9"), number, queue.now, slot), queue.now)
        queue.limit(book.limits)

    @property
    def in_use(self) -> int:
        """Incoming slots that are taken."""
        return self.engine.desk.queues[Direction.INCOMING].book.transferring

    @property
    def effects(self) -> list[str]:
        """The effects on the hypervisor."""
        return [call for call in self.calls if not call.startswith("journal")]

    @property
    def durable(self) -> AttemptRecord:
        """The record that is durable."""
        record = self.journal.row()
        assert record is not None
        return record

    @property
    def journalled(self) -> str:
        """The state that is durable; empty when there is none."""
        record = self.journal.row()
        return record.state if record is not None else ""

    async def record(self, ref: pb.AttemptRef = REF) -> pb.Record:
        return (await self.engine.get_record(pb.GetRecordRequest(ref=ref))).record

    async def reaches(self, *states: str, ref: pb.AttemptRef = REF, within: float = PATIENCE) -> pb.Record:
        """Wait for a state of the record."""
        async with asyncio.timeout(within):
            async for response in self.engine.watch_record(pb.WatchRecordRequest(ref=ref)):
                if state_from_proto(response.record) in states:
                    return response.record
        raise AssertionError(f"it ended as {state_from_proto(await self.record(ref))}, not as {states}")


SERVICES = (pb.DESCRIPTOR.services_by_name["HandshakeService"], admission_pb2.DESCRIPTOR.services_by_name["AdmissionService"])
CALLS = {name: method for service in SERVICES for name, method in methods_of(service).items()}


class Line:
    """A link to an agent that loses calls (`lose`) or answers (`lose_answer`), or is cut. Counts the calls."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self.count: Counter[str] = Counter()
        self.cut: bool = False
        self.lose: Counter[str] = Counter()
        self.lose_answer: Counter[str] = Counter()
        self.refuse: dict[str, list[DroverError]] = {}
        """By call: the errors of the next calls, which do not reach the agent."""
        self.hang: set[str] = set()
        self.on_call: Callable[[str], None] = lambda call: None
        self.answer: dict[str, Callable[[Any], Any]] = {}
        """By call: a function that replaces the answer."""

    async def _call(self, name: str, request: Any) -> Any:
        self.count[name] += 1
        self.on_call(name)
        await asyncio.sleep(0)
        if name in self.hang:
            await asyncio.Event().wait()
        if self.refuse.get(name):
            raise self.refuse[name].pop(0)
        if self.cut or self._lost(self.lose, name):
            raise self.unreachable()
        response = await self._alive(getattr(self.agent.engine, name)(request))
        if self.is_cut() or self._lost(self.lose_answer, name):
            raise self.unreachable()
        return self.answer.get(name, lambda answer: answer)(response)

    async def _alive(self, call: Awaitable[Any]) -> Any:
        """Return the answer, unless the agent is stopped before."""
        answer, stopped = asyncio.ensure_future(call), asyncio.ensure_future(self.agent.stopped.wait())
        try:
            await asyncio.wait({answer, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise self.unreachable()
            return await answer
        finally:
            answer.cancel()
            stopped.cancel()
            await asyncio.wait({answer, stopped})

    def unreachable(self) -> DroverError:
        return DroverError(Reason.HOST_UNREACHABLE, f"{self.agent.name} does not answer")

    def is_cut(self) -> bool:
        return self.cut

    @staticmethod
    def _lost(losses: "Counter[str]", name: str) -> bool:
        losses[name] -= 1
        return losses[name] >= 0

    def __getattr__(self, name: str) -> Callable[[Any], Any]:
        if name not in CALLS:
            raise AttributeError(name)
        return functools.partial(self._call, name)

    async def get_host(self, request: host_pb2.GetHostRequest) -> host_pb2.GetHostResponse:
        if self.cut:
            raise self.unreachable()
        return host_pb2.GetHostResponse(host=host_pb2.Host(name=self.agent.name))

    async def get_domain(self, request: host_pb2.GetDomainRequest) -> host_pb2.GetDomainResponse:
        self.count["get_domain"] += 1
        if self.cut:
            raise self.unreachable()
        with translated(self.agent.name):
            domain = await self.agent.hypervisor.get_domain(request.domain)
        return host_pb2.GetDomainResponse(domain=domain_to_proto(domain))

    async def watch_record(self, request: pb.WatchRecordRequest) -> AsyncIterator[pb.WatchRecordResponse]:
        self.count["watch_record"] += 1
        if self.cut:
            raise self.unreachable()
        async with contextlib.aclosing(self.agent.engine.watch_record(request)) as watch:  # type: ignore[type-var]
            while True:
                try:
                    response = await self._alive(anext(watch))
                except StopAsyncIteration:
                    return
                if self.is_cut():
                    raise self.unreachable()
                yield self.answer.get("watch_record", lambda answer: answer)(response)


class Pair:
    """A source with a guest, a destination, the lines to both, and a driver's view."""

    def __init__(self, **timing: float) -> None:
        self.wire = Wire()
        self.logs: MutableSequence[EventDict] = []
        self.source, self.destination = Agent("h1", self.wire, **timing), Agent("h2", self.wire, **timing)  # type: ignore[arg-type]
        self.source.hypervisor.put(guest())
        self.to_source, self.to_destination = Line(self.source), Line(self.destination)
        self.source.other_side, self.destination.other_side = self.to_destination, self.to_source

    def driver(self, plan: Plan | None = None, on_change: Callable[[], None] = lambda: None) -> Driver:
        return Driver(REF, self.to_source, self.to_destination, plan or make_plan(), on_change, self.source.bus, QUICK)

    def alone(self) -> Agent:
        """Return the source, cut off from its destination, so that a record that its caller relays counts."""
        self.source.other_side = None
        return self.source

    @property
    def runs_on(self) -> list[str]:
        """The hosts on which a copy of the guest runs."""
        return [a.name for a in (self.source, self.destination) for d in a.hypervisor.domains.values() if d.state == "running"]

    @property
    def states(self) -> tuple[str, str]:
        """The durable states of both records."""
        return self.source.journalled, self.destination.journalled

    async def are(self, source: str, destination: str) -> None:
        """Wait for both states."""
        await until(lambda: self.states == (source, destination))

    def moved(self) -> None:
        assert self.states == ("removed", "running")
        assert self.runs_on == ["h2"]
        assert self.source.effects.count("perform") == self.destination.effects.count("finish") == 1

    def stayed(self) -> None:
        assert self.states == ("kept", "gone")
        assert self.runs_on == ["h1"]
        assert "remove" not in self.source.effects

    async def in_doubt(self, driver: Driver) -> None:
        """Let the source send everything while the destination is silent, as if it had died at the worst moment."""
        self.wire.all_sent.clear()
        await self.are("performing", "armed")
        self.wire.starts.clear()
        self.to_destination.cut = True
        self.wire.all_sent.set()
        await until(lambda: driver.view.source_state == "performed" and "destination" in driver.view.silent_since)


@contextlib.asynccontextmanager
async def pair_of_agents(**timing: float) -> AsyncIterator[Pair]:
    pair = Pair(**timing)
    with capture_logs() as pair.logs:
        try:
            await asyncio.gather(*(agent.engine.desk.open() for agent in (pair.source, pair.destination)))
            yield pair
        finally:
            await pair.source.close()
            await pair.destination.close()
