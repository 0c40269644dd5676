"""The coordinator's connection to one agent: a channel, a watch that is kept open on it, and queries."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import grpc.aio
import structlog
from google.protobuf.message import Message

from agent.runtime.backoff import HOST_LINK, SYSTEM_CLOCK, Clock, Pauses
from agent.runtime.errors import DroverError, Reason
from agent.runtime.supervision import supervise
from agent.service.bounds import answer_of, checked_answer
from agent.service.channel import all_pages, open_channel
from agent.service.status import error_from_rpc
from drover.agent.v1 import host_pb2 as pb
from drover.agent.v1 import host_pb2_grpc as rpc

T = TypeVar("T")
M = TypeVar("M", bound=Message)

QUESTION_SECONDS: Final = 2.0
"""Deadline of a query to an agent."""
FIRST_REPORT_SECONDS: Final = 3.0
"""An agent that takes longer than this to answer a watch counts as unreachable."""
CLOSE_CHANNEL_AFTER: Final = 3
"""Failures after which the channel is closed until it is needed: gRPC would keep connecting by itself."""
REGISTERED_AT_ONCE: Final = 64
"""Connection attempts at once to hosts that have just registered."""
OTHERS_AT_ONCE: Final = 16
"""Connection attempts at once to all other hosts."""
HEARTBEATS_MISSED: Final = 3
"""An open watch without a message for this many heartbeats counts as broken: the agent hangs."""
CLOSE_SECONDS: Final = 5.0
MAX_DOMAINS: Final = 16_384
"""Largest number of guests that is accepted from one host."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class HostReport:
    """One report of an agent about its host."""

    host: pb.Host
    send_time_ns: int = 0
    """When it was sent, by the agent's wall clock (Unix time in nanoseconds). 0: an older agent does not send it."""


class ConnectLimits:
    """Limits on connection attempts, for all links of a coordinator. A host that has just registered does not queue behind silent
    ones.
    """

    def __init__(self) -> None:
        self._spoken = asyncio.Semaphore(REGISTERED_AT_ONCE)
        self._silent = asyncio.Semaphore(OTHERS_AT_ONCE)

    @contextlib.asynccontextmanager
    async def turn(self, spoken: asyncio.Event) -> AsyncIterator[None]:
        """Hold a turn to connect. `spoken` is set when the host registers, before or during the wait."""
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
            waiting.cancel()  # no effect once it holds the semaphore; the callback then releases it
            waiting.add_done_callback(self._give_back)

    def _give_back(self, turn: "asyncio.Task[bool]") -> None:
        if not turn.cancelled():
            self._silent.release()


