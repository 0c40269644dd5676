"""Begin, the first phase, on the source; and a check whether libvirt would accept it. Blocking functions run in threads."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import libvirt

from agent.hypervisor.base import MAX_DOMAIN_XML, HypervisorError, Incompatible
from agent.hypervisor.libvirt import options as option_flags
from agent.hypervisor.libvirt import phases, unrun
from agent.hypervisor.libvirt.domain import reason_name
from agent.hypervisor.libvirt.service import Service
from agent.hypervisor.options import Options


def begin(domain: Any, service: Service, options: Options, destination_name: str) -> tuple[str, bytes]:
    """Call Begin. Return the domain XML, marked with the facts of the guest that libvirt does not transfer, and the cookie. Blocks.

    Raises `Incompatible` for a guest whose pause would be lost, that QEMU cannot hand over, or whose XML is too long.
    """
    state, reason = domain.state()
    paused = state == libvirt.VIR_DOMAIN_PAUSED
    if paused and reason != libvirt.VIR_DOMAIN_PAUSED_USER:  # libvirt would migrate it and run it at the destination
        raise Incompatible(
            f"the guest is paused ({reason_name(state, reason)}), but not by its user, so it would arrive running; "
            f"remove the cause, then `virsh resume {domain.name()}`"
        )
    if paused and (why := unrun.refusal(domain, service)):
        raise Incompatible(why)
    facts = [fact for fact, holds in (("paused", paused), ("transient", not domain.isPersistent())) if holds]
    xml, cookie = phases.begin(domain, params(destination_name), option_flags.flags(option_flags.settled(options, facts)))
    xml = option_flags.mark(xml, *facts)
    if (size := len(xml.encode())) > MAX_DOMAIN_XML:
        raise Incompatible(f"the domain XML has {size} bytes; at most {MAX_DOMAIN_XML} can be sent: shorten its metadata")
    return xml, cookie


def check(domain: Any, service: Service, options: Options, destination_name: str) -> None:
    """Raise the error of `begin` if libvirt would refuse it. Blocks.

    Calls Begin without CHANGE_PROTECTION, which starts no migration job: libvirt checks and describes the guest, and keeps nothing.
    """
    begin(domain, service, options | {"change_protection": False}, destination_name)


@contextmanager
def refusals() -> Iterator[None]:
    """Raise an untyped error of `begin` or `check` as `Incompatible`: libvirt has one code (OPERATION_INVALID) for everything that
    keeps a guest from leaving, such as a snapshot or a device."""
    try:
        yield
    except HypervisorError as error:
        if type(error) is not HypervisorError:
            raise
        raise Incompatible(str(error), error.native) from None


def perform_params(uri: str, domain_xml: str, destination_name: str, limit: int, flags: int) -> Mapping[str, str | int]:
    """Return libvirt's parameters of Perform. `limit` in MiB/s, 0 for none: that is passed, too, because libvirt would take a limit
    that `virsh migrate-setspeed` or an earlier migration left on the guest. Post-copy has it from the switch on."""
    named = {libvirt.VIR_MIGRATE_PARAM_URI: uri, libvirt.VIR_MIGRATE_PARAM_DEST_XML: option_flags.unmarked(domain_xml)}
    limits = {libvirt.VIR_MIGRATE_PARAM_BANDWIDTH: limit or option_flags.NO_LIMIT}
    if flags & libvirt.VIR_MIGRATE_POSTCOPY:
        limits[libvirt.VIR_MIGRATE_PARAM_BANDWIDTH_POSTCOPY] = limit or option_flags.NO_LIMIT
    return {**params(destination_name), **named, **limits}


def params(destination_name: str) -> Mapping[str, str | int]:
    """Return libvirt's parameters that every phase on the source needs."""
    return {libvirt.VIR_MIGRATE_PARAM_DEST_NAME: destination_name} if destination_name else {}
