"""The connection that domain events arrive on. It is used for nothing else.

A connection with callbacks stays open until they are deregistered, even when everything else has released it. Because no
other call runs on this one, none can get stuck on it and force the driver to abandon it.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Any

import libvirt

from agent.hypervisor.base import DomainEvent, HypervisorError
from agent.hypervisor.events import Fanout
from agent.hypervisor.libvirt.connection import Link, Session
from agent.hypervisor.libvirt.events import RECONNECTED, Subscription
from agent.runtime.backoff import HYPERVISOR, Pauses


class Watch:
    """Source of a `Fanout`'s events: one libvirtd, across its restarts."""

    def __init__(self, session: Session, fanout: Fanout, forget: Callable[[str], None]) -> None:
        """`forget` is called, in any thread, with the UUID of a guest that has changed; empty: any guest may have."""
        self._forget = forget
        self._session = session
        self._fanout = fanout
        self._lost = asyncio.Event()
        self._subscription: Subscription | None = None
        self._keeper: asyncio.Task[None] | None = None

    @property
    def link(self) -> Link | None:
        """The connection of the events, if it is alive."""
        return self._session.link

    async def start(self) -> None:
        """Subscribe. Raises `HypervisorUnavailable`; afterwards the watch reconnects by itself."""
        await self._subscribe()
        self._keeper = asyncio.create_task(self._keep(), name="libvirt-watch")

    async def stop(self) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
            self._keeper = None
        await self._unsubscribe()

    async def _subscribe(self) -> None:
        loop = asyncio.get_running_loop()
        lost = self._lost = asyncio.Event()
        subscription = self._subscription = Subscription(self._fanout, loop, self._forget)

        def on_close(_connection: Any, _reason: int, _opaque: Any) -> None:  # in libvirt's event thread
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(lost.set)

        def register(connection: Any) -> None:
            connection.registerCloseCallback(on_close, None)
            subscription.register(connection)

        await self._session.call(register)

    async def _unsubscribe(self) -> None:
        link, subscription = self._session.link, self._subscription
        if link is not None and subscription is not None:

            def deregister(connection: Any) -> None:
                subscription.deregister(connection)
                with contextlib.suppress(libvirt.libvirtError):
                    connection.unregisterCloseCallback()

            with contextlib.suppress(HypervisorError):
                await self._session.call(deregister, on=link)
        await self._session.close()

    async def _keep(self) -> None:
        while True:
            await self._lost.wait()
            await self._subscribe_again()
            self._forget("")
            self._fanout.put(DomainEvent("", RECONNECTED, "", time.monotonic()))

    async def _subscribe_again(self) -> None:
        pauses = Pauses(HYPERVISOR)
        while True:
            await self._unsubscribe()
            try:
                return await self._subscribe()
            except HypervisorError:
                await pauses.pause()
