"""The source's agent is autonomous (requirement A6): when the driver of a migration goes silent, it drives the rest itself.

Two drivers at once are harmless, so nobody has to be sure that the other one is dead.
"""

import asyncio

import structlog

from agent.handshake.attempt import Attempt
from agent.handshake.driver import Driver
from agent.handshake.engine import Engine
from agent.handshake.peer import HandshakePeer
from agent.peers import Channels
from agent.service.handshake_service import RemotePeer
from drover.agent.v1 import handshake_pb2 as pb

log = structlog.get_logger()


class TakeOver:
    """Starts at most one driver for each attempt of this host."""

    def __init__(self, channels: Channels) -> None:
        self.engine: Engine | None = None
        self._channels = channels
        self._tasks: dict[Attempt, asyncio.Task[None]] = {}

    def __call__(self, attempt: Attempt) -> None:
        if attempt in self._tasks or self.engine is None:
            return
        record = attempt.record
        peer = self.other_side(attempt)
        if peer is None:
            log.error("the driver is silent, and the destination's agent cannot be asked", migration=record.migration_id)
            return
        log.warning("taking over from a silent driver", migration=record.migration_id, state=record.state, peer=record.peer_host)
        ref = pb.AttemptRef(migration_id=record.migration_id, attempt=record.attempt)
        task = asyncio.create_task(_drive(ref, self.engine, peer), name=f"take over {record.migration_id[:8]}")
        self._tasks[attempt] = task
        task.add_done_callback(lambda _: self._ended(attempt))

    def other_side(self, attempt: Attempt) -> HandshakePeer | None:
        """The agent on the other side of an attempt; None where its address was not told, or is none."""
        record = attempt.record
        if not record.peer_agent:
            return None
        try:
            self._channels.get(record.peer_agent)
        except ValueError as error:
            log.error("the other agent cannot be asked", migration=record.migration_id, host=record.peer_host, error=str(error))
            return None
        return RemotePeer(lambda: self._channels.get(record.peer_agent), record.peer_host)

    def _ended(self, attempt: Attempt) -> None:
        task = self._tasks.pop(attempt)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.critical("the take-over failed", migration=attempt.record.migration_id, exc_info=error)

    async def close(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _drive(ref: pb.AttemptRef, source: HandshakePeer, destination: HandshakePeer) -> None:
    driver = Driver(ref, source, destination, None, lambda: None)
    await driver.resume()
    await driver.run()
