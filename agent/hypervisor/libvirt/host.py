"""The capabilities of this host, the requirements of a guest, and why they do not match.

The results are on the critical path of every migration, so the driver keeps them for each run of libvirtd: the capabilities
(libvirt may probe every QEMU binary for them the first time, some 100 ms each) and each CPU comparison.
"""

import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import libvirt

from agent.hypervisor.base import HypervisorError, Requirements
from agent.hypervisor.libvirt.incoming import TRANSPORTS

CPU_LIMIT = 64 * 1024
"""Most bytes of the `<cpu>` element in `Requirements.cpu`."""


@dataclass(frozen=True)
class Architecture:
    """Offer of the host's QEMU for one architecture."""

    machines: Mapping[str, int]
    """Highest number of CPUs by machine type."""
    virt_types: frozenset[str]
    emulator: str
    """The QEMU binary that libvirt uses by default."""


@dataclass(frozen=True)
class Capabilities:
    host_uuid: str
    uri_transports: tuple[str, ...]
    qemu_uid: int | None
    """The user as which libvirt starts QEMU, from its DAC security model; None where it does not tell."""
    architectures: Mapping[str, Architecture]


def parse_capabilities(xml: str) -> Capabilities:
    root = ET.fromstring(xml)
    offered = {element.text for element in root.iterfind("host/migration_features/uri_transports/uri_transport")}
    return Capabilities(
        host_uuid=root.findtext("host/uuid", ""),
        uri_transports=tuple(transport for transport in TRANSPORTS if transport in offered),
        qemu_uid=_qemu_uid(root),
        architectures={
            arch.get("name", ""): _architecture(arch)
            for guest in root.iterfind("guest")
            if guest.findtext("os_type") == "hvm"
            for arch in guest.iterfind("arch")
        },
    )


def _qemu_uid(root: ET.Element) -> int | None:
    """Return the user from a label such as ``+64055:+103``."""
    for model in root.iterfind("host/secmodel"):
        label = re.fullmatch(r"\+?(\d+):\+?\d+", model.findtext("baselabel", ""))
        if model.findtext("model") == "dac" and label:
            return int(label[1])
    return None


def _architecture(arch: ET.Element) -> Architecture:
    machines = {}
    for machine in arch.iter("machine"):
        limit = int(machine.get("maxCpus", "0"))
        for name in (machine.text, machine.get("canonical")):
            if name:
                machines[name] = limit
    types = frozenset(domain.get("type", "") for domain in arch.iterfind("domain"))
    return Architecture(machines, types, arch.findtext("emulator", ""))


def parse_requirements(xml: str) -> Requirements:
    """Return the requirements of the guest of this domain XML. Raises `HypervisorError` for a CPU element beyond `CPU_LIMIT`."""
    root = ET.fromstring(xml)
    kind = root.find("os/type")
    memory, vcpus, cpu = root.find("memory"), root.findtext("vcpu", "1"), root.find("cpu")
    text = "" if cpu is None else ET.tostring(cpu, encoding="unicode").strip()
    if len(text.encode()) > CPU_LIMIT:
        raise HypervisorError(f"the guest's CPU description has {len(text.encode())} bytes; the limit is {CPU_LIMIT}")
    return Requirements(
        name=root.findtext("name", ""),
        uuid=root.findtext("uuid", ""),
        memory_bytes=0 if memory is None else int(memory.text or 0) * 1024,  # libvirt always formats it in KiB
        vcpus=int(vcpus),
        arch="" if kind is None else kind.get("arch", ""),
        machine="" if kind is None else kind.get("machine", ""),
        virt_type=root.get("type", ""),
        cpu=text,
    )


def emulator_of(xml: str) -> str | None:
    """Return the QEMU binary of this domain XML; None for libvirt's default."""
    return ET.fromstring(xml).findtext("devices/emulator")


def incompatibilities(capabilities: Capabilities, needs: Requirements, hypervisor: str) -> list[str]:
    """Return why this host's QEMU cannot run the guest, except for its CPU, as plain sentences."""
    arch = capabilities.architectures.get(needs.arch)
    if arch is None:
        return [f"architecture {needs.arch} is not supported by {hypervisor} here"]
    found = []
    if needs.virt_type not in arch.virt_types:
        found.append(f"virtualization type {needs.virt_type} is not available here for {needs.arch}")
    limit = arch.machines.get(needs.machine)
    if limit is None:
        found.append(f"machine type {needs.machine} is not supported by {hypervisor} here{_newest(arch, needs.machine)}")
    elif 0 < limit < needs.vcpus:
        found.append(f"machine type {needs.machine} has at most {limit} virtual CPUs here, but the guest has {needs.vcpus}")
    return found


