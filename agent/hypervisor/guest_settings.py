"""Settings of a guest that are kept in its definition and travel with it. Pure."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Self

from agent.network.rules import tenant_problem
from agent.runtime.wire import MOST_RATE


@dataclass(frozen=True)
class GuestSettings:
    """See `DomainSettings` of the wire. Rates in bytes per second."""

    tenant: str = ""
    min_bandwidth: int = 0
    max_bandwidth: int = 0
    unread: str = ""
    """Why the tenant cannot be read; empty: it can be, or there is none. Such a guest does not leave its host."""

    def __bool__(self) -> bool:
        return self != GuestSettings()

    @property
    def problem(self) -> str:
        """What is wrong, as text; empty: nothing."""
        if problem := tenant_problem(self.tenant):
            return problem
        if not (0 <= self.min_bandwidth <= MOST_RATE and 0 <= self.max_bandwidth <= MOST_RATE):
            return "a bandwidth is negative or too large"
        if self.max_bandwidth and self.min_bandwidth > self.max_bandwidth:
            return f"the least bandwidth, {self.min_bandwidth}, is above the most, {self.max_bandwidth}"
        return ""

    def attributes(self) -> dict[str, str]:
        """Return the settings as text, without those that are not set."""
        return {name: str(value) for name, value in asdict(self).items() if value and name != "unread"}

    @classmethod
    def of(cls, attributes: Mapping[str, str]) -> tuple[Self, str]:
        """Return the settings of such attributes, and what is wrong with those that cannot be used; each of the others counts.
        Unknown attributes are ignored."""
        tenant = attributes.get("tenant", "")
        unread = tenant_problem(tenant)
        least, most = (_number(attributes.get(name, "0")) for name in ("min_bandwidth", "max_bandwidth"))
        crossed = bool(least and most and least > most)
        settings = cls("" if unread else tenant, 0 if crossed else least or 0, most or 0, unread)
        wrong = {
            unread: unread,
            "a bandwidth is no number in range": None in (least, most),
            "the least bandwidth is above the most": crossed,
        }
        return settings, "; ".join(what for what, holds in wrong.items() if holds)


def _number(text: str) -> int | None:
    """Return the rate; None if it is none."""
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 20 else MOST_RATE + 1
    return number if number <= MOST_RATE else None
