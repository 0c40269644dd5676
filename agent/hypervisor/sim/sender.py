"""A transfer on its source: a `model.Transfer` that follows the clock and is described on the stream.

It belongs to the hypervisor: it continues to its end, as inside libvirtd, even if the caller of Perform is gone.

States of the guest::

    running ──(fits into the downtime)──> stopped ──(End sent)──> left: paused here, another copy may run
       └────────(switch)────────────────> post-copy: its memory leaves page by page

    broken or aborted before End: running or paused here, as its user wants (as QEMU does)
    broken after End:             paused; this host cannot know whether the state arrived
    broken in post-copy:          paused, "post-copy failed", until a new stream takes the rest
"""

import asyncio
import contextlib
from dataclasses import dataclass, replace
from math import ceil

from agent.hypervisor.base import HypervisorError, TransferFailed
from agent.hypervisor.sim.guest import Guest
from agent.hypervisor.sim.host import Host
from agent.hypervisor.sim.link import Share
from agent.hypervisor.sim.stream import (
    MAGIC,
    QUANTUM,
    VERSION,
    WINDOW,
    Ack,
    Complete,
    End,
    Hello,
    Pages,
    Rate,
    Refused,
    Stream,
    StreamBroken,
    StreamError,
    StreamInvalid,
    Switch,
    Welcome,
    connect,
)
from agent.network.uri import MigrationUri
from agent.transfer import model
from agent.transfer.model import Limits, Phase
from agent.transfer.progress import Progress

LEAST_STEP = 0.0005
"""Shortest wait in seconds, so that passes without memory to send do not spin."""


@dataclass(frozen=True)
class Assignment:
    """Parameters of Perform."""

    address: MigrationUri
    token: bytes
    live: bool
    post_copy: bool
    auto_converge: bool
    bandwidth: int
    max_downtime: float


def sender_of(host: Host, uuid: str) -> "Sender | None":
    """Return the sender of a guest that leaves this host."""
    found = host.senders.get(uuid)
    return found if isinstance(found, Sender) else None