def _newest(arch: Architecture, machine: str) -> str:
    """Return a remark with the newest machine type of the same family; empty where the host has none of that family."""
    family, _ = _version(machine)
    kin = [name for name in arch.machines if _version(name)[0] == family and _version(name)[1]]
    return f" ({max(kin, key=lambda name: _version(name)[1])} is the newest)" if kin else ""


def _version(machine: str) -> tuple[str, tuple[int, ...]]:
    """Split a machine type into family and version: ``pc-q35-7.2`` → (``pc-q35``, (7, 2)). A version may be empty."""
    match = re.fullmatch(r"(.+?)-(\d+(?:\.\d+)*)", machine)
    return (match[1], tuple(map(int, match[2].split(".")))) if match else (machine, ())


_OF_THE_HOST = frozenset({"host-passthrough", "maximum"})
"""Modes of a CPU that do not describe it: the guest gets the CPU that QEMU gives on its host."""


def has_cpu_of_the_host(needs: Requirements) -> bool:
    return bool(needs.cpu) and ET.fromstring(needs.cpu).get("mode") in _OF_THE_HOST


def given_cpu(connection: Any, arch: str, machine: str, virt_type: str, emulator: str | None = None) -> str:
    """Return the CPU that QEMU gives a guest of such a mode, as libvirt has probed it: a list of its model, vendor and features,
    separated by spaces. Empty where libvirt cannot tell. Blocks for one round trip.
    """
    root = ET.fromstring(connection.getDomainCapabilities(emulator, arch, machine, virt_type))
    mode = root.find("cpu/mode[@name='host-model']")
    if mode is None or mode.get("supported") != "yes":
        return ""
    properties = {f"model={mode.findtext('model', '')}", f"vendor={mode.findtext('vendor', '')}"}
    for feature in mode.iterfind("feature"):
        properties.add(("-" if feature.get("policy") == "disable" else "+") + feature.get("name", ""))
    return " ".join(sorted(properties))


def cpu_difference(mode: str, theirs: str, ours: str) -> str:
    """Return why a guest with a CPU of that mode cannot change hosts, by the CPU that the source (`theirs`) and that this host
    (`ours`) give it; empty where they are the same."""
    if theirs == ours and ours:
        return ""
    start = f"the guest uses its host's CPU ({mode}), and "
    if not theirs or not ours:
        return f"{start}libvirt on {'this' if theirs else 'the source'} host does not tell which CPU its QEMU gives"
    there, here = sorted(set(theirs.split()) - set(ours.split())), sorted(set(ours.split()) - set(theirs.split()))
    return f"{start}that differs: {_some(there)} only at the source, {_some(here)} only here"


def _some(properties: list[str]) -> str:
    shown = ", ".join(properties[:8]) or "nothing"
    return f"{shown} and {len(properties) - 8} more" if len(properties) > 8 else shown


def compare_cpu(connection: Any, needs: Requirements) -> str:
    """Return why this host cannot give the guest its CPU; empty when it can. Blocks for one round trip."""
    try:
        mode = ET.fromstring(needs.cpu).get("mode") if needs.cpu else None
    except ET.ParseError as error:  # it comes from another host
        return f"the description of the guest's CPU cannot be read: {error}"
    if mode is None:
        return ""  # the machine type's default CPU, which is the same on every host with that machine type
    if mode in _OF_THE_HOST:
        ours = given_cpu(connection, needs.arch, needs.machine, needs.virt_type)
        return cpu_difference(mode, needs.host_cpu, ours)
    try:
        verdict = connection.compareHypervisorCPU(
            None, needs.arch, needs.machine, needs.virt_type, needs.cpu, libvirt.VIR_CONNECT_COMPARE_CPU_FAIL_INCOMPATIBLE
        )
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_SUPPORT:
            return ""  # libvirt cannot compare CPUs of this architecture; it refuses a wrong one at Prepare
        if error.get_error_domain() == libvirt.VIR_FROM_RPC:
            raise
        return f"this host cannot provide the guest's CPU: {error.get_error_message()}"
    return "this host cannot provide the guest's CPU" if verdict == libvirt.VIR_CPU_COMPARE_INCOMPATIBLE else ""
