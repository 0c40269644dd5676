"""What a simulated host is made of. Checked while it is decoded; wrong values are refused with the field's path."""

from typing import Annotated, Literal
from uuid import NAMESPACE_URL, uuid5

from msgspec import Meta, Struct

Bytes = Annotated[int, Meta(ge=0, le=1 << 50)]
Seconds = Annotated[float, Meta(ge=0, le=86_400)]
Name = Annotated[str, Meta(min_length=1, max_length=253)]
Port = Annotated[int, Meta(ge=1, le=65_535)]
Word = Annotated[str, Meta(min_length=1, max_length=253)]

MIB = 1 << 20


class Base(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    pass


def uuid_of(name: str) -> str:
    """The UUID of a guest whose configuration gives none: the same for the same name, everywhere."""
    return str(uuid5(NAMESPACE_URL, f"drover-sim:{name}"))


class SimGuest(Base, kw_only=True, frozen=True):
    """A guest as it is when it begins: with its host, or when it is started at `control_path`."""

    name: Name
    uuid: Annotated[str, Meta(pattern=r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z")] | None = None
    """None: made from the name."""
    memory_bytes: Annotated[int, Meta(ge=4096, le=1 << 46)] = 256 * MIB
    vcpus: Annotated[int, Meta(ge=1, le=4096)] = 1
    dirty_rate: Bytes = 0
    """Bytes per second that it writes."""
    working_set: Bytes | None = None
    """Bytes that it writes round and round; None: all of its memory."""
    state: Literal["running", "paused", "shutoff"] = "running"
    pause_reason: Word = "user"
    """Why it is paused, where `state` says so."""
    persistent: bool = True
    autostart: bool = False
    """It starts with its first host."""
    title: Annotated[str, Meta(max_length=1024)] = ""
    """Stands for all of a definition that has no effect on a guest that runs."""
    log: Annotated[str, Meta(max_length=4096)] = ""
    """Path of its serial log, beneath the `log_root` of each host that it visits; empty: none."""
    obstacle: Annotated[str, Meta(max_length=1024)] = ""
    """Why the hypervisor refuses to let it go, as libvirt does of a guest with snapshots; empty: it does not."""
    disk: bool = False
    """It has one: paused and not run since it arrived, it is not moved on, as QEMU before 10.0 would die of that."""
    unsafe: bool = False
    """It has a disk that is not known to be shared: it leaves with the option `unsafe` only."""
    metadata: Annotated[str, Meta(max_length=1 << 20)] = ""
    """Kept, and not looked at."""
    arch: Word = "x86_64"
    machine: Word = "pc-q35-7.2"
    virt_type: Word = "kvm"
    cpu: Annotated[str, Meta(max_length=65_536)] = "qemu64"


class Latencies(Base, kw_only=True, frozen=True):
    """Seconds that each phase takes by itself, apart from the memory that flows."""

    begin: Seconds = 0.002
    prepare: Seconds = 0.02
    finish: Seconds = 0.005
    """After the whole state is there, before the guest runs: a part of the blackout."""
    confirm: Seconds = 0.02
    switch: Seconds = 0.005
    """Post-copy: from the guest's stop at the source until it runs at the destination."""


class SimConfig(Base, kw_only=True, frozen=True):
    host_uuid: Name
    profile: Literal["qemu"] = "qemu"
    link_rate: Annotated[int, Meta(ge=1, le=1 << 50)] = 1_000_000_000
    """Bytes per second of the wire that all outgoing transfers share."""
    guests: Annotated[tuple[SimGuest, ...], Meta(max_length=10_000)] = ()
    ports: tuple[Port, Port] = (49_152, 49_215)
    """First and last port for incoming streams, as QEMU's defaults."""
    machine_types: tuple[Word, ...] = ("pc-q35-7.2", "pc-i440fx-7.2")
    forbidden: dict[Name, Annotated[str, Meta(max_length=1024)]] = {}
    """Options that this host lacks though its profile has them, each with what forbids it, as a sysctl forbids QEMU post-copy."""
    cpu_models: tuple[str, ...] = ("qemu64", "host-model")
    host_cpu: Word = "sim"
    """The CPU that a guest with ``host-passthrough`` or ``maximum`` gets here."""
    archs: tuple[Word, ...] = ("x86_64",)
    virt_types: tuple[Word, ...] = ("kvm", "qemu")
    latencies: Latencies = Latencies()
    max_downtime: Seconds = 0.3
    call_timeout: Annotated[float, Meta(gt=0, le=3_600)] = 30.0
    """Seconds that a call may take, apart from perform and finish."""
    connect_timeout: Annotated[float, Meta(gt=0, le=3_600)] = 5.0
    """Seconds for the stream's connection and greeting."""
    peer_timeout: Annotated[float, Meta(gt=0, le=3_600)] = 30.0
    """Seconds without a word from the other end after which the stream counts as broken."""
    fail_next: dict[Name, Annotated[str, Meta(max_length=1024)]] = {}
    """The next call of that method fails with that message: ``{"prepare": "no memory"}``."""
    log_root: Annotated[str, Meta(max_length=4096)] = ""
    """The folder in which serial logs may lie; a guest with a log elsewhere is refused. Empty: no logs at all."""
    state_path: Annotated[str, Meta(max_length=4096)] = ""
    """A file that outlives the process: once it exists, it says which guests are here, and `guests` is ignored.
    Guests that ran then go on as though only the agent had died. Empty: a new process begins with `guests`."""
    control_path: Annotated[str, Meta(max_length=107)] = ""
    """A unix socket at which the users of guests start and end them (`sim.control`). Empty: none."""