class Sender:
    def __init__(self, host: Host, guest: Guest, assignment: Assignment) -> None:
        self._host = host
        self._guest = guest
        self._assignment = assignment
        self._limits = Limits(assignment.max_downtime, assignment.auto_converge)
        self._resuming = guest.postcopy
        self._wants_run = guest.wants_run
        """The user's choice at the start of the transfer. Like libvirt, the simulator forgets a later pause by the user."""
        memory = guest.load
        self._state = model.resume(memory, guest.owed) if self._resuming else model.start(memory, live=assignment.live)
        self._wake = asyncio.Event()
        self._last = host.now()
        self._rate = 0.0
        self._bandwidth, self._offered = assignment.bandwidth, 0
        self._share: Share | None = None
        self._stream: Stream | None = None
        self._number = self._acked = self._reported = 0
        self._switch_wanted = False
        self._complete = False
        self._broken: StreamError | None = None
        self._ended = ""
        self._started = False
        self.task: asyncio.Task[Progress] | None = None
        self.switched = asyncio.Event()
        """Set once the guest has been switched to post-copy."""

    # --- called by the handles ----------------------------------------------------------------------------------------

    def begin(self) -> asyncio.Task[Progress]:
        self._host.senders[self._guest.uuid] = self
        self.task = self._host.spawn(self._run())
        return self.task

    def progress(self) -> Progress:
        """Return the progress at this moment, however long ago the last frame was sent."""
        since = self._host.now() - self._last
        state = model.advance(self._state, self._guest.load, self._limits, self._rate, since)
        return model.progress(state, self._guest.load, self._limits, self._rate)

    @property
    def paused_by_user(self) -> bool:
        """Whether the guest's user has paused it since the transfer began."""
        return self._wants_run and not self._guest.wants_run

    def abort(self) -> None:
        """Stop the transfer before End; do nothing after it. Raises `HypervisorError` in post-copy."""
        if self._guest.postcopy:
            raise HypervisorError("a migration in post-copy cannot be aborted")
        if not self._guest.left:
            self.end("aborted")

    def end(self, reason: str) -> None:
        """End the transfer now, in every phase. `reason` becomes part of the error of Perform."""
        if not self._ended:
            self._ended = reason
            if self.task is not None and self._started:
                self.task.cancel()

    def cut(self) -> None:
        """Break the connection, as a fault."""
        if self._stream is not None:
            self._stream.cut()

    def start_postcopy(self) -> None:
        if not self._assignment.post_copy:
            raise HypervisorError("post-copy was not armed for this migration")
        self._switch_wanted = True
        self._wake.set()

    def set_bandwidth(self, bandwidth: int) -> int:
        """Set the limit; return it."""
        self._bandwidth = bandwidth
        if self._share is not None:
            self._share.set_limit(self._limit)
        return self._bandwidth

    @property
    def _limit(self) -> int:
        """The user's limit or the share of the destination's link, whichever is less; 0: there is none."""
        return min((limit for limit in (self._bandwidth, self._offered) if limit), default=0)

    def set_max_downtime(self, seconds: float) -> float:
        """Set the longest stop at the end of pre-copy; return it."""
        self._limits = replace(self._limits, max_downtime=seconds)
        self._wake.set()
        return self._limits.max_downtime

    # --- the task -----------------------------------------------------------------------------------------------------

    async def _run(self) -> Progress:
        self._started = True
        try:
            await self._transfer()
        except (StreamError, asyncio.CancelledError) as error:
            self._undo()
            if isinstance(error, asyncio.CancelledError) and not self._ended:
                raise
            raise TransferFailed(f"migration of {self._guest.name} failed: {self._ended or error}") from error
        else:
            return replace(model.progress(self._state, self._guest.load, self._limits, self._rate), remaining_bytes=0)
        finally:
            self._host.senders.pop(self._guest.uuid, None)

    def _undo(self) -> None:
        guest = self._guest
        self._host.release(guest)
        if guest.postcopy:
            guest.owed = ceil(self._state.remaining)
            guest.stop("post-copy failed")
        elif not guest.left and guest.active and not guest.ticking:
            wanted, guest.wants_run = guest.wants_run, self._wants_run
            guest.give_back("migration canceled")
            guest.wants_run = wanted

    async def _transfer(self) -> None:
        address, config = self._assignment.address, self._host.config
        self._stream = await self._connect(address)
        listener: asyncio.Task[None] | None = None
        done = False
        try:
            await self._greet(self._stream)
            listener = self._host.spawn(self._listen(self._stream))
            self._share = self._host.link.join(self._limit, lambda _: self._wake.set())
            await self._pump(self._stream, self._share)
            await self._hand_over(self._stream, config.peer_timeout)
            done = True
        finally:
            if self._share is not None:
                self._share.leave()
            if listener is not None:
                listener.cancel()
            if not done:
                self._stream.cut()
        await self._stream.close()

    async def _connect(self, address: MigrationUri) -> Stream:
        config = self._host.config
        if self._ended:
            raise StreamBroken(self._ended)
        return await connect(str(address.host), address.port, config.connect_timeout, config.peer_timeout)

    async def _greet(self, stream: Stream) -> None:
        guest = self._guest
        memory = guest.definition.guest.memory_bytes
        await stream.send(Hello(MAGIC, VERSION, self._assignment.token, guest.uuid, memory, self._resuming))
        answer = await stream.receive(self._host.config.connect_timeout)
        if isinstance(answer, Refused):
            raise StreamBroken(f"the destination refused the stream: {answer.reason}")
        if not isinstance(answer, Welcome):
            raise StreamInvalid("the destination did not answer the greeting as expected")
        if self._resuming:
            guest.stop("post-copy")
        elif not self._assignment.live:
            guest.stop("migration")

    async def _listen(self, stream: Stream) -> None:
        """Receive the destination's answers until all is complete or the connection ends."""
        try:
            while not self._complete:
                match await stream.receive():
                    case Ack(number) if number <= self._number:
                        stalled, self._acked = self._stalled, number
                        if stalled:
                            self._wake.set()
                    case Rate(rate):
                        self._offered = rate
                        self.set_bandwidth(self._bandwidth)
                    case Complete():
                        self._complete = True
                    case _:
                        raise StreamInvalid("the destination sent an unexpected message")
        except StreamError as error:
            self._broken = error
        self._wake.set()

    @property
    def _stalled(self) -> bool:
        return self._number - self._acked >= WINDOW

    async def _pump(self, stream: Stream, share: Share) -> None:
        self._last = self._host.now()
        self._rate = share.rate
        while self._state.phase is not Phase.DONE:
            await self._pause(min(QUANTUM, max(LEAST_STEP, model.due(self._state, self._rate))))
            self._catch_up(share)
            if self._broken is not None:
                raise self._broken
            if self._switch_wanted and self._state.phase is Phase.COPY:
                await self._switch(stream)
            await self._report(stream)

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()

    def _catch_up(self, share: Share) -> None:
        """Advance the model to the current time, at the rate that was in effect until now."""
        self._wake.clear()
        now = self._host.now()
        before = self._state.phase
        self._state = model.advance(self._state, self._guest.load, self._limits, self._rate, now - self._last)
        self._last = now
        self._rate = 0.0 if self._stalled else share.rate
        if before is Phase.COPY and self._state.phase is Phase.STOP:
            self._guest.stop("migration")

    async def _switch(self, stream: Stream) -> None:
        guest = self._guest
        guest.postcopy = True
        guest.stop("post-copy")
        self._state = model.switch(self._state, guest.load)
        guest.owed = ceil(self._state.remaining)
        await stream.send(Switch(guest.send_state(), self._wants_run, guest.owed))
        self.switched.set()

    async def _report(self, stream: Stream) -> None:
        """Send one frame for the bytes since the last one; none while the destination does not acknowledge."""
        if self._stalled:
            return
        sent = round(self._state.sent)
        self._number += 1
        pages = Pages(self._number, self._state.iteration, sent - self._reported, round(self._state.remaining))
        self._reported = sent
        await stream.send(pages)

    async def _hand_over(self, stream: Stream, timeout: float) -> None:
        """Send the last frame and wait for Complete. Once it is sent, only the destination knows whether the state arrived."""
        guest = self._guest
        clock = guest.clock if guest.postcopy else guest.send_state()
        await stream.send(End(clock, self._wants_run))
        try:
            async with asyncio.timeout(timeout):
                while not self._complete and self._broken is None:
                    self._wake.clear()
                    await self._wake.wait()
        except TimeoutError:
            raise StreamBroken(f"the destination did not confirm within {timeout:g} s that everything arrived") from None
        if not self._complete and self._broken is not None:
            raise self._broken
        guest.postcopy, guest.owed = False, 0
