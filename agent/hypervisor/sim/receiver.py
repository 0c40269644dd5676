"""A copy on its destination: it listens, receives the stream, and waits for Finish.

    waiting ──(Hello with the token)──> filling ──(End)──> complete ──(Finish, at any time)──> runs
       │                                  │  └──(Switch)──> post-copy: runs as soon as Finish is called
       └──────── close, cut ──────────────┴──> gone

When the stream breaks, the copy is removed, as QEMU ends then; in post-copy the copy stays, blocked, until a new stream
brings the rest. A connection without the token is closed, and the copy keeps waiting for the one that has it.
"""

import asyncio
import contextlib
import errno
import secrets
from collections.abc import Iterator
from hmac import compare_digest
from typing import Any

from agent.hypervisor.base import DomainState, HypervisorError, Job, TransferFailed
from agent.hypervisor.sim.definition import Definition
from agent.hypervisor.sim.guest import Guest
from agent.hypervisor.sim.host import Host
from agent.hypervisor.sim.stream import (
    MAGIC,
    TOKEN_BYTES,
    VERSION,
    Ack,
    Complete,
    End,
    Hello,
    Pages,
    Rate,
    Refused,
    Stream,
    StreamError,
    StreamInvalid,
    Switch,
    Welcome,
)
from agent.transfer.model import PAGE

STRANGERS = 4
"""Most connections that may wait for the greeting at the same time."""


def receiver_of(host: Host, uuid: str) -> "Receiver | None":
    """Return the receiver of a guest that arrives at this host."""
    found = host.receivers.get(uuid)
    return found if isinstance(found, Receiver) else None


