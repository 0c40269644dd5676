"""libvirt's errors as this project's errors, by code and by where they arose."""

from collections.abc import Mapping

import libvirt

from agent.hypervisor.base import DomainBusy, DomainNotFound, HypervisorError, HypervisorUnavailable, Incompatible

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
}

_LOST_AT_SOCKET = frozenset({libvirt.VIR_ERR_INTERNAL_ERROR, libvirt.VIR_ERR_SYSTEM_ERROR})
"""Codes that mean a lost connection when libvirt's RPC layer raises them ("client socket is closed", "End of file…")."""

_BUSY_WORDS = ("is already active", "another migration job", "is being migrated", "incoming migration")
"""libvirt has one code (OPERATION_INVALID) for every wrong state: its words tell a guest that is taken from the rest."""


def class_of(code: int, domain: int, message: str) -> type[HypervisorError]:
    """The error class for libvirt's code, its domain (which part of libvirt spoke) and its message."""
    if domain == libvirt.VIR_FROM_RPC and code in _LOST_AT_SOCKET:
        return HypervisorUnavailable
    if code == libvirt.VIR_ERR_OPERATION_INVALID and any(words in message for words in _BUSY_WORDS):
        return DomainBusy
    return _BY_CODE.get(code, HypervisorError)


def translate(error: libvirt.libvirtError) -> HypervisorError:
    """The same fact in our words. Keeps no reference to the original: its traceback holds domains, and with them the
    connection, whose closing must not wait for a garbage collector.
    """
    code, domain = error.get_error_code() or 0, error.get_error_domain() or 0
    message = error.get_error_message() or str(error)
    return class_of(code, domain, message)(message, {"code": str(code), "domain": str(domain), "message": message})


def code_of(error: HypervisorError) -> int:
    """libvirt's code inside a translated error; 0 for an error of our own."""
    return int(error.native.get("code", "0"))
