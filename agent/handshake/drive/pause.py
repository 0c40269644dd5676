"""Makes a driver wait for the aftercare of a guest whose user paused it during the transfer.

A hypervisor forgets that pause: the guest runs for a moment where it arrives, or stays, until the agent there has paused it again
(`aftercare`). So the state that is shown at the end is the one after that.
"""

import asyncio
import contextlib
from typing import Final

from agent.handshake.drive.driver import Driver
from agent.handshake.machines.destination import DestinationState
from drover.agent.v1 import handshake_pb2 as pb

PAUSE_SECONDS: Final = 5.0
"""Deadline. An agent has paused the guest by then, unless its hypervisor does not answer or its user resumed the guest."""

ASK_SECONDS: Final = 0.1


async def see_pause(driver: Driver) -> None:
    """Ask the host that has the guest, after the end of the attempt, until the guest does not run there; at most `PAUSE_SECONDS`.
    Returns at once if the user has not paused it.
    """
    records = (driver.view.source_record, driver.view.destination_record)
    if not any(record is not None and record.paused_by_user for record in records):
        return
    arrived = driver.view.destination_state is DestinationState.RUNNING
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(PAUSE_SECONDS):
            while _runs(driver.view.destination_record if arrived else driver.view.source_record):
                await driver.clock.sleep(ASK_SECONDS)
                await driver.answers("destination" if arrived else "source")


def _runs(record: pb.Record | None) -> bool:
    return record is not None and record.guest.state == pb.GUEST_STATE_RUNNING
