"""Whose the guest is: what a destination asks its source when nobody tells it."""

import asyncio
from collections.abc import Callable
from typing import Any, Final

import structlog

from agent.errors import DroverError, Reason
from agent.handshake.attempt import Attempt
from agent.handshake.attempts import Attempts
from agent.handshake.destination import DestinationEvent, DestinationState
from agent.handshake.peer import HandshakePeer
from agent.handshake.phases import LocalHost, look_up
from agent.handshake.records import OperatorWord
from drover.agent.v1 import handshake_pb2 as pb

log = structlog.get_logger()

OWNER_SECONDS: Final = 5.0
"""Between two questions to a source whose record has not ended."""


class Owner:
    """Asks the sources of guests that come, or came, to this host."""

    def __init__(self, host: LocalHost, attempts: Attempts, source_of: Callable[[Attempt], HandshakePeer | None]) -> None:
        self._host = host
        self._attempts = attempts
        self._source_of = source_of

    async def ask_kept(self, attempt: Attempt) -> None:
        """An armed copy that hears nothing: the stream may never have come. The source's word that it kept the guest ends it."""
        try:
            record = await self._source_record(attempt)
            if record is not None and record.state == pb.RECORD_STATE_KEPT:
                await attempt.report(DestinationEvent.ABANDON_SOURCE_KEPT, **self._word_in(record))
        except DroverError as error:
            log.info("the source does not say", migration=attempt.record.migration_id, error=error.message)

    def watch(self, attempt: Attempt, *, after: float) -> None:
        """A guest that runs here: ask, `after` so many seconds, whether an operator's word took it from this host, until its
        source's record has ended. So a host that was declared dead learns it, rightly or not.
        """
        attempt.start("owner", self._watch(attempt, after))

    async def _watch(self, attempt: Attempt, after: float) -> None:
        await asyncio.sleep(after)
        while attempt.record.state == DestinationState.RUNNING and not self._attempts.superseded(attempt):
            if await look_up(self._host, attempt) is None:
                return
            try:
                if await self._has_learned(attempt):
                    return
            except DroverError as error:
                if error.reason in (Reason.RECORD_NOT_FOUND, Reason.STALE_ATTEMPT):
                    return
            await asyncio.sleep(OWNER_SECONDS)

    async def _has_learned(self, attempt: Attempt) -> bool:
        """Whether the source's word is final."""
        record = await self._source_record(attempt)
        if record is None:
            return True
        word = self._word_in(record)
        if word and record.state in (pb.RECORD_STATE_RESUMING, pb.RECORD_STATE_KEPT):
            log.error("this host was declared dead; its copy is disowned", migration=attempt.record.migration_id)
            await attempt.report(DestinationEvent.DISOWNED, **word)
            return True
        return record.state in (pb.RECORD_STATE_REMOVED, pb.RECORD_STATE_KEPT)

    async def _source_record(self, attempt: Attempt) -> pb.Record | None:
        """None where the address of the source's agent was not told. Raises what keeps it from saying."""
        source = self._source_of(attempt)
        if source is None:
            return None
        return (await source.get_record(pb.GetRecordRequest(ref=attempt.record.ref))).record

    def _word_in(self, source: pb.Record) -> dict[str, Any]:
        """What an operator's word in the source's record says about this host."""
        if source.operator_word.dead_host != self._host.name:
            return {}
        word = OperatorWord.of(source.operator_word)
        return {"failure": word.failure(), "operator_word": word}
