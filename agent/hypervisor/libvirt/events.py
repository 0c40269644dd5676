"""libvirt's event loop in one daemon thread, and its domain events for asyncio.

libvirt accepts one event loop for the whole life of the process, registered before the first connection is opened. The loop
also drives keepalive. An asyncio loop cannot take that role: a process may have several, one after the other (every test
has its own), and a busy one would stop the keepalive of all connections. So libvirt's own loop runs in a thread here, and
events are passed to asyncio with `call_soon_threadsafe`.
"""

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import libvirt
import libvirt_qemu

from agent.hypervisor.base import DomainEvent
from agent.hypervisor.events import Fanout
from agent.hypervisor.libvirt import phases

RECONNECTED = "reconnected"
"""Kind of an event with an empty UUID: the connection was lost and is back, so events may be missing."""

QEMU_MIGRATION = "qemu-migration"
"""Kind of an event that QEMU itself sends about a migration; the detail is its state, such as ``pre-switchover``."""

_starting = threading.Lock()
_started = False


def start() -> None:
    """Start libvirt's event loop, once for the process. Cheap to call again."""
    global _started
    with _starting:
        if _started:
            return
        _started = True
        phases.silence()
        libvirt.virEventRegisterDefaultImpl()
        threading.Thread(target=_run, name="libvirt-events", daemon=True).start()


def _run() -> None:
    while True:
        libvirt.virEventRunDefaultImpl()


def constant_names(prefix: str, special: Mapping[str, str] | None = None) -> Mapping[int, str]:
    """Return libvirt's constants with that prefix as value → lower-case name: 3 → ``migration`` for `VIR_DOMAIN_PAUSED_MIGRATION`.
    `special` replaces single names."""
    named = {name.removeprefix(prefix): getattr(libvirt, name) for name in dir(libvirt) if name.startswith(prefix)}
    return {
        value: (special or {}).get(name, name.lower().replace("_", " "))
        for name, value in named.items()
        if name != "LAST" and isinstance(value, int)
    }


_KINDS: Mapping[int, tuple[str, Mapping[int, str]]] = {
    getattr(libvirt, f"VIR_DOMAIN_EVENT_{kind}"): (
        kind.lower(),
        constant_names(f"VIR_DOMAIN_EVENT_{kind}_", {"POSTCOPY": "post-copy", "POSTCOPY_FAILED": "post-copy failed"}),
    )
    for kind in (
        "DEFINED",
        "UNDEFINED",
        "STARTED",
        "SUSPENDED",
        "RESUMED",
        "STOPPED",
        "SHUTDOWN",
        "PMSUSPENDED",
        "CRASHED",
    )
}


class Subscription:
    """Subscription to the domain events of one connection; it puts them into `fanout` on `loop`."""

    def __init__(self, fanout: Fanout, loop: asyncio.AbstractEventLoop, forget: Callable[[str], None]) -> None:
        self._forget = forget
        self._fanout = fanout
        self._loop = loop
        self._callbacks: list[int] = []
        self._raw: int | None = None

    def register(self, connection: Any) -> None:
        """Register the callbacks on the connection. Blocks for five round trips: call it in a thread."""
        for kind, callback in (
            (libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, self._lifecycle),
            (libvirt.VIR_DOMAIN_EVENT_ID_METADATA_CHANGE, self._metadata),
            (libvirt.VIR_DOMAIN_EVENT_ID_MIGRATION_ITERATION, self._iteration),
            (libvirt.VIR_DOMAIN_EVENT_ID_JOB_COMPLETED, self._completed),
        ):
            self._callbacks.append(connection.domainEventRegisterAny(None, kind, callback, None))
        with contextlib.suppress(libvirt.libvirtError):  # libvirt's other drivers have no QEMU
            self._raw = libvirt_qemu.qemuMonitorEventRegister(connection, None, "MIGRATION", self._qemu_migration, None)

    def deregister(self, connection: Any) -> None:
        """Remove the callbacks, which would keep the connection open. Errors are ignored: the connection is about to be closed."""
        for callback in self._callbacks:
            with contextlib.suppress(libvirt.libvirtError):
                connection.domainEventDeregisterAny(callback)
        self._callbacks.clear()
        if self._raw is not None:
            with contextlib.suppress(libvirt.libvirtError):
                libvirt_qemu.qemuMonitorEventDeregister(connection, self._raw)
            self._raw = None

    # Called by libvirt in its event thread.

    def _lifecycle(self, _connection: Any, domain: Any, event: int, detail: int, _opaque: Any) -> None:
        self._forget(domain.UUIDString())
        kind, details = _KINDS.get(event, (str(event), {}))
        self._hand_over(domain, kind, details.get(detail, str(detail)))

    def _metadata(self, _connection: Any, domain: Any, _kind: int, _uri: str, _opaque: Any) -> None:
        self._forget(domain.UUIDString())

    def _iteration(self, _connection: Any, domain: Any, iteration: int, _opaque: Any) -> None:
        self._hand_over(domain, "iteration", str(iteration))

    def _completed(self, _connection: Any, domain: Any, _params: Any, _opaque: Any) -> None:
        self._hand_over(domain, "job-completed", "")

    def _qemu_migration(
        self, _connection: Any, domain: Any, _event: str, _seconds: int, _micros: int, details: str, _opaque: Any
    ) -> None:
        with contextlib.suppress(ValueError, AttributeError):
            self._hand_over(domain, QEMU_MIGRATION, str(json.loads(details).get("status", "")))

    def _hand_over(self, domain: Any, kind: str, detail: str) -> None:
        event = DomainEvent(domain.UUIDString(), kind, detail, time.monotonic())
        with contextlib.suppress(RuntimeError):  # the loop is closed: there is no consumer left
            self._loop.call_soon_threadsafe(self._fanout.put, event)
