"""The coordinator's line to one agent: a channel, a watch that is kept open on it, and questions."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import grpc.aio
import structlog
from google.protobuf.message import Message

from agent.runtime.errors import DroverError, Reason
from agent.runtime.supervision import supervise
from agent.service.bounds import checked_answer
from agent.service.channel import all_pages, open_channel
from agent.service.status import error_from_rpc, errors_of
from drover.agent.v1 import host_pb2 as pb
from drover.agent.v1 import host_pb2_grpc as rpc

T = TypeVar("T")
M = TypeVar("M", bound=Message)

QUESTION_SECONDS: Final = 2.0
"""Deadline of a question to an agent."""
FIRST_WORD_SECONDS: Final = 3.0
"""An agent that takes longer than this to answer a watch counts as unreachable."""
FIRST_PAUSE_SECONDS: Final = 0.2
"""The longest pause before a broken watch is opened again for the first time; twice as long after each failure, …"""
LONGEST_PAUSE_SECONDS: Final = 120.0
"""… up to this. An agent that is back says so by registering, and is not waited for."""
LET_GO_AFTER: Final = 3
"""After so many failures the channel is closed until it is needed: gRPC would go on connecting by itself."""
SPOKEN_AT_ONCE: Final = 64
SILENT_AT_ONCE: Final = 16
"""Attempts to reach hosts at once: those that have just registered, and those that have not."""
HEARTBEATS_MISSED: Final = 3
"""So many heartbeats without a word on an open watch, and it counts as broken: the agent hangs."""
CLOSE_SECONDS: Final = 5.0
MAX_DOMAINS: Final = 16_384
"""Guests of one host that are taken from its agent."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Word:
    """What an agent said of its host."""

    host: pb.Host
    send_time_ns: int = 0
    """What its wall clock said then (Unix time). 0: not told."""


class Lanes:
    """Turns to connect, for all links of a coordinator. A host that has just spoken does not queue behind those that are silent."""

    def __init__(self) -> None:
        self._spoken = asyncio.Semaphore(SPOKEN_AT_ONCE)
        self._silent = asyncio.Semaphore(SILENT_AT_ONCE)

    @contextlib.asynccontextmanager
    async def turn(self, spoken: asyncio.Event) -> AsyncIterator[None]:
        """Wait for a turn; `spoken` is set when the host speaks, meanwhile too."""
        waiting, speaking = asyncio.create_task(self._silent.acquire()), asyncio.create_task(spoken.wait())
        try:
            await asyncio.wait({waiting, speaking}, return_when=asyncio.FIRST_COMPLETED)
            if waiting.done():
                yield
                return
            waiting.cancel()
            async with self._spoken:
                yield
        finally:
            speaking.cancel()
            waiting.cancel()  # without effect once it has its turn, which it gives back at whichever moment this ends
            waiting.add_done_callback(self._give_back)

    def _give_back(self, turn: "asyncio.Task[bool]") -> None:
        if not turn.cancelled():
            self._silent.release()


def pause_after(failures: int, random: Callable[[], float] = random.random) -> float:
    """Seconds before the next attempt: anything up to a ceiling that grows with each failure, so that hosts do not come in waves."""
    return random() * min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2.0 ** min(failures - 1, 32))