class HostLink:
    """The connection to one agent. Watches the host and reconnects until it is stopped.

    `on_word` gets each report of the watch, and raises `DroverError` for one that it rejects; `on_silence` gets the reason why the
    watch broke or could not be opened. Both get the link as well, and must not block.
    """

    def __init__(
        self,
        name: str,
        address: str,
        on_report: Callable[["HostLink", HostReport], None],
        on_silence: Callable[["HostLink", str], None],
        lanes: ConnectLimits,
        heartbeat_seconds: float = 5.0,
        coordinator: str = "",
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self.name = name
        self.address = address
        self._request = pb.WatchHostRequest(coordinator=coordinator)
        self._request.repeat_interval.FromNanoseconds(round(heartbeat_seconds * 1e9))
        self._silence_seconds = HEARTBEATS_MISSED * heartbeat_seconds
        self._channel: grpc.aio.Channel | None = None
        self._lanes = lanes
        self.repeats = True
        """The agent repeats its report when nothing changes (an older one does not)."""
        self.connected = False
        """The watch is open and has delivered a report."""
        self._on_report = on_report
        self._on_silence = on_silence
        self._clock = clock
        self._hurry = asyncio.Event()
        self._task = supervise(f"watch-host-{name}", self._keep_watching, clock)

    @property
    def channel(self) -> grpc.aio.Channel:
        """The channel to the agent, opened if needed. Do not keep it: it is closed when the host does not answer."""
        if self._channel is None:
            self._channel = open_channel(self.address)
        return self._channel

    async def close_channel(self) -> None:
        """Close the channel; the next use opens it again."""
        channel, self._channel = self._channel, None
        if channel is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_SECONDS):
                    await channel.close()

    def hurry(self) -> None:
        """End the pause before the next attempt, because the agent is probably back."""
        self._hurry.set()

    def stop(self) -> asyncio.Task[None]:
        """Cancel the watch; it has ended when the returned task has."""
        self._task.cancel()
        return self._task

    async def close(self) -> None:
        """End the watch, and every other call on the channel."""
        await close_links([self])

    async def get_domain(self, request: pb.GetDomainRequest) -> Sequence[pb.GetDomainResponse]:
        """Return the guest and its requirements; nothing if this host has no such guest. Raises the agent's error, HOST_UNREACHABLE,
        DEADLINE_EXCEEDED.
        """
        call = rpc.HostServiceStub(self.channel).GetDomain
        try:
            return (await answer_of(call(request, timeout=QUESTION_SECONDS), self.address),)
        except DroverError as error:
            if error.reason is Reason.DOMAIN_NOT_FOUND:
                return ()
            raise

    async def list_domains(self) -> Sequence[pb.Domain]:
        """Return every guest of this host. Raises the agent's error, HOST_UNREACHABLE, DEADLINE_EXCEEDED, FIELD_TOO_LARGE."""
        call = rpc.HostServiceStub(self.channel).ListDomains
        domains: list[pb.Domain] = []
        async for page in all_pages(lambda r: answer_of(call(r, timeout=QUESTION_SECONDS), self.address), pb.ListDomainsRequest()):
            domains += page.domains
            if len(domains) > MAX_DOMAINS:
                raise DroverError(Reason.FIELD_TOO_LARGE, f"{self.address} lists more than {MAX_DOMAINS} guests")
        return domains

    async def _keep_watching(self) -> None:
        pauses = Pauses(HOST_LINK, self._clock)
        while True:
            why = await self._watch_until_silence()
            if self.connected:
                pauses.succeeded()
            self.connected = False
            self._on_silence(self, why)
            if pauses.failures + 1 >= CLOSE_CHANNEL_AFTER:
                await self.close_channel()
            await pauses.pause(self._hurry)

    async def _watch_until_silence(self) -> str:
        """Watch until that fails; return why it ended."""
        try:
            await self._watch()
        except DroverError as error:
            return error.message
        except grpc.aio.AioRpcError as error:
            return error_from_rpc(error, self.address).message
        except TimeoutError:
            if self.connected:
                return f"the agent at {self.address} has sent nothing for {self._silence_seconds:g} s"
            return f"the agent at {self.address} did not answer within {FIRST_REPORT_SECONDS:g} s"
        except Exception as error:  # a watch that ended unnoticed would leave the host up for ever
            log.exception("host.watch_failed", address=self.address)
            return f"unexpected error in the coordinator (bug): {type(error).__name__}; see host.watch_failed in its log"
        return "the agent ended the watch"

    async def _watch(self) -> None:
        """Watch until the stream ends. HTTP/2 pings detect a dead peer, missed heartbeats a hanging one; an older agent sends no
        heartbeats and no send times, so only the pings watch it. Raises `TimeoutError`.
        """
        call = None
        try:
            async with self._lanes.turn(self._hurry), asyncio.timeout(FIRST_REPORT_SECONDS):
                self._hurry.clear()
                call = rpc.HostServiceStub(self.channel).WatchHost(self._request, wait_for_ready=True)
                more = self._heard(await call.read())
            while more:
                async with asyncio.timeout(self._silence_seconds if self.repeats else None):
                    response = await call.read()
                more = self._heard(response)
        finally:
            if call is not None:
                call.cancel()  # grpcio leaks a call that is neither read to its end nor cancelled

    def _heard(self, response: object) -> bool:
        """Handle one response of the watch. Return False at the end of the stream."""
        if not isinstance(response, pb.WatchHostResponse):
            return False
        self.repeats = response.HasField("send_time")
        self._on_report(self, HostReport(checked_answer(response, self.address).host, response.send_time.ToNanoseconds()))
        self.connected = True
        return True


async def close_links(links: Sequence[HostLink]) -> None:
    """End the watches, then close the channels. The order matters: gRPC raises CancelledError in every task that still reads from a
    channel that is being closed, cancelled or not.
    """
    tasks = [link.stop() for link in links]
    if tasks:
        await asyncio.wait(tasks, timeout=CLOSE_SECONDS)
    for link in links:
        await link.close_channel()


async def answer_if_any(question: Awaitable[Sequence[T]]) -> Sequence[T] | None:
    """Return the answer to a query, or None if it fails. Raises DOMAIN_AMBIGUOUS, which holds for the whole cluster."""
    try:
        return await question
    except DroverError as error:
        if error.reason is Reason.DOMAIN_AMBIGUOUS:
            raise
        return None
