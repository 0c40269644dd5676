"""The source's agent is autonomous (requirement A6): when the driver of a migration goes silent, it drives the rest itself.

Two drivers at once are harmless, so nobody has to be sure that the other one is dead. What is taken over is a migration of this
agent from then on: it can be listed, watched, cancelled and resolved here.
"""

from typing import Final

import structlog

from agent.handshake.host.attempt import Attempt
from agent.handshake.host.peer import OtherHost
from agent.handshake.host.records import AttemptRecord, options_to_proto, timestamp
from agent.migration.migrations import Migrations
from agent.service.handshake_service import RemotePeer
from agent.service.peers import Channels
from drover.agent.v1 import migration_pb2 as pb

log = structlog.get_logger()

WARNING: Final = "its driver went silent, so the source's agent drives it to its end"


class TakeOver:
    """Whom the engine tells that a driver is silent, and asks for the other side. `migrations` is set once there is an engine."""

    def __init__(self, host: str, channels: Channels) -> None:
        self.migrations: Migrations | None = None
        self._host = host
        self._channels = channels

    def __call__(self, attempt: Attempt) -> None:
        record = attempt.record
        if self.migrations is None:
            return
        if self.other_side(attempt) is None:
            log.error("the driver is silent, and the destination's agent cannot be asked", migration=record.migration_id)
            return
        log.warning("taking over from a silent driver", migration=record.migration_id, state=record.state, peer=record.peer_host)
        self.migrations.take_over(taken_over(record, self._host))

    def other_side(self, attempt: Attempt) -> OtherHost | None:
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


def taken_over(record: AttemptRecord, host: str) -> pb.Migration:
    """The migration of a source's record, as its driver would have kept it."""
    return pb.Migration(
        migration_id=record.migration_id,
        spec=pb.MigrationSpec(
            domain=record.domain_uuid,
            source_host=host,
            destination_host=record.peer_agent,
            destination_name=record.destination_name,
            bandwidth_bytes_per_second=record.bandwidth,
            options=options_to_proto(record.options),
        ),
        state=pb.MIGRATION_STATE_ACTIVE,
        attempt=record.attempt,
        source_host=host,
        destination_host=record.peer_host,
        domain_name=record.domain_name,
        domain_uuid=record.domain_uuid,
        uri=record.uri,
        warnings=[WARNING],
        driver=host,
        create_time=timestamp(record.created),
    )
