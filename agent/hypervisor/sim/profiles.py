"""Profiles: what each kind of hypervisor can do, as data. No code branches on a profile's name, only on its fields."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType

from agent.hypervisor.base import Features, Options, Support

MIB = 1 << 20

YES, ALWAYS, NO = Support.SUPPORTED, Support.ALWAYS_ON, Support.UNSUPPORTED

DEFAULTS: Mapping[str, bool] = MappingProxyType(
    {"live": True, "persist_destination": True, "undefine_source": True, "change_protection": True, "post_copy": True}
)
"""The driver's default for an option that the user did not set; one that is missing is off."""


@dataclass(frozen=True)
class Profile:
    hypervisor: str
    """Value of `HypervisorInfo.hypervisor`."""
    options: Mapping[str, Support]
    """Support for each field of `base.Options`; one that is missing is unsupported."""
    uri_transports: tuple[str, ...] = ("tcp",)
    bandwidth: bool = True
    """A limit on the transfer's rate is enforced."""
    split_phases: bool = True

    def features(self, ports: tuple[int, int], forbidden: Mapping[str, str]) -> Features:
        return Features(
            bandwidth_unit=MIB,
            options={**self.options, **dict.fromkeys(forbidden, NO)},
            reasons=forbidden,
            uri_transports=self.uri_transports,
            ports=ports,
            bandwidth=self.bandwidth,
            split_phases=self.split_phases,
        )

    def effective(self, options: Options, name: str) -> bool:
        """Return the value in effect for an option: on if it is always on, else the user's choice, else the default."""
        if self.options.get(name, NO) is ALWAYS:
            return True
        chosen: bool | None = getattr(options, name)
        return DEFAULTS.get(name, False) and self.options.get(name, NO) is YES if chosen is None else chosen

    def refusals(self, options: Options) -> list[str]:
        """Return a sentence for each option that the user set to a value that this hypervisor does not support (requirement O1)."""
        wrong = {(NO, True): "is not supported", (ALWAYS, False): "cannot be switched off"}
        choices = ((option.name, getattr(options, option.name)) for option in fields(options))
        return [
            f"option {name} {wrong[key]} by {self.hypervisor}"
            for name, choice in choices
            if (key := (self.options.get(name, NO), choice)) in wrong
        ]


QEMU = Profile(
    hypervisor="sim QEMU",
    options=MappingProxyType(
        {
            "live": YES,
            "persist_destination": YES,
            "undefine_source": YES,
            "paused": YES,
            "offline": YES,
            "change_protection": YES,
            "abort_on_error": YES,  # has no effect: a simulated guest has no disk errors
            "unsafe": YES,
            "auto_converge": YES,
            "post_copy": YES,
            "copy_storage": NO,
            "compressed": NO,
            "parallel": NO,
            "tunnelled": NO,
            "rdma": NO,
            "encrypted": NO,
        }
    ),
)
"""libvirt with QEMU, without what the simulator does not have: disks, compression, several connections, TLS."""

PROFILES: Mapping[str, Profile] = MappingProxyType({"qemu": QEMU})
