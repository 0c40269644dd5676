"""What a transfer waits for, with figures, why, and until when.

A wait is told by whoever can say it: here while the memory should flow, `attempt.telling` while a call to the hypervisor lasts.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import structlog

from agent.handshake.host.aftercare import note_pause
from agent.handshake.host.attempt import Attempt, waits_for
from agent.handshake.host.phases import LocalHost
from agent.handshake.host.records import Failure, progress_to_proto
from agent.hypervisor.base import HypervisorError, Progress
from agent.hypervisor.interface import Outgoing
from agent.runtime.errors import DroverError, Reason

log = structlog.get_logger()

PROGRESS_SECONDS: Final = 0.25
"""Between two readings of a transfer's progress: libvirt has no event for it."""
STALL_SECONDS: Final = 2.0
"""A transfer that has sent nothing for so long is told as standing still."""
CONNECT_SECONDS: Final = 20.0
"""A migration port that has answered nothing for so long is given up. TCP has asked five times by then; a path that needs longer
moves no guest. The kernel's own limit is some 130 s."""
KERNEL_SECONDS: Final = 130
"""After which the kernel gives up a connection that nobody answers, where it cannot be ended before."""
MIND_SECONDS: Final = 2.0
"""Between two looks at whether the process of a copy that waits for its stream is stopped."""


@dataclass
class Flow:
    """How long nothing has been sent. Pure but for the clock that is handed in."""

    clock: Callable[[], float] = time.monotonic
    _sent: int = -1
    _since: float = field(default=0.0)

    def __post_init__(self) -> None:
        self._since = self.clock()

    def saw(self, progress: Progress) -> None:
        if progress.processed_bytes != self._sent:
            self._sent, self._since = progress.processed_bytes, self.clock()

    @property
    def idle(self) -> float:
        """Seconds since anything was sent, or since the transfer was asked for."""
        return self.clock() - self._since


def unanswered(peer: str, uri: str, repeats: int, idle: float, *, cannot_end: str, ending: bool) -> str:
    """What is waited for while nobody answers at the migration port."""
    words = (
        f"{peer} to answer at {uri}: asked {repeats + 1} times in {idle:.0f} s without an answer, so packets to that port are "
        "dropped on the way (a firewall?)"
    )
    if cannot_end:
        return (
            f"{words}. The connection cannot be ended ({cannot_end}); the kernel gives it up {KERNEL_SECONDS} s after it was begun"
        )
    return f"{words}; it is being ended" if ending else f"{words}; given up after {CONNECT_SECONDS:g} s"


def no_answer(host: str, peer: str, uri: str) -> Failure:
    """The failure of a transfer whose port nobody answered."""
    text = (
        f"{host}: {peer} has not answered at {uri} within {CONNECT_SECONDS:g} s, so packets to that port are dropped on the way; "
        "let the firewalls between both hosts pass the migration ports"
    )
    return Failure(Reason.TRANSFER_FAILED, text, {"host": host})


def stands_still(host: str, peer: str, idle: float, why: str) -> str:
    """What is waited for while a transfer under way sends nothing."""
    if why:
        words = f"{host} to send more, as nothing was sent for {idle:.0f} s: {why}"
        return f"{words}; until then the transfer can neither go on nor be stopped"
    return f"{peer} to take more, as nothing was sent for {idle:.0f} s; a cancel ends it at once, and TCP after some 15 min"