class Receiver:
    def __init__(self, host: Host, guest: Guest, owner: object) -> None:
        self._host = host
        self.task: asyncio.Task[Any] | None = None
        self.guest = guest
        self.owner = owner
        """The handle that prepared; closing it removes a copy that is not armed."""
        self.token = secrets.token_bytes(TOKEN_BYTES)
        self.recovering = guest.postcopy
        self.armed = False
        """Finish was called."""
        self.arrive_paused = False
        self.arrived: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the whole state is here, or with a `HypervisorError` when the copy is lost."""
        self.arrived.add_done_callback(lambda future: future.exception())
        self.gone = False
        self._received = 0
        self._greeting = 0
        self._server: asyncio.Server | None = None
        self._stream: Stream | None = None
        host.receivers[guest.uuid] = self

    # --- listening ----------------------------------------------------------------------------------------------------

    async def listen(self, address: str, ports: range) -> int:
        """Listen on the first free port and return it. Raises `HypervisorError`."""
        for port in ports:
            try:
                self._server = await asyncio.start_server(self._on_connection, address, port, backlog=STRANGERS)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise HypervisorError(f"cannot listen on {address} port {port}: {error}") from error
            else:
                if self.gone:
                    self._stop_listening()
                return port
        raise HypervisorError(f"no free port on {address} in the range {ports.start} to {ports.stop - 1}")

    def _on_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        stream = Stream(reader, writer, self._host.config.peer_timeout)
        if self.gone:
            stream.cut()
            return
        serving = self._host.spawn(self._serve(stream))
        serving.add_done_callback(lambda _: stream.cut())  # also where it was cancelled before it began

    async def _serve(self, stream: Stream) -> None:
        try:
            if await self._greet(stream):
                with self._sharing(stream):
                    await self._receive(stream)
        except StreamError as error:
            if stream is self._stream and not self.arrived.done():  # once all is here, the stream does not matter
                self._break(str(error))

    async def _greet(self, stream: Stream) -> bool:
        """Return whether this is the expected stream. Any other connection is closed without further information."""
        if self._greeting >= STRANGERS or self._taken():
            return False
        self._greeting += 1
        try:
            hello = await stream.receive(self._host.config.connect_timeout)
        finally:
            self._greeting -= 1
        if not self._expected(hello) or self._taken():
            await stream.send(Refused("this is not the expected stream"))
            await stream.close()
            return False
        self._stream = stream
        self._stop_listening()
        await stream.send(Welcome())
        return True

    def _taken(self) -> bool:
        return self._stream is not None or self.gone

    def _expected(self, hello: object) -> bool:
        return (
            isinstance(hello, Hello)
            and compare_digest(hello.token, self.token)
            and (hello.magic, hello.version) == (MAGIC, VERSION)
            and (hello.uuid, hello.memory) == (self.guest.uuid, self.guest.definition.guest.memory_bytes)
            and hello.resume == self.recovering
        )

    def _stop_listening(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    # --- the stream ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _sharing(self, stream: Stream) -> Iterator[None]:
        """Give the stream its share of the incoming link while the block runs, and tell the source at each change."""
        link = self._host.incoming_link
        if link is None:
            yield
            return

        def tell(rate: float) -> None:
            self._host.spawn(stream.send(Rate(max(1, round(rate)))))

        share = link.join(0, tell)
        try:
            yield
        finally:
            share.leave()

    async def _receive(self, stream: Stream) -> None:
        if self.recovering:
            self.guest.unblock("post-copy")
        while not self.arrived.done():
            match await stream.receive():
                case Pages(number, _, size):
                    self._received += size
                    await stream.send(Ack(number))
                case Switch(clock, wants_run, owed) if not self.guest.postcopy:
                    self.guest.take_state(clock, wants_run)
                    self.guest.postcopy, self.guest.owed = True, owed
                    if self.armed:
                        self.run_postcopy()
                case End(clock, wants_run):
                    self._complete(clock, wants_run)
                case _:
                    raise StreamInvalid("the source sent an unexpected message")
        await stream.send(Complete())
        await stream.close()

    def _complete(self, clock: float, wants_run: bool) -> None:
        if not self.recovering and self._received + PAGE < self.guest.definition.guest.memory_bytes:
            raise StreamInvalid(f"only {self._received} bytes of the guest's memory arrived")
        if not self.guest.postcopy:
            self.guest.take_state(clock, wants_run)
        self.guest.owed = 0
        self.arrived.set_result(None)

    def run_postcopy(self) -> None:
        """Run the guest here while the rest of its memory arrives."""
        self._host.spawn(self._run_postcopy())

    async def _run_postcopy(self) -> None:
        await asyncio.sleep(self._host.config.latencies.switch)
        if self.arrived.done() or self.gone:
            return
        self.guest.incoming = False
        self.guest.wants_run = self.guest.wants_run and not self.arrive_paused
        self.guest.unblock("post-copy")

    # --- the end ------------------------------------------------------------------------------------------------------

    def settle(self, stored: Definition | None) -> None:
        """Complete Finish: the guest belongs to this host from now on. `stored` is its definition for the next boot."""
        guest = self.guest
        self._host.receivers.pop(guest.uuid, None)
        if stored is not None:
            guest.stored = stored
        guest.incoming = guest.postcopy = guest.left = False
        guest.job = Job.NONE
        guest.wants_run = guest.wants_run and not self.arrive_paused
        if guest.wants_run:
            guest.run("migrated")
        else:
            guest.stop("user")

    def end(self, reason: str) -> None:
        """End the reception: a copy that never ran is removed, one in post-copy stays and waits to be recovered."""
        self._break(reason)

    def cut(self) -> None:
        """Break the connection, as a fault."""
        if self._stream is not None:
            self._stream.cut()

    def _break(self, reason: str) -> None:
        if self.gone:
            return
        self.gone = True
        self._host.receivers.pop(self.guest.uuid, None)
        self._stop_listening()
        if self._stream is not None:
            self._stream.cut()
        error = self._lose_postcopy(reason) if self.guest.postcopy else self._lose_copy(reason)
        if not self.arrived.done():
            self.arrived.set_exception(error)

    def _lose_copy(self, reason: str) -> HypervisorError:
        self._host.drop(self.guest, "failed")
        return TransferFailed(f"the copy of {self.guest.name} is gone: {reason}")

    def _lose_postcopy(self, reason: str) -> HypervisorError:
        self.guest.job = Job.NONE
        if self.guest.state is DomainState.RUNNING:
            self.guest.block("post-copy failed")
        else:
            self.guest.stop("post-copy failed")
        return HypervisorError(f"post-copy of {self.guest.name} failed: {reason}", {"reason": "post-copy failed"})
