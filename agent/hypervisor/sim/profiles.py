"""Profiles: what each kind of hypervisor can do, as data. No code branches on a profile's name, only on its fields."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from agent.hypervisor.base import Features
from agent.hypervisor.options import OPTIONS, Options, Support

MIB = 1 << 20

ALWAYS, NO = Support.ALWAYS_ON, Support.UNSUPPORTED


@dataclass(frozen=True)
class Profile:
    hypervisor: str
    """Value of `HypervisorInfo.hypervisor`."""
    options: Mapping[str, Support]
    """Support for each option of the table."""
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
        """Return the value in effect for a switch: on if it is always on, else the user's choice, else the default."""
        support = self.options[name]
        return support is ALWAYS or bool(options.get(name, OPTIONS[name].default if support is not NO else False))

    def refusals(self, options: Options) -> list[str]:
        """Return a sentence for each option that the user set to a value that this hypervisor does not support (requirement O1)."""
        wrong = {(NO, True): "is not supported", (ALWAYS, False): "cannot be switched off"}
        return [
            f"option {name} {wrong[key]} by {self.hypervisor}"
            for name, chosen in options.items()
            if (key := (self.options[name], bool(chosen))) in wrong
        ]


def _profile(name: str, hypervisor: str) -> Profile:
    return Profile(hypervisor, MappingProxyType({option.name: option.sim.get(name, NO) for option in OPTIONS.values()}))


PROFILES: Mapping[str, Profile] = MappingProxyType({"qemu": _profile("qemu", "sim QEMU")})
"""By the name that the table of options knows. ``qemu``: libvirt with QEMU, less what the model does not have (disks, compression,
several connections, TLS).
"""
