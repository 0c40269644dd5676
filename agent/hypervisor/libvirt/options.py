"""Translation of `Options` to libvirt flags, and of limits in bytes per second to libvirt's MiB/s. Tables and pure functions."""

from collections.abc import Collection, Mapping
from xml.etree import ElementTree

import libvirt

from agent.hypervisor.base import Incompatible, InvalidDocument
from agent.hypervisor.names import name_problem
from agent.hypervisor.options import OPTIONS, Options, Support

MIB = 1 << 20
NO_LIMIT = (2**63 - 1) // MIB
"""MiB/s that libvirt reports for a transfer without a limit; the most that it takes."""

FLAGS: Mapping[str, int] = {
    name: getattr(libvirt, option.libvirt) for name, option in OPTIONS.items() if option.kind is bool and option.libvirt
}
"""The switches that this driver supports, each tested on real libvirt. The same flags go to all phases on both sides."""

SUPPORT: Mapping[str, Support] = {name: Support.SUPPORTED if name in FLAGS else Support.UNSUPPORTED for name in OPTIONS}


def wants(options: Options, name: str) -> bool:
    """Return the user's choice for a supported switch, or its default where there is none."""
    return bool(options.get(name, OPTIONS[name].default))


def settled(options: Options, facts: Collection[str]) -> Options:
    """Return the options that apply to a guest with these facts (see `mark`). By default, post-copy is armed only where libvirt
    allows it (not for a guest that is paused during or after the transfer), and a transient guest stays transient.
    """
    if "paused" in facts:
        options = options | {"paused": True}
    if "transient" in facts:
        options = {"persist_destination": False, **options}
    if not wants(options, "live") or wants(options, "paused"):
        options = {"post_copy": False, **options}
    return options


def flags(options: Options) -> int:
    """Return libvirt's flags. Raises `Incompatible` for an option that the user chose and this driver does not support."""
    refused = [name for name, support in SUPPORT.items() if support is Support.UNSUPPORTED and options.get(name)]
    if refused:
        raise Incompatible(f"the libvirt driver does not support these options: {', '.join(refused)}")
    return sum(flag for name, flag in FLAGS.items() if wants(options, name))


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
