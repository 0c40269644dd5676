"""Configuration of a simulated host. It is checked while it is decoded; a wrong value is refused with the field's path."""

from ipaddress import ip_interface
from typing import Annotated, Literal
from uuid import NAMESPACE_URL, uuid5

from msgspec import Meta, Struct

Bytes = Annotated[int, Meta(ge=0, le=1 << 50)]
Seconds = Annotated[float, Meta(ge=0, le=86_400)]
Name = Annotated[str, Meta(min_length=1, max_length=253)]
Port = Annotated[int, Meta(ge=1, le=65_535)]
Text = Annotated[str, Meta(min_length=1, max_length=253)]

MIB = 1 << 20


class Base(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    pass


def uuid_of(name: str) -> str:
    """Return the UUID of a guest whose configuration gives none. The same name gives the same UUID on every host."""
    return str(uuid5(NAMESPACE_URL, f"drover-sim:{name}"))


class SimGuest(Base, kw_only=True, frozen=True):
    """A guest in its first state: when its host starts, or when the guest is started through `control_path`."""

    name: Name
    uuid: Annotated[str, Meta(pattern=r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z")] | None = None
    """None: derived from the name."""
    memory_bytes: Annotated[int, Meta(ge=4096, le=1 << 46)] = 256 * MIB
    vcpus: Annotated[int, Meta(ge=1, le=4096)] = 1
    dirty_rate: Bytes = 0
    """Bytes per second that it writes."""
    working_set: Bytes | None = None
    """Bytes that it writes cyclically; None: all of its memory."""
    state: Literal["running", "paused", "shutoff"] = "running"
    pause_reason: Text = "user"
    """Why it is paused, where `state` is ``paused``."""
    persistent: bool = True
    autostart: bool = False
    """It starts with its first host."""
    title: Annotated[str, Meta(max_length=1024)] = ""
    """Stands for every part of a definition that has no effect on a running guest."""
    log: Annotated[str, Meta(max_length=4096)] = ""
    """Path of its serial log, beneath the `log_root` of each host that it visits; empty: none."""
    obstacle: Annotated[str, Meta(max_length=1024)] = ""
    """Why the hypervisor refuses to migrate it, as libvirt refuses a guest with snapshots; empty: it does not."""
    disk: bool = False
    """It has a disk: if it is paused and has not run since it arrived, it is not migrated, because QEMU before 10.0 would crash."""
    unsafe: bool = False
    """It has a disk that is not known to be shared: it is migrated with the option `unsafe` only."""
    tenant: Annotated[str, Meta(max_length=253)] = ""
    min_bandwidth: Bytes = 0
    max_bandwidth: Bytes = 0
    """Its own settings: see `guest_settings.GuestSettings`."""
    metadata: Annotated[str, Meta(max_length=1 << 20)] = ""
    """Kept, and never read."""
    arch: Text = "x86_64"
    machine: Text = "pc-q35-7.2"
    virt_type: Text = "kvm"
    cpu: Annotated[str, Meta(max_length=65_536)] = "qemu64"


class Latencies(Base, kw_only=True, frozen=True):
    """Seconds that each phase takes in addition to the transfer of the memory."""

    begin: Seconds = 0.002
    prepare: Seconds = 0.02
    finish: Seconds = 0.005
    """From the arrival of the whole state until the guest runs: a part of the blackout."""
    confirm: Seconds = 0.02
    switch: Seconds = 0.005
    """In post-copy: from the guest's stop at the source until it runs at the destination."""


class SimInterface(Base, kw_only=True, frozen=True):
    """A network interface. Its addresses must be this machine's, as the simulated stream is real."""

    name: Annotated[str, Meta(min_length=1, max_length=64)]
    addresses: Annotated[tuple[Annotated[str, Meta(max_length=64)], ...], Meta(max_length=8)] = ()
    """With their prefix, such as ``127.92.0.1/24``."""
    mtu: Annotated[int, Meta(ge=68, le=65_536)] = 1500
    line_bytes_per_second: Bytes = 0
    """0: unknown."""
    up: bool = True

    def __post_init__(self) -> None:
        for address in self.addresses:
            ip_interface(address)


class SimConfig(Base, kw_only=True, frozen=True):
    host_uuid: Name
    profile: Literal["qemu"] = "qemu"
    link_rate: Annotated[int, Meta(ge=1, le=1 << 50)] = 1_000_000_000
    """Bytes per second of the network link that all outgoing transfers share."""
    incoming_link_rate: Annotated[int, Meta(ge=1, le=1 << 50)] | None = None
    """The same for incoming transfers. None: no limit."""
    interfaces: Annotated[tuple[SimInterface, ...], Meta(max_length=64)] = ()
    """The agent's default: one for each address of its networks."""
    guests: Annotated[tuple[SimGuest, ...], Meta(max_length=10_000)] = ()
    ports: tuple[Port, Port] = (49_152, 49_215)
    """First and last port for incoming streams; the default is libvirt's."""
    machine_types: tuple[Text, ...] = ("pc-q35-7.2", "pc-i440fx-7.2")
    forbidden: dict[Name, Annotated[str, Meta(max_length=1024)]] = {}
    """What forbids an option, by option of the profile that this host lacks; for example a sysctl that forbids post-copy."""
    cpu_models: tuple[str, ...] = ("qemu64", "host-model")
    host_cpu: Text = "sim"
    """The CPU that a guest with ``host-passthrough`` or ``maximum`` gets here."""
    archs: tuple[Text, ...] = ("x86_64",)
    virt_types: tuple[Text, ...] = ("kvm", "qemu")
    latencies: Latencies = Latencies()
    max_downtime: Seconds = 0.3
    call_timeout: Annotated[float, Meta(gt=0, le=3_600)] = 30.0
    """Most seconds of a call, except perform and finish."""
    connect_timeout: Annotated[float, Meta(gt=0, le=3_600)] = 5.0
    """Most seconds for the stream's connection and greeting."""
    peer_timeout: Annotated[float, Meta(gt=0, le=3_600)] = 30.0
    """Seconds without a message from the other end after which the stream counts as broken."""
    fail_next: dict[Name, Annotated[str, Meta(max_length=1024)]] = {}
    """Message with which the next call of a method fails, by method: ``{"prepare": "no memory"}``."""
    log_root: Annotated[str, Meta(max_length=4096)] = ""
    """Folder that all serial logs must be in; a guest with a log elsewhere is refused. Empty: no logs at all."""
    state_path: Annotated[str, Meta(max_length=4096)] = ""
    """File that outlives the process. Once it exists, it determines which guests are here, and `guests` is ignored; guests that ran
    continue, as if only the agent had died. Empty: a new process begins with `guests`."""
    control_path: Annotated[str, Meta(max_length=107)] = ""
    """Unix socket at which the users of guests start and end them (`sim.control`). Empty: none."""
