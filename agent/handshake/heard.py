"""What other agents have answered this process lately: as good as asking them again."""

import time
from typing import Final

from agent.handshake.records import AttemptRecord
from drover.agent.v1 import handshake_pb2 as pb

FRESH_SECONDS: Final = 2.0
"""A source that drives its own migration makes the next call with an answer at once. What is older is asked for."""

_KEPT: Final = 64
"""Answers, at most 1 MiB each; more are forgotten, and asked for."""


class Heard:
    """The last record that came from each address, by attempt. Only answers to calls of this process: whoever calls it could claim
    anything."""

    def __init__(self) -> None:
        self._records: dict[tuple[str, str, int], tuple[float, pb.Record]] = {}

    def note(self, address: str, ref: pb.AttemptRef, record: pb.Record | None) -> None:
        """An agent at that address has answered with its record of an attempt. None: it gave none, and nothing is known.
        An answer that was overtaken by a newer one changes nothing.
        """
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
        """The record of the other host of an attempt, as its agent told it within the last seconds."""
        heard_at, record = self._records.get((ours.peer_agent, *ours.key), (float("-inf"), None))
        return record if time.monotonic() - heard_at <= FRESH_SECONDS else None
