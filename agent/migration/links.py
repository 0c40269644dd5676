"""Notices when the networks of a host change at which migrations wait, or it is cordoned, so that they are planned again at once."""

from collections.abc import Mapping
from typing import Final

from agent.handshake.drive.ends import Directory
from agent.migration.collection import Collection
from agent.runtime.backoff import Clock
from drover.agent.v1 import host_pb2

LEAST_PAUSE: Final = 0.2
"""Seconds between two looks: hosts report every change of their slots, too."""

State = tuple[bytes, ...]


def links_of(host: host_pb2.Host | None) -> State:
    """Return what counts of a host for those that wait there, for comparison."""
    if host is None:
        return ()
    return (str(host.settings.cordoned).encode(), *(network.SerializeToString(deterministic=True) for network in host.networks))


async def watch_links(collection: Collection, directory: Directory, clock: Clock) -> None:
    """Look at every change, for ever."""
    while True:
        changed = directory.changed.next
        look(collection, directory)
        await changed.wait()
        await clock.sleep(LEAST_PAUSE)


def look(collection: Collection, directory: Directory) -> None:
    """Let the entries that wait be planned again at once, if the networks of one of their hosts have changed."""
    waiting = [entry for entry in collection.all() if entry.waits]
    names = {name for entry in waiting for name in (entry.migration.source_host, entry.migration.destination_host)}
    states: Mapping[str, State] = {name: links_of(directory.known(name)) for name in names}
    for entry in waiting:
        now = states[entry.migration.source_host], states[entry.migration.destination_host]
        if entry.planned_links != now:
            entry.planned_links = now
            entry.planned_at = float("-inf")
            entry.links_changed.ring()
