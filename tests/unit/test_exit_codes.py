"""coordinator.cli.show: the exit code of a migration that waited, or whose path was not proved (issue 8, points 4 and 5)."""

import pytest
from google.protobuf.duration_pb2 import Duration

from agent.runtime.errors import Reason
from coordinator.cli.exit_codes import ExitCode
from coordinator.cli.show import exit_code
from coordinator.client import DroverClientError, Migration
from coordinator.client.errors import raise_unless_succeeded
from drover.agent.v1 import handshake_pb2
from drover.agent.v1 import migration_pb2 as pb

FAILED, CANCELLED = pb.MIGRATION_STATE_FAILED, pb.MIGRATION_STATE_CANCELLED


@pytest.mark.parametrize("reason", [Reason.HOST_UNREACHABLE, Reason.PATH_NOT_PROVED, Reason.NETWORK_NOT_FOUND, Reason.BUSY])
@pytest.mark.parametrize(
    ("state", "waits", "had_slot", "code"),
    [
        (FAILED, True, False, ExitCode.REFUSED),
        (FAILED, True, True, ExitCode.FAILED),
        (FAILED, False, False, ExitCode.FAILED),
        (CANCELLED, True, False, ExitCode.FAILED),
    ],
)
def test_8_4_who_waited_in_vain_was_refused_whatever_the_last_reason(
    reason: Reason, state: pb.MigrationState.ValueType, *, waits: bool, had_slot: bool, code: ExitCode
) -> None:
    migration = pb.Migration(
        state=state,
        runs_on="h1",
        source_host="h1",
        slot_wait=Duration(seconds=60) if waits else None,
        slot_duration=Duration(seconds=30) if had_slot else None,
        failure=handshake_pb2.Failure(reason=reason, message="h2 gave no slot within 60 s"),
    )
    with pytest.raises(DroverClientError) as error:
        raise_unless_succeeded(Migration.from_proto(migration))
    untouched = reason in (Reason.BUSY, Reason.PATH_NOT_PROVED)
    assert exit_code(error.value) is (ExitCode.REFUSED if untouched else code)
