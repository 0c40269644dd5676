"""Take-over by the source's agent, which drives a migration to its end when the driver goes silent (requirement A6).

Two drivers at once are harmless, so the other one need not be dead for certain. From then on the migration can be listed, watched,
cancelled and resolved at this agent."""

import asyncio
from collections.abc import Callable
from typing import Final

import structlog

from agent.admission.store import Place
from agent.handshake.host.attempt import Attempt
from agent.handshake.host.peer import OtherHost
from agent.handshake.host.records import AttemptRecord, BandwidthClaim
from agent.hypervisor.wire import options_to_proto
from agent.migration.attempts import MOST_WARNINGS
from agent.migration.migrations import Migrations
from agent.runtime.errors import DroverError
from agent.runtime.wire import duration, timestamp
from drover.agent.v1 import migration_pb2 as pb

log = structlog.get_logger()

WARNING: Final = "its driver went silent, so the source's agent drives it to its end"


OtherSide = Callable[[Attempt], OtherHost | None]
"""Returns the agent on the other side of an attempt; None if it cannot be called."""


WAITED: Final = "its driver went silent while it waited for its slots, so the source's agent goes on with it"

_OF_A_WAIT: Final = frozenset(
    {
        "migration_id",
        "spec",
        "attempt",
        "destination_host",
        "domain_name",
        "domain_uuid",
        "tenant",
        "network",
        "network_choice",
        "options",
        "settings",
        "slot_wait",
        "cancel_time",
        "warnings",
        "timings",
        "runs_on",
        "source_guest",
    }
)
"""Fields of a migration that waits for its slots."""


async def take_over_waiting(silent: "asyncio.Queue[Place]", migrations: Migrations, host: str) -> None:
    """Take over each migration of the queue, which waits for its slots, for ever."""
    while True:
        place = await silent.get()
        log.warning("taking over a migration that waits from a silent driver", migration=place.migration_id, driver=place.driver)
        try:
            migrations.take_over(waiting_taken_over(place, host))
        except DroverError as error:
            log.error("a migration that waits is not taken over", migration=place.migration_id, error=error.message)


def waiting_taken_over(place: Place, host: str) -> pb.Migration:
    """Return a migration that waits as its driver has stored it, for this host's agent as its driver. It begins with its slots, and
    waits for `slot_wait` since it has waited here at most: nothing else of what the driver says is believed."""
    migration = pb.Migration.FromString(place.pending)
    for field, _ in migration.ListFields():
        if field.name not in _OF_A_WAIT:
            migration.ClearField(field.name)  # type: ignore[arg-type]
    migration.state = pb.MIGRATION_STATE_CANCELLING if migration.HasField("cancel_time") else pb.MIGRATION_STATE_PENDING
    migration.create_time.CopyFrom(timestamp(place.since))
    migration.spec.domain, migration.spec.source_host = migration.domain_uuid, host
    migration.spec.destination_host = place.peer_agent
    migration.spec.network = migration.network  # the other driver, once it is back, goes on with the same one
    migration.source_host, migration.driver, migration.phase = host, host, "reserve"
    migration.warnings[:] = [*[each for each in migration.warnings if each != WAITED][:MOST_WARNINGS], WAITED]
    return migration


async def take_over_silent(silent: "asyncio.Queue[Attempt]", migrations: Migrations, host: str, other_side: OtherSide) -> None:
    """Take over each attempt of the queue, for ever."""
    while True:
        take_over(await silent.get(), migrations, host, other_side)


def take_over(attempt: Attempt, migrations: Migrations, host: str, other_side: OtherSide) -> None:
    """Drive an attempt of this host, the source, to its end. If the other side cannot be called, only log that."""
    record = attempt.record
    if other_side(attempt) is None:
        log.error("the driver is silent, and the destination's agent cannot be called", migration=record.migration_id)
        return
    log.warning("taking over from a silent driver", migration=record.migration_id, state=record.state, peer=record.peer_host)
    migrations.take_over(taken_over(record, host))


def taken_over(record: AttemptRecord, host: str) -> pb.Migration:
    """Return the migration of a source's record, as its driver would have stored it."""
    claim = record.claim or BandwidthClaim(record.bandwidth)
    choice = pb.NetworkChoice(network=claim.network, destination_address=record.proved)
    most = claim.most
    if claim.network_rules:
        choice.rules.MergeFromString(claim.network_rules)
    if choice.rules.cap_bytes_per_second:
        most = record.bandwidth  # what other hosts send under the cap is not known here
    return pb.Migration(
        migration_id=record.migration_id,
        spec=pb.MigrationSpec(
            domain=record.domain_uuid,
            source_host=host,
            destination_host=record.peer_agent,
            destination_name=record.destination_name,
            bandwidth_bytes_per_second=most,
            min_bandwidth_bytes_per_second=claim.least,
            importance=pb.Importance.ValueType(claim.importance),
            max_downtime=duration(record.max_downtime) if record.max_downtime else None,
            options=options_to_proto(record.user_options),
            wait_mode=pb.WAIT_MODE_WAIT,
        ),
        state=pb.MIGRATION_STATE_ACTIVE,
        attempt=record.attempt,
        source_host=host,
        destination_host=record.peer_host,
        domain_name=record.domain_name,
        domain_uuid=record.domain_uuid,
        uri=record.uri,
        network=claim.network,
        network_choice=choice,
        allotted_bytes_per_second=record.bandwidth,
        applied_bandwidth_bytes_per_second=record.bandwidth,
        warnings=[WARNING],
        driver=host,
        create_time=timestamp(record.created),
    )