class Follower:
    """Follows one transfer on its source to its end: its progress, and why it stands still."""

    def __init__(
        self, host: LocalHost, attempt: Attempt, session: Outgoing, transfer: Callable[[], list["asyncio.Task[None]"]]
    ) -> None:
        """`transfer`: the tasks that last as long as it does."""
        self._host = host
        self._attempt = attempt
        self._session = session
        self._transfer = transfer
        self._flow = Flow()
        self._cannot_end = ""
        self._ending = False
        self._told = False

    async def run(self) -> None:
        reading: asyncio.Future[Progress | None] | None = None
        try:
            while transfer := self._transfer():
                await asyncio.wait(transfer, timeout=PROGRESS_SECONDS)
                if not self._transfer():
                    return
                await note_pause(self._attempt, self._session)
                # A question to a QEMU that stands still lasts long: it is asked once, and the clock goes on meanwhile.
                reading = reading or asyncio.ensure_future(self._session.progress())
                await asyncio.wait({reading}, timeout=PROGRESS_SECONDS)
                if reading.done():
                    self._read(reading)
                    reading = None
                await self._judge()
        finally:
            if reading is not None:
                reading.cancel()
            if self._told:
                self._attempt.tell("")

    def _read(self, reading: "asyncio.Future[Progress | None]") -> None:
        try:
            progress = reading.result()
        except HypervisorError as error:
            log.debug("no progress to read", migration=self._attempt.record.migration_id, error=str(error))
            return
        if progress is not None and self._transfer():
            self._flow.saw(progress)
            self._attempt.progress = progress_to_proto(progress)
            self._attempt.wake()

    async def _judge(self) -> None:
        idle, attempt = self._flow.idle, self._attempt
        if idle < STALL_SECONDS:
            if self._told:
                attempt.tell("")
            self._told = False
            return
        self._told = True
        record = attempt.record
        repeats = await self._session.unanswered(record.uri)
        if repeats is not None:
            if idle >= CONNECT_SECONDS and not self._ending:
                await self._give_up()
            ending = self._ending or bool(attempt.running("abort"))
            attempt.tell(unanswered(record.peer_host, record.uri, repeats, idle, cannot_end=self._cannot_end, ending=ending))
        elif self._transfer():
            why = await self._host.hypervisor.hindrance(record.domain_name)
            attempt.tell(stands_still(self._host.name, record.peer_host, idle, f"{self._host.name}: {why}" if why else ""))
        if attempt.progress is not None:
            attempt.progress.bytes_per_second = 0  # the hypervisor goes on to tell the rate that it had
            attempt.progress.reason = f"nothing was sent for {idle:.0f} s"
            attempt.wake()

    async def _give_up(self) -> None:
        record = self._attempt.record
        if record.failure is None:
            try:
                await self._attempt.note(failure=no_answer(self._host.name, record.peer_host, record.uri))
            except DroverError as error:  # the journal: tried again
                log.warning("giving up the connection waits for the journal", migration=record.migration_id, error=error.message)
                return
        self._ending = True
        await self.stop_connecting()

    async def stop_connecting(self) -> None:
        """End an attempt to connect that nobody has answered, where there is one."""
        try:
            await self._session.stop_connecting(self._attempt.record.uri)
        except HypervisorError as error:
            self._cannot_end = str(error)

    async def stop_connecting_until_the_end(self) -> None:
        """For a transfer that is being aborted: the hypervisor's own abort cannot act before the connection stands."""
        while transfer := self._transfer():
            await self.stop_connecting()
            await asyncio.wait(transfer, timeout=PROGRESS_SECONDS)


async def mind(host: LocalHost, attempt: Attempt, waits: Callable[[], bool]) -> None:
    """At the destination: tell when the process of the copy is stopped, as long as it `waits` for its stream."""
    told = False
    while waits():
        why = await host.hypervisor.hindrance(attempt.record.destination_name)
        if why or told:
            attempt.tell(f"the copy on {host.name} to take its stream: {why}" if why else "")
        told = bool(why)
        await asyncio.sleep(MIND_SECONDS)


async def tell_broken(attempt: Attempt) -> None:
    """At the source, of a post-copy whose stream broke: neither copy may go, and Drover cannot join them again yet."""
    record = attempt.record
    told = (
        f"the stream of guest {record.domain_name} broke after its switch to post-copy: it is paused, with a part of its memory "
        f"here and the rest on {record.peer_host}. Destroy neither copy. Mend the link, then resume the transfer with libvirt's "
        "own tools"
    )
    if record.waiting_for != told:
        await waits_for(attempt, told)
