"""What each kind of hypervisor can do, as data. A profile never appears in an `if`: behaviour reads its fields."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType

from agent.hypervisor.base import Features, Options, Support

MIB = 1 << 20

YES, ALWAYS, NO = Support.SUPPORTED, Support.ALWAYS_ON, Support.UNSUPPORTED

DEFAULTS: Mapping[str, bool] = MappingProxyType(
    {"live": True, "persist_destination": True, "undefine_source": True, "change_protection": True, "post_copy": True}
)
"""The driver's word on an option where the user said nothing; one that is missing is off."""


@dataclass(frozen=True)
class Profile:
    hypervisor: str
    """`HypervisorInfo.hypervisor`."""
    options: Mapping[str, Support]
    """Each field of `base.Options`; one that is missing is unsupported."""
    uri_transports: tuple[str, ...] = ("tcp",)
    bandwidth: bool = True
    """A limit on the rate is enforced."""
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

    def word(self, options: Options, name: str) -> bool:
        """What holds for an option: always on, else the user's word, else the default."""
        if self.options.get(name, NO) is ALWAYS:
            return True
        said: bool | None = getattr(options, name)
        return DEFAULTS.get(name, False) and self.options.get(name, NO) is YES if said is None else said

    def refusals(self, options: Options) -> list[str]:
        """A sentence for each explicit word that cannot be honoured (requirement O1)."""
        wrong = {(NO, True): "is not supported", (ALWAYS, False): "cannot be switched off"}
        said = ((option.name, getattr(options, option.name)) for option in fields(options))
        return [
            f"option {name} {wrong[key]} by {self.hypervisor}"
            for name, word in said
            if (key := (self.options.get(name, NO), word)) in wrong
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
            "abort_on_error": YES,  # a simulated guest has no disks, so it has no disk errors
            "unsafe": YES,  # nor anything unsafe to accept
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
"""libvirt with QEMU, less what the model does not have: disks, compression, several connections, TLS."""

PROFILES: Mapping[str, Profile] = MappingProxyType({"qemu": QEMU})
