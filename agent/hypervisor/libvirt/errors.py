"""libvirt's errors as this project's errors, by code and by where they arose."""

from collections.abc import Mapping

import libvirt

from agent.hypervisor.base import (
    ECHO,
    DomainBusy,
    DomainNotFound,
    Exhausted,
    HypervisorError,
    HypervisorUnavailable,
    Incompatible,
    InvalidDocument,
    NoTransfer,
)

_BY_CODE: Mapping[int, type[HypervisorError]] = {
    libvirt.VIR_ERR_NO_DOMAIN: DomainNotFound,
    libvirt.VIR_ERR_NO_CONNECT: HypervisorUnavailable,
    libvirt.VIR_ERR_INVALID_CONN: HypervisorUnavailable,
    libvirt.VIR_ERR_RPC: HypervisorUnavailable,
    libvirt.VIR_ERR_AUTH_FAILED: HypervisorUnavailable,
    # The job lock of the domain was not free within libvirt's own 30 s.
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

_BY_WORDS: tuple[tuple[int, str, type[HypervisorError]], ...] = (
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
"""libvirt has one code for every wrong state, and another one for all else: there its words tell what it is."""

_ADVICE: tuple[tuple[str, str], ...] = (
    ("without shared storage is unsafe", "put its disks on storage that both hosts share, or, where they are and libvirt cannot "
     "know it, say --option unsafe=on"),
    ("snapshot", "delete or merge its snapshots first (virsh snapshot-list)"),
    ("block job", "wait for its block job to end, or abort it (virsh blockjob)"),
    ("shmem", "detach the shared memory device first"),
    ("virtiofs", "unmount and detach that file system first"),
    ("transient", "start it again without the transient disk"),
    ("hostdev", "detach the host's device first"),
    ("Unable to find an unused port", "wait for another migration to that host to end, or widen migration_port_min and _max in its "
     "qemu.conf (and first_port, last_port of its agent)"),
    ("Connection refused", "look at the firewall between the hosts' migration addresses"),
    ("No route to host", "look at routes and firewall between the hosts' migration addresses"),
    ("Network is unreachable", "look at the routes between the hosts' migration addresses"),
    ("failed to write master key file", "see whether the disk with libvirt's folder there, /var/lib/libvirt, is full (df)"),
    ("No space left on device", "make room on that disk"),
    ("Postcopy is not supported", "set vm.unprivileged_userfaultfd to 1 there, or say --option post_copy=off"),
)  # fmt: skip
"""What would help, by words in libvirt's message."""


_ECHOES = (
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
"""How QEMU and libvirt tell, at one end of a stream, that the other end is gone or that somebody aborted: never the cause itself."""


def class_of(code: int, domain: int, message: str, *, alive: bool) -> type[HypervisorError]:
    """The error class for libvirt's code, its domain (which part of libvirt spoke) and its message.

    libvirtd's own sockets (towards another host) fail with the codes of a connection to libvirtd that was lost: only whether that
    one is `alive` tells them apart.
    """
    if domain == libvirt.VIR_FROM_RPC and code in _LOST_AT_SOCKET and not alive:
        return HypervisorUnavailable
    by_words = (kind for other, words, kind in _BY_WORDS if code == other and words in message)
    return next(by_words, _BY_CODE.get(code, HypervisorError))


def translate(error: libvirt.libvirtError, *, alive: bool = False) -> HypervisorError:
    """The same fact in our words, with what would help. Keeps no reference to the original: its traceback holds domains, and with
    them the connection, whose closing must not wait for a garbage collector.
    """
    code, domain = error.get_error_code() or 0, error.get_error_domain() or 0
    message = error.get_error_message() or str(error)
    kind = class_of(code, domain, message, alive=alive)
    return kind(advised(message), {"code": str(code), "error_domain": str(domain), "message": message} | echo_of(message))


def echo_of(message: str) -> dict[str, str]:
    """The mark of an error that is only the echo of its cause."""
    return {ECHO: "true"} if any(words in message for words in _ECHOES) else {}


def advised(message: str) -> str:
    """libvirt's message, and what would help."""
    advice = next((advice for words, advice in _ADVICE if words in message), "")
    return f"{message}: {advice}" if advice else message


def code_of(error: HypervisorError) -> int:
    """libvirt's code inside a translated error; 0 for an error of our own."""
    return int(error.native.get("code", "0"))
