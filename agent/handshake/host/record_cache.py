"""A cache of the records that other agents answered this process with in the last seconds, to save asking them again."""

import time
from typing import Final

from agent.handshake.host.records import AttemptRecord
from drover.agent.v1 import handshake_pb2 as pb

FRESH_SECONDS: Final = 2.0
"""Maximum age of a cached answer. Long enough: a source that drives its own migration makes its next call right after an answer."""

_KEPT: Final = 64
"""Maximum number of cached answers, at most 1 MiB each; the oldest are dropped first."""


class RecordCache:
    """The last record from each address, by attempt. Only answers to calls of this process: a caller could claim anything."""

    def __init__(self) -> None:
        self._records: dict[tuple[str, str, int], tuple[float, pb.Record]] = {}

    def note(self, address: str, ref: pb.AttemptRef, record: pb.Record | None) -> None:
        """Store the record that the agent at `address` answered with; None forgets it. Ignores an older revision than the stored."""
        key = (address, ref.migration_id, ref.attempt)
        known = self._records.pop(key, None)
        if record is None:
            return
        if known is not None and known[1].revision > record.revision:
            self._records[key] = known
            return
        self._records[key] = (time.monotonic(), record)
        if len(self._records) > _KEPT:
            del self._records[next(iter(self._records))]

    def of(self, ours: AttemptRecord) -> pb.Record | None:
        """Return the other host's record of an attempt if its agent sent it within `FRESH_SECONDS`; else None."""
        heard_at, record = self._records.get((ours.peer_agent, *ours.key), (float("-inf"), None))
        return record if time.monotonic() - heard_at <= FRESH_SECONDS else None
