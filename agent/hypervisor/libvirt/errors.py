"""Translation of libvirt's errors to this project's errors, by code, by the part of libvirt that raised them, and by message."""

from collections.abc import Mapping

import libvirt

from agent.hypervisor.base import (
    DomainBusy,
    DomainNotFound,
    Exhausted,
    HypervisorError,
    HypervisorUnavailable,
    Incompatible,
    InvalidDocument,
    NoTransfer,
)
from agent.runtime.failure import ECHO

_BY_CODE: Mapping[int, type[HypervisorError]] = {
    libvirt.VIR_ERR_NO_DOMAIN: DomainNotFound,
    libvirt.VIR_ERR_NO_CONNECT: HypervisorUnavailable,
    libvirt.VIR_ERR_INVALID_CONN: HypervisorUnavailable,
    libvirt.VIR_ERR_RPC: HypervisorUnavailable,
    libvirt.VIR_ERR_AUTH_FAILED: HypervisorUnavailable,
    # libvirt did not get the domain's job lock within its own 30 s.
    libvirt.VIR_ERR_OPERATION_TIMEOUT: DomainBusy,
    libvirt.VIR_ERR_MIGRATE_UNSAFE: Incompatible,
    libvirt.VIR_ERR_CONFIG_UNSUPPORTED: Incompatible,
    libvirt.VIR_ERR_ARGUMENT_UNSUPPORTED: Incompatible,
    libvirt.VIR_ERR_OPERATION_UNSUPPORTED: Incompatible,
    libvirt.VIR_ERR_CPU_INCOMPATIBLE: Incompatible,
    libvirt.VIR_ERR_NO_SUPPORT: Incompatible,
    libvirt.VIR_ERR_XML_ERROR: InvalidDocument,
    libvirt.VIR_ERR_XML_DETAIL: InvalidDocument,
    libvirt.VIR_ERR_XML_INVALID_SCHEMA: InvalidDocument,
}

_LOST_AT_SOCKET = frozenset({libvirt.VIR_ERR_INTERNAL_ERROR, libvirt.VIR_ERR_SYSTEM_ERROR})
"""Codes that mean a lost connection when libvirt's RPC layer raises them ("client socket is closed", "End of file…")."""

_BY_MESSAGE: tuple[tuple[int, str, type[HypervisorError]], ...] = (
    (libvirt.VIR_ERR_OPERATION_INVALID, "is already active", DomainBusy),
    (libvirt.VIR_ERR_OPERATION_INVALID, "another migration job", DomainBusy),
    (libvirt.VIR_ERR_OPERATION_INVALID, "is being migrated", DomainBusy),
    (libvirt.VIR_ERR_OPERATION_INVALID, "incoming migration", DomainBusy),
    (libvirt.VIR_ERR_OPERATION_INVALID, "block job", DomainBusy),
    (libvirt.VIR_ERR_OPERATION_INVALID, "not being migrated", NoTransfer),
    (libvirt.VIR_ERR_INTERNAL_ERROR, "Unable to find an unused port", Exhausted),
    (libvirt.VIR_ERR_INTERNAL_ERROR, "cookie", InvalidDocument),
    (libvirt.VIR_ERR_INTERNAL_ERROR, "in migration data", InvalidDocument),
    (libvirt.VIR_ERR_INTERNAL_ERROR, "to the same host", Incompatible),
)
"""Error class by code and a part of the message, for the two codes that libvirt uses for many causes: every wrong state, and
everything without a code of its own."""

_ADVICE: tuple[tuple[str, str], ...] = (
    ("without shared storage is unsafe", "put its disks on storage that both hosts share; if they are and libvirt cannot know it, "
     "use --option unsafe=on"),
    ("snapshot", "delete or merge its snapshots first (virsh snapshot-list)"),
    ("block job", "wait for its block job to end, or abort it (virsh blockjob)"),
    ("shmem", "detach the shared memory device first"),
    ("virtiofs", "unmount and detach that file system first"),
    ("transient", "restart the guest without the transient disk"),
    ("hostdev", "detach the host's device first"),
    ("Unable to find an unused port", "wait until another migration to that host ends, or widen migration_port_min and "
     "migration_port_max in its qemu.conf (and first_port, last_port of its agent)"),
    ("Connection refused", "check the firewall between the hosts' migration addresses"),
    ("No route to host", "check routes and firewall between the hosts' migration addresses"),
    ("Network is unreachable", "check the routes between the hosts' migration addresses"),
    ("failed to write master key file", "check whether the disk with libvirt's folder there, /var/lib/libvirt, is full (df)"),
    ("No space left on device", "free some space on that disk"),
    ("Postcopy is not supported", "set vm.unprivileged_userfaultfd to 1 there (sysctl -w), or use --option post_copy=off"),
)  # fmt: skip
"""Advice by a part of libvirt's message."""


_CONSEQUENCES = (
    "Broken pipe",
    "Connection reset by peer",
    "Bad file descriptor",
    "Input/output error",
    "Read section footer failed: -5",  # EIO
    "canceled by client",
    "unexpectedly failed",
    "is not processing incoming migration",
    "migration successfully aborted",
)
"""Messages by which QEMU and libvirt report, at one end of a stream, that the other end is gone or that somebody aborted. They never
tell the cause."""


def class_of(code: int, domain: int, message: str, *, alive: bool) -> type[HypervisorError]:
    """Return the error class for libvirt's code, error domain (the part of libvirt that raised it) and message.

    `alive`: the connection to libvirtd still works. Only this tells a lost connection to libvirtd from a failure of a socket that
    libvirtd itself has to another host: both have the same codes.
    """
    if domain == libvirt.VIR_FROM_RPC and code in _LOST_AT_SOCKET and not alive:
        return HypervisorUnavailable
    by_message = (kind for other, part, kind in _BY_MESSAGE if code == other and part in message)
    return next(by_message, _BY_CODE.get(code, HypervisorError))


def translate(error: libvirt.libvirtError, *, alive: bool = False) -> HypervisorError:
    """Return the error as a `HypervisorError`, with advice. It keeps no reference to the original, whose traceback holds domains and
    with them the connection: closing that must not wait for a garbage collector.
    """
    code, domain = error.get_error_code() or 0, error.get_error_domain() or 0
    message = error.get_error_message() or str(error)
    kind = class_of(code, domain, message, alive=alive)
    return kind(advised(message), {"code": str(code), "error_domain": str(domain), "message": message} | echo_of(message))


def echo_of(message: str) -> dict[str, str]:
    """Return the `ECHO` mark for the message of an error that is only a consequence; empty for any other."""
    return {ECHO: "true"} if any(part in message for part in _CONSEQUENCES) else {}


def advised(message: str) -> str:
    """Return libvirt's message, with advice where there is some."""
    advice = next((advice for part, advice in _ADVICE if part in message), "")
    return f"{message}: {advice}" if advice else message
