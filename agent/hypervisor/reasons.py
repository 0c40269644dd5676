"""Translation of a hypervisor's errors to Drover's own."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from agent.hypervisor.base import (
    DomainAmbiguous,
    DomainBusy,
    DomainNotFound,
    Exhausted,
    HypervisorError,
    HypervisorUnavailable,
    Incompatible,
    InvalidDocument,
    NoTransfer,
    TransferFailed,
)
from agent.runtime.errors import DroverError, Reason

_REASONS: Mapping[type[HypervisorError], Reason] = {
    DomainNotFound: Reason.DOMAIN_NOT_FOUND,
    DomainAmbiguous: Reason.DOMAIN_AMBIGUOUS,
    DomainBusy: Reason.DOMAIN_BUSY,
    InvalidDocument: Reason.INVALID_FIELD,
    Incompatible: Reason.INCOMPATIBLE_GUEST,
    Exhausted: Reason.BUSY,
    NoTransfer: Reason.WRONG_PHASE,
    TransferFailed: Reason.TRANSFER_FAILED,
    HypervisorUnavailable: Reason.HYPERVISOR_UNAVAILABLE,
}


def from_hypervisor(error: HypervisorError, host: str, domain: str = "") -> DroverError:
    """Return the error of a host's hypervisor as a `DroverError` with Drover's own reason. It names the host and, if given, the
    guest, and keeps the hypervisor's code and message as metadata.
    """
    reason = _REASONS.get(type(error), Reason.HYPERVISOR_FAILED)
    named = {"host": host, "domain": domain} if domain else {"host": host}
    return DroverError(reason, f"{host}: {error}", metadata={**error.native, **named})


@contextmanager
def translated(host: str, domain: str = "") -> Iterator[None]:
    """Raise a hypervisor's error as `from_hypervisor` translates it."""
    try:
        yield
    except HypervisorError as error:
        raise from_hypervisor(error, host, domain) from None
