"""Connections to libvirtd: blocking calls run in threads with a deadline each, and every connection is certain to be closed.

libvirtd undoes what was begun on a connection (change protection, a prepared copy) when that connection closes. So each
migration has a connection of its own on each side, a `Session`, for its five phases and nothing else. All other calls
(progress, abort, states) go over a `Pool`.

**One call at a time on a connection.** libvirt's client, from 6.1 until 10.2, loses the wake-up of the thread that waits
for replies when a second thread makes calls on the same connection in quick succession: seen with libvirt 9.0 as a
`jobStats` that hung for 5 s (until the next keepalive packet) beside a Perform. And libvirtd stops reading from
a connection with five calls under way. With one call per connection, a stuck call holds up no other.

A thread that is stuck in libvirt cannot be freed from outside, and a connection stays open as long as a call on it. A call
past its deadline is therefore abandoned together with its connection, which closes when the call returns. Keepalive
bounds that: a libvirtd that hangs is given up after `KEEPALIVE_SECONDS` times `KEEPALIVE_COUNT`, and then every call
on the connection returns with an error.
"""

import asyncio
import contextlib
import gc
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import libvirt
import structlog

from agent.hypervisor.base import HypervisorError, HypervisorUnavailable
from agent.hypervisor.libvirt import events, threads
from agent.hypervisor.libvirt.errors import translate
from agent.hypervisor.libvirt.service import service_of

T = TypeVar("T")

log = structlog.get_logger()

CONNECTIONS = 32
"""Most calls at once of one driver beside its phases; further calls wait. A call takes about 1 ms, unless the QEMU that
it asks hangs: then it occupies its connection until libvirt gives up, and the others go on.
"""

OPENINGS = 32
"""Most connections that are being opened at once. Opening one at a libvirtd that hangs has no bound (keepalive begins with the open
connection) and occupies a thread, so the place is free again only when the call has returned.
"""

IDLE_CONNECTIONS = 4
"""Connections kept open for the next calls; opening one takes 1 ms."""

KEEPALIVE_SECONDS = 5
KEEPALIVE_COUNT = 6
"""Together 30 s without an answer to a ping: far beyond any pause of a healthy libvirtd, whose main loop answers by itself."""


