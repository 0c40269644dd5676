"""Begin, the first phase, on the source; and whether libvirt would take it. What blocks runs in threads."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import libvirt

from agent.hypervisor.base import MAX_DOMAIN_XML, HypervisorError, Incompatible, Options
from agent.hypervisor.libvirt import options as words
from agent.hypervisor.libvirt import phases, unrun
from agent.hypervisor.libvirt.domain import reason_name
from agent.hypervisor.libvirt.service import Service


def begin(domain: Any, service: Service, options: Options, destination_name: str) -> tuple[str, bytes]:
    """Call Begin: the domain XML, marked with what libvirt does not carry of the guest, and the cookie. Blocks."""
    state, reason = domain.state()
    paused = state == libvirt.VIR_DOMAIN_PAUSED
    if paused and reason != libvirt.VIR_DOMAIN_PAUSED_USER:  # libvirt would let it go, and run it there
        raise Incompatible(f"it is paused ({reason_name(state, reason)}), and not by its user: it would arrive running")
    if paused and (why := unrun.refusal(domain, service)):
        raise Incompatible(why)
    facts = [fact for fact, holds in (("paused", paused), ("transient", not domain.isPersistent())) if holds]
    xml, cookie = phases.begin(domain, params(destination_name), words.flags(words.settled(options, facts)))
    xml = words.mark(xml, *facts)
    if (size := len(xml.encode())) > MAX_DOMAIN_XML:
        raise Incompatible(f"its domain XML has {size} bytes, and at most {MAX_DOMAIN_XML} can travel: shorten its metadata")
    return xml, cookie


def check(domain: Any, service: Service, options: Options, destination_name: str) -> None:
    """Whether libvirt would take `begin`, in its own words. Blocks.

    Without CHANGE_PROTECTION, Begin takes no migration job: libvirt checks the guest, describes it, and keeps nothing.
    """
    begin(domain, service, replace(options, change_protection=False), destination_name)


@contextmanager
def refusals() -> Iterator[None]:
    """Around either: libvirt has one code (OPERATION_INVALID) for whatever keeps a guest from leaving, a snapshot or a device."""
    try:
        yield
    except HypervisorError as error:
        if type(error) is not HypervisorError:
            raise
        raise Incompatible(str(error), error.native) from None


def params(destination_name: str) -> Mapping[str, str | int]:
    """libvirt's parameters of every phase on the source."""
    return {libvirt.VIR_MIGRATE_PARAM_DEST_NAME: destination_name} if destination_name else {}
