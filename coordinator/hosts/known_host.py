"""One host as this coordinator knows it, and what a word of its agent changes in that."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from agent.runtime.errors import DroverError, Reason
from agent.runtime.seldom import Seldom
from coordinator.hosts.host_link import HostLink, Word
from drover.agent.v1 import host_pb2 as agent_pb
from drover.coordinator.v1 import host_pb2 as pb

LAST_SEEN_SECONDS: Final = 60.0
"""The store's `last_seen_time` of a host that is up is at most so old."""
RETRY_SECONDS: Final = 1.0
"""After so long a caller may ask again, and a write to the store that failed is tried again."""


@dataclass
class KnownHost:
    known: pb.ClusterHost
    mod_revision: int
    """Of its key in the store."""
    saved: float
    """When it was last saved, by the monotonic clock."""
    link: HostLink
    heard_at: float | None = None
    """When it was last heard of, by the monotonic clock. None: not in this life of the coordinator."""
    rivals: frozenset[str] = frozenset()
    """Other coordinators that claim it, as last told."""
    named_rivals: frozenset[str] = frozenset()
    """Those of them that the log has named."""
    warnings: Seldom = field(default_factory=Seldom)
    """About its rivals."""

    @property
    def name(self) -> str:
        return self.known.host.name

    @property
    def up(self) -> bool:
        return self.known.state == pb.HOST_STATE_UP

    def is_same_agent(self, host: agent_pb.Host, address: str) -> bool:
        return self.known.host.host_uuid == host.host_uuid and self.known.agent_address == address

    def check_identity(self, host: agent_pb.Host) -> None:
        """Raises HOST_UNREACHABLE where another host answers at its address."""
        if (host.name, host.host_uuid) != (self.name, self.known.host.host_uuid):
            raise DroverError(
                Reason.HOST_UNREACHABLE,
                f"host {host.name} ({host.host_uuid}) answers at the address of {self.name} ({self.known.host.host_uuid})",
            )

    def unreachable(self) -> DroverError:
        return DroverError(
            Reason.HOST_UNREACHABLE,
            f"the agent of {self.name} at {self.known.agent_address} does not answer; its guests may well run: look at the "
            "agent and at the network between it and the coordinator",
            metadata={"host": self.name, "peer": self.known.agent_address},
            retry_after=RETRY_SECONDS,
        )


def heard(known: pb.ClusterHost, word: Word, wall: float) -> pb.ClusterHost:
    """The host after a word of its agent that came when the wall clock said so. Pure."""
    after = pb.ClusterHost(host=word.host, agent_address=known.agent_address, state=pb.HOST_STATE_UP)
    after.last_seen_time.FromNanoseconds(int(wall * 1e9))
    if word.send_time_ns:
        after.clock_skew.FromNanoseconds(word.send_time_ns - int(wall * 1e9))
    return after


def shown(entry: KnownHost, monotonic: float, wall: float) -> pb.ClusterHost:
    """A copy, for an answer at that moment. Pure."""
    host = pb.ClusterHost()
    host.CopyFrom(entry.known)
    by_wall = wall - entry.known.last_seen_time.ToNanoseconds() / 1e9
    age = by_wall if entry.heard_at is None else monotonic - entry.heard_at
    if entry.link.connected and not entry.link.repeats:
        age = 0.0  # an agent of an older version, whose watch stands
    host.last_seen_by_wall_clock = entry.heard_at is None
    host.last_seen_age.FromNanoseconds(int(max(0.0, age) * 1e9))
    return host


def is_worth_saving(before: pb.ClusterHost, after: pb.ClusterHost, saved_ago: float) -> bool:
    """Times alone are saved now and then only. Pure."""
    return (before.host, before.state) != (after.host, after.state) or saved_ago >= LAST_SEEN_SECONDS


def find(hosts: Mapping[str, KnownHost], name: str) -> KnownHost:
    """Raises HOST_NOT_FOUND."""
    if name not in hosts:
        raise DroverError(
            Reason.HOST_NOT_FOUND,
            f'no host "{name}" has registered; `drover host list` shows those that have',
            metadata={"host": name},
        )
    return hosts[name]
