"""The coordinator's entry for one host, and how a report of its agent changes it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from agent.runtime.errors import DroverError, Reason
from agent.runtime.seldom import Seldom
from coordinator.hosts.host_link import HostLink, HostReport
from drover.agent.v1 import host_pb2 as agent_pb
from drover.coordinator.v1 import host_pb2 as pb

LAST_SEEN_SECONDS: Final = 60.0
"""Largest age of the stored `last_seen_time` of a host that is up."""
RETRY_SECONDS: Final = 1.0
"""Pause before a caller should ask again, and before a failed write to the store is retried."""


@dataclass
class KnownHost:
    known: pb.ClusterHost
    mod_revision: int
    """Revision of its key in the store."""
    saved: float
    """When it was last saved, by the monotonic clock."""
    link: HostLink
    heard_at: float | None = None
    """When its agent last reported, by the monotonic clock. None: not since the coordinator started."""
    rivals: frozenset[str] = frozenset()
    """Other coordinators that claim it, by its last report."""
    named_rivals: frozenset[str] = frozenset()
    """The rivals that were logged."""
    warnings: Seldom = field(default_factory=Seldom)
    """Rate limit of the warnings about its rivals."""

    @property
    def name(self) -> str:
        return self.known.host.name

    @property
    def up(self) -> bool:
        return self.known.state == pb.HOST_STATE_UP

    def is_same_agent(self, host: agent_pb.Host, address: str) -> bool:
        return self.known.host.host_uuid == host.host_uuid and self.known.agent_address == address

    def check_identity(self, host: agent_pb.Host) -> None:
        """Raise HOST_UNREACHABLE if another host answers at its address."""
        if (host.name, host.host_uuid) != (self.name, self.known.host.host_uuid):
            raise DroverError(
                Reason.HOST_UNREACHABLE,
                f"host {host.name} ({host.host_uuid}) answers at the address of {self.name} ({self.known.host.host_uuid})",
            )

    def unreachable(self) -> DroverError:
        return DroverError(
            Reason.HOST_UNREACHABLE,
            f"the agent of {self.name} at {self.known.agent_address} does not answer; its guests may still run. Check the agent "
            f"(`systemctl status drover-agent` on {self.name}) and the network between it and the coordinator",
            metadata={"host": self.name, "peer": self.known.agent_address},
            retry_after=RETRY_SECONDS,
        )


def after_report(known: pb.ClusterHost, report: HostReport, wall: float) -> pb.ClusterHost:
    """Return the entry after a report of its agent that arrived at `wall` (Unix time in seconds). Pure."""
    after = pb.ClusterHost(host=report.host, agent_address=known.agent_address, state=pb.HOST_STATE_UP)
    after.last_seen_time.FromNanoseconds(int(wall * 1e9))
    if report.send_time_ns:
        after.clock_skew.FromNanoseconds(report.send_time_ns - int(wall * 1e9))
    return after


def shown(entry: KnownHost, monotonic: float, wall: float) -> pb.ClusterHost:
    """Return a copy of the entry for an answer at that moment, with its age. Pure."""
    host = pb.ClusterHost()
    host.CopyFrom(entry.known)
    by_wall = wall - entry.known.last_seen_time.ToNanoseconds() / 1e9
    age = by_wall if entry.heard_at is None else monotonic - entry.heard_at
    if entry.link.connected and not entry.link.repeats:
        age = 0.0  # an older agent sends no heartbeats, but its watch is open
    host.last_seen_by_wall_clock = entry.heard_at is None
    host.last_seen_age.FromNanoseconds(int(max(0.0, age) * 1e9))
    return host


def is_worth_saving(before: pb.ClusterHost, after: pb.ClusterHost, saved_ago: float) -> bool:
    """Return whether to save the entry: if only times have changed, once in `LAST_SEEN_SECONDS`. Pure."""
    return (before.host, before.state) != (after.host, after.state) or saved_ago >= LAST_SEEN_SECONDS


def find(hosts: Mapping[str, KnownHost], name: str) -> KnownHost:
    """Return the host of that name. Raises HOST_NOT_FOUND."""
    if name not in hosts:
        raise DroverError(
            Reason.HOST_NOT_FOUND,
            f'no host "{name}" is registered; `drover host list` shows the hosts',
            metadata={"host": name},
        )
    return hosts[name]
