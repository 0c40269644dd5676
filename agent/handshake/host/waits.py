"""Finds out what a transfer waits for, why and until when, and puts it into `waiting_for`.

Covers the time while memory should flow; `Attempt.telling` covers a hypervisor call that lasts long.
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
from agent.handshake.host.records import progress_to_proto
from agent.handshake.machines.source import SourceState
from agent.hypervisor.base import HypervisorError
from agent.hypervisor.interface import Outgoing
from agent.runtime.errors import DroverError, Reason
from agent.runtime.failure import Failure
from agent.transfer.progress import Progress

log = structlog.get_logger()

PROGRESS_SECONDS: Final = 0.25
"""Interval at which a transfer's progress is read: libvirt has no event for it."""
STALL_SECONDS: Final = 2.0
"""Time without a byte sent after which a transfer is reported as standing still."""
CONNECT_SECONDS: Final = 20.0
"""Time without an answer from the migration port after which the connection is given up. TCP has sent five requests by then; a path
that needs longer can move no guest. The kernel's own limit is about 130 s."""
KERNEL_SECONDS: Final = 130
"""Time after which the kernel gives up an unanswered connection that Drover cannot end."""
MIND_SECONDS: Final = 2.0
"""Interval at which to check whether the process of a copy that waits for its stream is stopped."""


@dataclass
class Flow:
    """Measures for how long nothing has been sent. Pure, except for `clock`."""

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
        """Seconds since the last byte was sent, or since the transfer was started."""
        return self.clock() - self._since


def nobody_answers(peer: str, uri: str, repeats: int, idle: float, *, cannot_end: str, ending: bool) -> str:
    """Return `waiting_for` while nobody answers at the migration port."""
    text = (
        f"{peer} to answer at {uri}: asked {repeats + 1} times in {idle:.0f} s without an answer, so packets to that port are "
        "dropped on the way (a firewall?)"
    )
    if cannot_end:
        return f"{text}. Drover cannot end the connection ({cannot_end}); the kernel gives it up {KERNEL_SECONDS} s after its start"
    return f"{text}; the connection is being ended" if ending else f"{text}; given up after {CONNECT_SECONDS:g} s"


def no_answer(host: str, peer: str, uri: str) -> Failure:
    """Return the failure of a transfer whose port nobody answered."""
    text = (
        f"{host}: {peer} has not answered at {uri} within {CONNECT_SECONDS:g} s, so packets to that port are dropped on the way. "
        "Open the migration ports in the firewalls between both hosts"
    )
    return Failure(Reason.TRANSFER_FAILED, text, {"host": host})


def stands_still(host: str, peer: str, idle: float, why: str) -> str:
    """Return `waiting_for` while a connected transfer sends nothing. `why`: why the source's hypervisor sends nothing, if known."""
    if why:
        text = f"{host} to send more, as nothing was sent for {idle:.0f} s: {why}"
        return f"{text}; until then the transfer can neither go on nor be stopped"
    return f"{peer} to take more, as nothing was sent for {idle:.0f} s; a cancel ends it at once, and TCP after some 15 min"


