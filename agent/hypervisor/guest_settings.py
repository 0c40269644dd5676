"""Settings of a guest that are kept in its definition and travel with it. Pure."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Final, Self

MOST_TENANT_BYTES: Final = 253
MOST_BANDWIDTH: Final = 2**63 - 1


@dataclass(frozen=True)
class GuestSettings:
    """See `DomainSettings` of the wire. Rates in bytes per second."""

    tenant: str = ""
    min_bandwidth: int = 0
    max_bandwidth: int = 0

    def __bool__(self) -> bool:
        return self != GuestSettings()

    @property
    def problem(self) -> str:
        """What is wrong, as text; empty: nothing."""
        if self.tenant != self.tenant.strip() or not self.tenant.isprintable():
            return "the tenant has characters that cannot be printed, or spaces around it"
        if len(self.tenant.encode()) > MOST_TENANT_BYTES:
            return f"the tenant has more than {MOST_TENANT_BYTES} bytes"
        if not (0 <= self.min_bandwidth <= MOST_BANDWIDTH and 0 <= self.max_bandwidth <= MOST_BANDWIDTH):
            return "a bandwidth is negative or too large"
        if self.max_bandwidth and self.min_bandwidth > self.max_bandwidth:
            return f"the least bandwidth, {self.min_bandwidth}, is above the most, {self.max_bandwidth}"
        return ""

    def attributes(self) -> dict[str, str]:
        """Return the settings as text, without those that are not set."""
        return {name: str(value) for name, value in asdict(self).items() if value}

    @classmethod
    def of(cls, attributes: Mapping[str, str]) -> Self:
        """Return the settings of such attributes; others are ignored. Raises `ValueError` for what `problem` names, or no number."""
        rates = {name: _number(attributes[name]) for name in ("min_bandwidth", "max_bandwidth") if name in attributes}
        settings = cls(attributes.get("tenant", ""), **rates)
        if problem := settings.problem:
            raise ValueError(problem)
        return settings


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise ValueError(f'"{text[:40]}" is not a number of bytes per second')
    return int(text)