class HostLink:
    """`on_word` gets each word of the watch, and raises `DroverError` for one that is not to be believed;
    `on_silence` is told why the watch broke, or did not come about. Both get the link too, and must not wait."""

    def __init__(
        self,
        name: str,
        address: str,
        on_word: Callable[["HostLink", Word], None],
        on_silence: Callable[["HostLink", str], None],
        lanes: Lanes,
        heartbeat_seconds: float = 5.0,
        coordinator: str = "",
    ) -> None:
        self.name = name
        self.address = address
        self._request = pb.WatchHostRequest(coordinator=coordinator)
        self._request.repeat_interval.FromNanoseconds(round(heartbeat_seconds * 1e9))
        self._silence_seconds = HEARTBEATS_MISSED * heartbeat_seconds
        self._channel: grpc.aio.Channel | None = None
        self._lanes = lanes
        self.repeats = True
        """The agent repeats its word when nothing changes."""
        self.connected = False
        """The watch is open, and something was heard on it."""
        self._on_word = on_word
        self._on_silence = on_silence
        self._hurry = asyncio.Event()
        self._task = supervise(f"watch-host-{name}", self._keep_watching)

    @property
    def channel(self) -> grpc.aio.Channel:
        """Not to be kept: it is closed when the host does not answer."""
        if self._channel is None:
            self._channel = open_channel(self.address)
        return self._channel

    async def let_go(self) -> None:
        """Close the channel; it is opened again when it is needed."""
        channel, self._channel = self._channel, None
        if channel is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_SECONDS):
                    await channel.close()

    def hurry(self) -> None:
        """There is reason to believe that the agent is back: end the pause before the next try."""
        self._hurry.set()

    def stop(self) -> asyncio.Task[None]:
        """End the watch; it has ended once the task has."""
        self._task.cancel()
        return self._task

    async def close(self) -> None:
        """End the watch, and every other call on the channel."""
        await close_links([self])

    async def get_domain(self, request: pb.GetDomainRequest) -> Sequence[pb.GetDomainResponse]:
        """The guest and what it needs, or nothing if this host has none of that name. Raises what the agent says, HOST_UNREACHABLE,
        DEADLINE_EXCEEDED."""
        call = rpc.HostServiceStub(self.channel).GetDomain
        try:
            return (await self._ask(call(request, timeout=QUESTION_SECONDS)),)
        except DroverError as error:
            if error.reason is Reason.DOMAIN_NOT_FOUND:
                return ()
            raise

    async def list_domains(self) -> Sequence[pb.Domain]:
        """Every guest of this host. Raises what the agent says, HOST_UNREACHABLE, DEADLINE_EXCEEDED, FIELD_TOO_LARGE."""
        call = rpc.HostServiceStub(self.channel).ListDomains
        domains: list[pb.Domain] = []
        async for page in all_pages(lambda r: self._ask(call(r, timeout=QUESTION_SECONDS)), pb.ListDomainsRequest()):
            domains += page.domains
            if len(domains) > MAX_DOMAINS:
                raise DroverError(Reason.FIELD_TOO_LARGE, f"{self.address} lists more than {MAX_DOMAINS} guests")
        return domains

    async def _ask(self, call: Awaitable[M]) -> M:
        with errors_of(self.address):
            return checked_answer(await call, self.address)

    async def _keep_watching(self) -> None:
        failures = 0
        while True:
            why = await self._watch_until_silence()
            failures = 1 if self.connected else failures + 1
            self.connected = False
            self._on_silence(self, why)
            if failures >= LET_GO_AFTER:
                await self.let_go()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_after(failures)):
                    await self._hurry.wait()

    async def _watch_until_silence(self) -> str:
        """Why the watch ended."""
        try:
            await self._watch()
        except DroverError as error:
            return error.message
        except grpc.aio.AioRpcError as error:
            return error_from_rpc(error, self.address).message
        except TimeoutError:
            if self.connected:
                return f"{self.address} has said nothing for {self._silence_seconds:g} s"
            return f"{self.address} did not answer within {FIRST_WORD_SECONDS:g} s"
        except Exception as error:  # a watch that died unseen would leave the host up for ever
            log.exception("host.watch_failed", address=self.address)
            return f"the watch failed here: {type(error).__name__}"
        return "the agent ended the watch"

    async def _watch(self) -> None:
        """Until the stream ends. HTTP/2 pings find a dead peer, missed heartbeats a hanging one; an agent of an older version
        neither repeats its word nor says when it sent it. Raises `TimeoutError`.
        """
        call = None
        try:
            async with self._lanes.turn(self._hurry), asyncio.timeout(FIRST_WORD_SECONDS):
                self._hurry.clear()
                call = rpc.HostServiceStub(self.channel).WatchHost(self._request, wait_for_ready=True)
                more = self._heard(await call.read())
            while more:
                async with asyncio.timeout(self._silence_seconds if self.repeats else None):
                    response = await call.read()
                more = self._heard(response)
        finally:
            if call is not None:
                call.cancel()  # grpcio keeps a call for ever that is neither read to its end nor cancelled

    def _heard(self, response: object) -> bool:
        """Take one answer of the watch; False at the end of the stream."""
        if not isinstance(response, pb.WatchHostResponse):
            return False
        self.repeats = response.HasField("send_time")
        self._on_word(self, Word(checked_answer(response, self.address).host, response.send_time.ToNanoseconds()))
        self.connected = True
        return True


async def close_links(links: Sequence[HostLink]) -> None:
    """End their watches, then close their channels: a channel that closes looks at every task of the process, and raises
    CancelledError in whoever reads from it, cancelled or not.
    """
    tasks = [link.stop() for link in links]
    if tasks:
        await asyncio.wait(tasks, timeout=CLOSE_SECONDS)
    for link in links:
        await link.let_go()


async def answer_of(question: Awaitable[Sequence[T]]) -> Sequence[T] | None:
    """None if there is no answer. Raises DOMAIN_AMBIGUOUS: that answer is one for all hosts."""
    try:
        return await question
    except DroverError as error:
        if error.reason is Reason.DOMAIN_AMBIGUOUS:
            raise
        return None