class Follower:
    """The watch over one transfer on its source, to its end: its progress, and why it stands still."""

    def __init__(
        self, host: LocalHost, attempt: Attempt, session: Outgoing, transfer: Callable[[], list["asyncio.Task[None]"]]
    ) -> None:
        """`transfer` returns the tasks of the transfer that still run; none once it has ended."""
        self._host = host
        self._attempt = attempt
        self._session = session
        self._transfer = transfer
        self._flow = Flow()
        self._cannot_end = ""
        self._ending = False
        self._reported = False
        """Whether `waiting_for` says that the transfer stands still."""

    async def run(self) -> None:
        reading: asyncio.Future[Progress | None] | None = None
        try:
            while transfer := self._transfer():
                await asyncio.wait(transfer, timeout=PROGRESS_SECONDS)
                if not self._transfer():
                    return
                await note_pause(self._attempt, self._session)
                # A QEMU that hangs answers late: ask once and go on measuring meanwhile.
                reading = reading or asyncio.ensure_future(self._session.progress())
                await asyncio.wait({reading}, timeout=PROGRESS_SECONDS)
                if reading.done():
                    self._read(reading)
                    reading = None
                await self._judge()
        finally:
            if reading is not None:
                reading.cancel()
            if self._reported:
                self._attempt.tell("")

    def _read(self, reading: "asyncio.Future[Progress | None]") -> None:
        try:
            progress = reading.result()
        except HypervisorError as error:
            log.debug("cannot read the progress", migration=self._attempt.record.migration_id, error=str(error))
            return
        if progress is not None and self._transfer():
            self._flow.saw(progress)
            self._attempt.progress = progress_to_proto(progress)
            self._attempt.wake()

    async def _judge(self) -> None:
        idle, attempt = self._flow.idle, self._attempt
        if idle < STALL_SECONDS:
            if self._reported:
                attempt.tell("")
            self._reported = False
            return
        if attempt.progress is not None:
            attempt.progress.bytes_per_second = 0  # the hypervisor keeps reporting its last rate
            attempt.progress.reason = f"nothing was sent for {idle:.0f} s"
            attempt.wake()
        record = attempt.record
        if record.state != SourceState.PERFORMING:
            return  # in post-copy: what the removal of the copy waits for is told there
        self._reported = True
        repeats = await self._session.connect_retries(record.uri)
        if repeats is not None:
            if idle >= CONNECT_SECONDS and not self._ending:
                await self._give_up()
            ending = self._ending or bool(attempt.running("abort"))
            attempt.tell(nobody_answers(record.peer_host, record.uri, repeats, idle, cannot_end=self._cannot_end, ending=ending))
        elif self._transfer():
            why = await self._host.hypervisor.why_unresponsive(record.domain_name)
            attempt.tell(stands_still(self._host.name, record.peer_host, idle, f"{self._host.name}: {why}" if why else ""))

    async def _give_up(self) -> None:
        record = self._attempt.record
        if record.failure is None:
            try:
                await self._attempt.note(failure=no_answer(self._host.name, record.peer_host, record.uri))
            except DroverError as error:  # the journal failed; `_judge` tries again
                log.warning("cannot record that the connection is given up", migration=record.migration_id, error=error.message)
                return
        self._ending = True
        await self.stop_connecting()

    async def stop_connecting(self) -> None:
        """End the attempt to connect if nobody has answered it yet."""
        try:
            await self._session.stop_connecting(self._attempt.record.uri)
        except HypervisorError as error:
            self._cannot_end = str(error)

    async def stop_connecting_until_the_end(self) -> None:
        """Repeat `stop_connecting` until the transfer has ended. For an abort: the hypervisor's own needs an open connection."""
        while transfer := self._transfer():
            await self.stop_connecting()
            await asyncio.wait(transfer, timeout=PROGRESS_SECONDS)


async def mind(host: LocalHost, attempt: Attempt, waits: Callable[[], bool]) -> None:
    """Report in `waiting_for`, at the destination, that the process of the copy is stopped, while it `waits` for its stream."""
    reported = False
    while waits():
        why = await host.hypervisor.why_unresponsive(attempt.record.destination_name)
        if why or reported:
            attempt.tell(f"the copy on {host.name} to take its stream: {why}" if why else "")
        reported = bool(why)
        await asyncio.sleep(MIND_SECONDS)


async def report_broken_post_copy(attempt: Attempt) -> None:
    """Record in `waiting_for`, at the source, that the stream broke during post-copy: neither copy may be destroyed, and Drover
    cannot resume the transfer yet."""
    record = attempt.record
    text = (
        f"an operator: the stream of guest {record.domain_name} broke after its switch to post-copy. The guest is paused, with a "
        f"part of its memory on {record.host} and the rest on {record.peer_host}. Destroy neither copy. Repair the link, then "
        "resume the transfer with libvirt's own tools"
    )
    if record.waiting_for != text:
        await waits_for(attempt, text)
