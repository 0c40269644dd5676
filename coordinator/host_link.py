"""The coordinator's line to one agent: a channel, a watch that is kept open on it, and questions."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, TypeVar

import grpc.aio
import structlog
from google.protobuf.message import Message

from agent.errors import DroverError, Reason
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
BACKOFF_SECONDS: Final = (0.1, 0.2, 0.5, 1.0, 2.0)
"""Pauses before a broken watch is opened again; the last one from then on."""
CLOSE_SECONDS: Final = 5.0
MAX_DOMAINS: Final = 16_384
"""Guests of one host that are taken from its agent."""

log = structlog.get_logger(__name__)


class HostLink:
    """`on_word` gets each Host that the watch tells, and raises `DroverError` for one that is not to be believed;
    `on_silence` is told why the watch broke, or did not come about. Both get the link too, and must not wait."""

    def __init__(
        self,
        address: str,
        on_word: Callable[["HostLink", pb.Host], None],
        on_silence: Callable[["HostLink", str], None],
    ) -> None:
        self.address = address
        self.channel = open_channel(address)
        self.connected = False
        """The watch is open, and something was heard on it."""
        self._on_word = on_word
        self._on_silence = on_silence
        self._hurry = asyncio.Event()
        self._task = asyncio.create_task(self._keep_watching(), name=f"watch-host-{address}")

    def hurry(self) -> None:
        """There is reason to believe that the agent is back: end the pause before the next try."""
        self._hurry.set()

    async def close(self) -> None:
        """End the watch, and every other call on the channel."""
        # The task first: a channel that closes raises CancelledError in whoever reads from it, cancelled or not.
        self._task.cancel()
        await asyncio.wait({self._task}, timeout=CLOSE_SECONDS)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                await self.channel.close()

    async def get_domain(self, name_or_uuid: str) -> Sequence[pb.GetDomainResponse]:
        """The guest and what it needs, or nothing if this host has none of that name. Raises what the agent says, HOST_UNREACHABLE,
        DEADLINE_EXCEEDED."""
        call = rpc.HostServiceStub(self.channel).GetDomain
        try:
            return (await self._ask(call(pb.GetDomainRequest(domain=name_or_uuid), timeout=QUESTION_SECONDS)),)
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
            self._hurry.clear()
            # After a failure the channel itself says when it is connected again, sooner than another call would.
            why = await self._watch_until_silence(wait_for_ready=failures > 0)
            failures = 1 if self.connected else failures + 1
            self.connected = False
            self._on_silence(self, why)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(BACKOFF_SECONDS[min(failures, len(BACKOFF_SECONDS)) - 1]):
                    await self._hurry.wait()

    async def _watch_until_silence(self, *, wait_for_ready: bool) -> str:
        """Why the watch ended."""
        try:
            await self._watch(wait_for_ready=wait_for_ready)
        except DroverError as error:
            return error.message
        except grpc.aio.AioRpcError as error:
            return error_from_rpc(error, self.address).message
        except TimeoutError:
            return f"{self.address} did not answer within {FIRST_WORD_SECONDS:g} s"
        except Exception as error:  # a watch that died unseen would leave the host up for ever
            log.exception("host.watch_failed", address=self.address)
            return f"the watch failed here: {type(error).__name__}"
        return "the agent ended the watch"

    async def _watch(self, *, wait_for_ready: bool) -> None:
        """Until the stream ends. Silence within it has no deadline here: HTTP/2 pings find a dead peer, and missed
        heartbeats a hanging one."""
        call = rpc.HostServiceStub(self.channel).WatchHost(pb.WatchHostRequest(), wait_for_ready=wait_for_ready)
        deadline: float | None = FIRST_WORD_SECONDS
        try:
            while True:
                async with asyncio.timeout(deadline):
                    response = await call.read()
                if not isinstance(response, pb.WatchHostResponse):  # the end of the stream
                    return
                self._on_word(self, checked_answer(response, self.address).host)
                self.connected = True
                deadline = None
        finally:
            call.cancel()  # grpcio keeps a call for ever that is neither read to its end nor cancelled


async def answer_of(question: Awaitable[Sequence[T]]) -> Sequence[T] | None:
    """None if there is no answer. Raises DOMAIN_AMBIGUOUS: that answer is one for all hosts."""
    try:
        return await question
    except DroverError as error:
        if error.reason is Reason.DOMAIN_AMBIGUOUS:
            raise
        return None