class Link:
    """An open libvirt connection. It closes when it was released and its last call has returned."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._calls = 0
        self._released = False

    @property
    def alive(self) -> bool:
        """Whether the connection is not released and its socket was up when last used (no round trip)."""
        return not self._released and bool(self._connection.isAlive())

    def run(self, function: Callable[[Any], T]) -> T | HypervisorError:
        """Call `function(connection)` in this thread. Return its result, or a translated error instead of raising it: a
        traceback would keep the frames of this thread, and with them the connection, alive.
        """
        if not self._enter():
            return HypervisorUnavailable("the connection to libvirt was closed")
        try:
            return function(self._connection)
        except libvirt.libvirtError as error:
            return translate(error, alive=bool(self._connection.isAlive()))
        except HypervisorError as error:
            return error.with_traceback(None)
        finally:
            self._leave()

    def release(self) -> None:
        """Close the connection now, or when its last call returns. Blocks for one round trip: call it in a thread."""
        with self._lock:
            if self._released:
                return
            self._released = True
            last = self._calls == 0
        if last:
            self._close()

    def _enter(self) -> bool:
        with self._lock:
            if self._released:
                return False
            self._calls += 1
            return True

    def _leave(self) -> None:
        with self._lock:
            self._calls -= 1
            last = self._released and self._calls == 0
        if last:
            self._close()

    def _close(self) -> None:
        with contextlib.suppress(libvirt.libvirtError):  # a dead socket is as closed as it can be
            if left := self._connection.close():
                # A domain in a reference cycle (a stored exception) keeps the connection open, and with it the migration job that
                # was begun on it. Collecting the cycle frees the domain, and the last domain closes the connection.
                log.warning("libvirt connection stays open because objects still refer to it; collecting garbage", references=left)
                gc.collect()


def connect(uri: str) -> Link:
    """Open a connection. Blocks; raises `HypervisorError`."""
    events.start()
    try:
        connection = libvirt.open(uri)
        connection.setKeepAlive(KEEPALIVE_SECONDS, KEEPALIVE_COUNT)
    except libvirt.libvirtError as error:
        failure = translate(error)
        raise HypervisorUnavailable(str(failure), failure.native) from None
    return Link(connection)


class Session:
    """The connection of one side of one migration. It is opened when first used, and again after it was lost."""

    def __init__(self, pool: "Pool") -> None:
        self._pool = pool
        self._call_timeout = pool.call_timeout
        self._link: Link | None = None
        self._turn = asyncio.Lock()

    @property
    def link(self) -> Link | None:
        """The connection in use, if it is alive; compare it later to see whether it is still the same one."""
        return self._link if self._link is not None and self._link.alive else None

    async def open(self) -> Link:
        """Return the live connection; open one where there is none."""
        async with self._turn:
            if self.link is None:
                self._leave_behind()
                self._link = await self._pool.give_away()
            assert self._link is not None
            return self._link

    async def call(self, function: Callable[[Any], T], *, on: Link | None = None, bounded: bool = True) -> T:
        """Run `function(connection)` in a thread and return its result, or raise libvirt's error as a `HypervisorError`.

        `on` demands that very connection. `bounded=False` is for Perform and Finish, which last as long as memory
        flows. A cancelled await does not stop the call: it runs to its end, and its effect happens.
        """
        link = on or await self.open()
        running = _in_thread(lambda: link.run(function))
        try:
            return await _result(running, self._call_timeout if bounded else None)
        except TimeoutError:
            if link is self._link:
                self._leave_behind()
            raise _no_answer(self._pool.uri, self._call_timeout) from None

    @staticmethod
    def start(function: Callable[[Any], T], link: Link) -> "asyncio.Future[T | HypervisorError]":
        """Start an unbounded call on that link; it is under way when this returns. The future may hold an error: see `unwrap`."""
        return _in_thread(lambda: link.run(function))

    async def close(self) -> None:
        """Release the connection: it closes now, or when the last call on it returns."""
        link, self._link = self._link, None
        if link is None:
            return
        with contextlib.suppress(TimeoutError, HypervisorUnavailable):
            async with asyncio.timeout(self._call_timeout):
                await asyncio.shield(_in_thread(link.release))

    def _leave_behind(self) -> None:
        """Drop a connection that is lost or stuck, without waiting; it closes when its last call returns."""
        if self._link is not None:
            _in_thread(self._link.release)
            self._link = None


class Pool:
    """Connections for short calls of all kinds; each call uses one alone."""

    def __init__(self, uri: str, call_timeout: float) -> None:
        self.uri = uri
        self.call_timeout = call_timeout
        self._idle: list[Link] = []
        self._keep = IDLE_CONNECTIONS
        self._slots = asyncio.Semaphore(CONNECTIONS)
        self._openings = asyncio.Semaphore(OPENINGS)

    async def call(self, function: Callable[[Any], T]) -> T:
        """Run `function` as `Session.call` does, on any live connection."""
        try:
            async with asyncio.timeout(self.call_timeout):
                await self._slots.acquire()
        except TimeoutError:
            raise _no_answer(self.uri, self.call_timeout) from None
        try:
            link = await self.give_away()
        except BaseException:
            self._slots.release()
            raise
        running = _in_thread(lambda: link.run(function))
        running.add_done_callback(lambda _: self._give_back(link))  # a callback, because the call may outlive its waiter
        try:
            return await _result(running, self.call_timeout)
        except TimeoutError:
            raise _no_answer(self.uri, self.call_timeout) from None

    async def give_away(self) -> Link:
        """Return a live connection, an idle or a new one; it belongs to the caller from now on."""
        return self._take() or await self._open()

    async def close(self) -> None:
        """Close idle connections now, and each other one when its call returns."""
        self._keep = 0
        idle, self._idle = self._idle, []
        await asyncio.gather(*(_in_thread(link.release) for link in idle))

    async def _open(self) -> Link:
        try:
            async with asyncio.timeout(self.call_timeout):
                await self._openings.acquire()
                opening = _in_thread(lambda: connect(self.uri))
                opening.add_done_callback(lambda _: self._openings.release())
                try:
                    return await asyncio.shield(opening)
                except asyncio.CancelledError:  # by the deadline, or by the caller
                    opening.add_done_callback(_release_late)
                    raise
        except TimeoutError:
            raise _no_answer(self.uri, self.call_timeout) from None

    def _take(self) -> Link | None:
        while self._idle:
            link = self._idle.pop()
            if link.alive:
                return link
            _in_thread(link.release)
        return None

    def _give_back(self, link: Link) -> None:
        self._slots.release()
        if link.alive and len(self._idle) < self._keep:
            self._idle.append(link)
        else:
            _in_thread(link.release)


async def _result(running: "asyncio.Future[T | HypervisorError]", timeout: float | None) -> T:
    async with asyncio.timeout(timeout):
        result = await asyncio.shield(running)
    return unwrap(result)


def unwrap(result: T | HypervisorError) -> T:
    """Return the result of a call, or raise the error that it returned."""
    if isinstance(result, HypervisorError):
        raise result
    return result


def _no_answer(uri: str, timeout: float) -> HypervisorUnavailable:
    name = service_of(uri).name
    return HypervisorUnavailable(f"{name} did not answer within {timeout:g} s; see `systemctl status {name}` on that host")


def _in_thread(function: Callable[[], T]) -> "asyncio.Future[T]":
    """Run a call in a thread and return its asyncio future, which does not warn if its exception is never retrieved (the waiter may
    be cancelled)."""
    future = asyncio.wrap_future(threads.submit(function))
    future.add_done_callback(lambda done: done.cancelled() or done.exception())
    return future


def _release_late(opening: "asyncio.Future[Link]") -> None:
    if not opening.cancelled() and opening.exception() is None:
        _in_thread(opening.result().release)
