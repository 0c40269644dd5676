"""The one table of options: what each is, and what each driver does about it.

The wire, the client, the command line, the drivers and docs/protocol.md take names, types, bounds and defaults from here, or are
compared with it by a test. To add an option: its field in drover/agent/v1/options.proto, and its row in `Options`.
Imports nothing heavy, because the command line reads it.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Final, NamedTuple, TypedDict

Value = bool | int | str
"""Of a switch, a number or a choice."""


class Support(StrEnum):
    """What a driver does about an option (requirement H4)."""

    SUPPORTED = "supported"
    ALWAYS_ON = "always_on"
    """The driver always does it; an explicit "off" is refused."""
    UNSUPPORTED = "unsupported"
    """The driver cannot do it; an explicit value other than "off" is refused."""
    UNDONE = "undone"
    """The hypervisor always does it, and Finish or Confirm undoes it where the user chose "off". On the wire: supported."""


class Option(NamedTuple):
    """A row of the table."""

    text: str
    default: Value | None = False
    """Value that a driver uses where the user chose none. None: the driver decides."""
    needs: str = ""
    """What an end must have for it, in addition to a driver that supports it."""
    only_if_both: bool = False
    """It is on by default only where both ends support it."""
    libvirt: str = ""
    """Name of libvirt's flag. Empty: the libvirt driver does not support the option."""
    sim: Mapping[str, Support] = {}
    """By profile of the `sim` driver. One that is missing does not support the option."""
    blocked: str = ""
    """Why no agent offers it yet, whatever its driver supports."""
    choices: tuple[str, ...] = ()
    """The values of a choice."""
    bounds: tuple[int, int] = (1, 1)
    """Lowest and highest value of a number. The lowest is at least 1: 0 on the wire is a number that was not chosen."""
    unit: str = ""
    """Unit of a number."""
    name: str = ""
    """Name of its field on the wire. The table sets this and `kind`."""
    kind: type[Value] = bool

    @property
    def typed(self) -> tuple[str, ...]:
        """Return the values that a user may type; for a number, only the lowest and the highest."""
        if self.kind is bool:
            return ("on", "off")
        return self.choices or tuple(map(str, self.bounds))

    @property
    def expected(self) -> str:
        """Return the allowed values as text, such as ``on or off``."""
        if self.kind is int:
            return f"{self.bounds[0]} to {self.bounds[1]} {self.unit}".strip()
        return f"{', '.join(self.typed[:-1])} or {self.typed[-1]}"

    def problem(self, value: object) -> str:
        """Return what is wrong with a value, as text to follow the name of the option; empty if nothing is."""
        good = type(value) is self.kind
        if isinstance(value, str):
            good = good and value in self.choices
        elif good and self.kind is int:
            good = value in range(self.bounds[0], self.bounds[1] + 1)
        return "" if good else f"expected {self.expected}"

    def read(self, text: str) -> Value:
        """Convert what a user typed to a value. Raises `ValueError`."""
        value: Value = int(text) if self.kind is int else text if self.kind is str else _SWITCH.get(text.lower(), text)
        if problem := self.problem(value):
            raise ValueError(problem)
        return value


_SWITCH: Final = {"on": True, "true": True, "yes": True, "off": False, "false": False, "no": False}

_QEMU: Final = {"qemu": Support.SUPPORTED}


class Options(TypedDict, total=False):
    """The options that a user chose: the same form in the client, the record and the drivers. One that is missing was not chosen,
    and the driver's default holds (requirement O1).
    """

    live: Annotated[
        bool,
        Option(
            "Guest CPUs run during the transfer. Off: the guest is paused for all of it.",
            default=True,
            libvirt="VIR_MIGRATE_LIVE",
            sim=_QEMU,
        ),
    ]
    persist_destination: Annotated[
        bool,
        Option(
            "The definition is stored at the destination. By default not for a transient guest.",
            default=True,
            libvirt="VIR_MIGRATE_PERSIST_DEST",
            sim=_QEMU,
        ),
    ]
    undefine_source: Annotated[
        bool, Option("The definition is removed from the source.", default=True, libvirt="VIR_MIGRATE_UNDEFINE_SOURCE", sim=_QEMU)
    ]
    paused: Annotated[
        bool,
        Option(
            "Not resumed on arrival. A guest that its user had paused always arrives paused.",
            libvirt="VIR_MIGRATE_PAUSED",
            sim=_QEMU,
        ),
    ]
    offline: Annotated[
        bool,
        Option("Only the definition of a stopped guest moves.", blocked="the handshake has no way around Perform", sim=_QEMU),
    ]
    change_protection: Annotated[
        bool,
        Option("Device changes are locked out from Begin on.", default=True, libvirt="VIR_MIGRATE_CHANGE_PROTECTION", sim=_QEMU),
    ]
    abort_on_error: Annotated[
        bool,
        Option(
            "A disk I/O error of the guest during the transfer aborts the migration.",
            libvirt="VIR_MIGRATE_ABORT_ON_ERROR",
            sim=_QEMU,
        ),
    ]
    unsafe: Annotated[
        bool, Option("Accept a disk that the hypervisor believes not to be shared.", libvirt="VIR_MIGRATE_UNSAFE", sim=_QEMU)
    ]
    copy_storage: Annotated[bool, Option("Copy the disks that are not shared.", default=None)]
    auto_converge: Annotated[
        bool,
        Option(
            "Throttle the guest's CPUs when it dirties memory faster than the network takes it.",
            libvirt="VIR_MIGRATE_AUTO_CONVERGE",
            sim=_QEMU,
        ),
    ]
    post_copy: Annotated[
        bool,
        Option(
            "Arm the switch to post-copy. Off: never, for this guest.",
            default=True,
            only_if_both=True,
            needs="destination: QEMU may use userfaultfd",
            libvirt="VIR_MIGRATE_POSTCOPY",
            sim=_QEMU,
        ),
    ]
    compressed: Annotated[bool, Option("Compress memory pages.")]
    parallel: Annotated[bool, Option("Several connections for the stream.")]
    tunnelled: Annotated[bool, Option("The stream goes through the hypervisor daemons' own connection.")]
    rdma: Annotated[bool, Option("The stream goes over RDMA.", needs="both: an RDMA device")]
    encrypted: Annotated[bool, Option("TLS on the stream.", default=None, needs="both: certificates")]
    compression_method: Annotated[str, Option("Method of compression.", default=None, choices=("mt", "xbzrle", "zlib", "zstd"))]
    parallel_connections: Annotated[int, Option("Number of connections with `parallel`.", default=None, bounds=(1, 255))]


OPTIONS: Final[Mapping[str, Option]] = {
    name: hint.__metadata__[0]._replace(name=name, kind=hint.__origin__) for name, hint in Options.__annotations__.items()
}
"""The table, in the order of the wire."""


def shown(value: Value) -> str:
    """Return a value as a user types it."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def unknown_option(name: str) -> str:
    """Return the error message for an option that does not exist."""
    import difflib  # noqa: PLC0415 - only a mistake needs it

    close = difflib.get_close_matches(name, OPTIONS, n=1)
    return f'unknown option "{name}"; ' + (f'did you mean "{close[0]}"?' if close else f"known: {', '.join(OPTIONS)}")
