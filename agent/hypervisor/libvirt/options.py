"""Translation of `Options` to libvirt flags, and of limits in bytes per second to libvirt's MiB/s. Tables and pure functions."""

from collections.abc import Collection, Mapping
from dataclasses import fields, replace
from xml.etree import ElementTree

import libvirt

from agent.hypervisor.base import Incompatible, InvalidDocument, Options, Support
from agent.hypervisor.names import name_problem

MIB = 1 << 20

FLAGS: Mapping[str, tuple[bool, int]] = {
    # option: (the default when the user did not set it, libvirt's flag)
    "live": (True, libvirt.VIR_MIGRATE_LIVE),
    "persist_destination": (True, libvirt.VIR_MIGRATE_PERSIST_DEST),
    "undefine_source": (True, libvirt.VIR_MIGRATE_UNDEFINE_SOURCE),
    "paused": (False, libvirt.VIR_MIGRATE_PAUSED),
    "change_protection": (True, libvirt.VIR_MIGRATE_CHANGE_PROTECTION),
    "abort_on_error": (False, libvirt.VIR_MIGRATE_ABORT_ON_ERROR),
    "unsafe": (False, libvirt.VIR_MIGRATE_UNSAFE),
    "auto_converge": (False, libvirt.VIR_MIGRATE_AUTO_CONVERGE),
    "post_copy": (True, libvirt.VIR_MIGRATE_POSTCOPY),
}
"""The options that this driver supports, each tested on real libvirt. The same flags go to all phases on both sides."""

SUPPORT: Mapping[str, Support] = {
    option.name: Support.SUPPORTED if option.name in FLAGS else Support.UNSUPPORTED for option in fields(Options)
}


def wants(options: Options, name: str) -> bool:
    """Return the user's choice for a supported option, or this driver's default where there is none."""
    chosen: bool | None = getattr(options, name)
    return FLAGS[name][0] if chosen is None else chosen


def settled(options: Options, facts: Collection[str]) -> Options:
    """Return the options that apply to a guest with these facts (see `mark`). By default, post-copy is armed only where libvirt
    allows it (not for a guest that is paused during or after the transfer), and a transient guest stays transient.
    """
    if "paused" in facts:
        options = replace(options, paused=True)
    if "transient" in facts and options.persist_destination is None:
        options = replace(options, persist_destination=False)
    if options.post_copy is None and (options.live is False or options.paused):
        options = replace(options, post_copy=False)
    return options


def flags(options: Options) -> int:
    """Return libvirt's flags. Raises `Incompatible` for an option that the user switched on and this driver does not support."""
    refused = [name for name, support in SUPPORT.items() if support is Support.UNSUPPORTED and getattr(options, name)]
    if refused:
        raise Incompatible(f"the libvirt driver does not support these options: {', '.join(refused)}")
    return sum(flag for name, (_, flag) in FLAGS.items() if wants(options, name))


def mebibytes(bandwidth: int) -> int:
    """Return a limit in libvirt's unit, rounded down so that it is never exceeded; 0 is no limit.

    Raises `Incompatible` below 1 MiB/s: libvirt cannot enforce such a limit, and rounding down to 0 would remove it.
    """
    if bandwidth < 0 or 0 < bandwidth < MIB:
        raise Incompatible(
            f"libvirt cannot limit a transfer to {bandwidth} bytes per second; the lowest limit is {MIB}, and 0 is no limit"
        )
    return bandwidth // MIB


_MARKS = {"paused": "<?drover paused-by-user?>", "transient": "<?drover transient?>"}
"""Processing instructions put before the domain XML: libvirt ignores them, and the other side's driver reads them.

Whether the guest was paused by its user and whether it is persistent is known at Begin on the source and needed at Finish on
the destination, which may be armed before any later cookie exists. libvirt alone would run a paused guest on arrival and make
a transient one persistent.
"""


def mark(domain_xml: str, *facts: str) -> str:
    """Return the XML with the marks of these facts, which are keys of `_MARKS`."""
    return "".join(_MARKS[fact] for fact in _MARKS if fact in facts) + domain_xml


def marks_of(domain_xml: str) -> frozenset[str]:
    """Return the facts that `mark` wrote."""
    head = domain_xml[: domain_xml.find("<domain")]
    return frozenset(fact for fact, text in _MARKS.items() if text in head)


def flags_for(options: Options, domain_xml: str) -> int:
    """Return libvirt's flags of every phase after Begin, on both sides."""
    return flags(settled(options, marks_of(domain_xml)))


def unmarked(domain_xml: str) -> str:
    for text in _MARKS.values():
        domain_xml = domain_xml.removeprefix(text)
    return domain_xml


def check_document(domain_xml: str, uuid: str) -> None:
    """See `interface.Hypervisor.check_document`."""
    try:
        root = ElementTree.fromstring(unmarked(domain_xml))
    except (ElementTree.ParseError, ValueError) as error:
        raise InvalidDocument(f"the domain XML cannot be read: {error}") from None
    found = root.findtext("uuid", "")
    if root.tag != "domain" or found.lower() != uuid.lower():
        raise InvalidDocument(f"the XML describes a <{root.tag}> with UUID {found or 'missing'}, not the domain {uuid}")
    if problem := name_problem(root.findtext("name", "")):
        raise InvalidDocument(f"the name in the domain XML {problem}; no host takes a guest of that name")
