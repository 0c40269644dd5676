"""Restores settings of a guest after its migration has ended on this host. Retried until it succeeds, also after a restart.

- Autostart. While it is undecided where a guest runs, it must not start with either host: a host that reboots then would
  make a second copy. So the source switches autostart off at Begin, before anything leaves, and the host on which the guest
  stays switches it on again: the destination after the commit, the source after the abort.
- A pause by the guest's user during the transfer. The hypervisor forgets it and lets the guest run at the destination, or
  again here.
"""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Final

import structlog

from agent.handshake.host.attempt import Attempt, retry
from agent.handshake.host.attempts import AFTERCARE
from agent.handshake.host.peer import HandshakePeer
from agent.handshake.host.peer_record import NO_RECORD, differs
from agent.handshake.host.phases import LocalHost, see
from agent.handshake.host.records import Role
from agent.handshake.machines.destination import DestinationEffect, DestinationState
from agent.handshake.machines.source import SourceEffect, SourceState
from agent.hypervisor.base import DomainNotFound
from agent.hypervisor.interface import Outgoing
from agent.runtime.backoff import OTHER_HOST, Pauses
from agent.runtime.errors import DroverError
from drover.agent.v1 import handshake_pb2 as pb

log = structlog.get_logger()

ASK_SECONDS: Final = 30.0
"""For how long the source is asked whether the guest was paused there. After that the guest goes on: its user has seen it run."""

_KEEPS_GUEST: Final = {Role.SOURCE: SourceState.KEPT, Role.DESTINATION: DestinationState.RUNNING}


def pause_seen(attempt: Attempt, session: Outgoing) -> dict[str, object]:
    """Return the changes of the source's record once the guest's user has paused it during the transfer; else none."""
    return {"paused_by_user": True, "aftercare": True} if session.paused_by_user and not attempt.record.paused_by_user else {}


async def note_pause(attempt: Attempt, session: Outgoing) -> None:
    """Record such a pause while the transfer still runs. Ignores an error: the end of the transfer records it again."""
    if seen := pause_seen(attempt, session):
        with contextlib.suppress(DroverError):
            await attempt.note(**seen)


class Aftercare:
    """The work that is left to do for attempts that have ended here. `source_of` gives the agent of an attempt's source."""

    def __init__(self, host: LocalHost, source_of: Callable[[Attempt], HandshakePeer | None]) -> None:
        self._host = host
        self._source_of = source_of

    def start(self, attempt: Attempt) -> None:
        """Start the work for an attempt that has ended, if its record says that some is left."""
        if attempt.record.aftercare and not attempt.running(AFTERCARE):
            attempt.start(AFTERCARE, self._care(attempt))

    async def _care(self, attempt: Attempt) -> None:
        paused = attempt.record.paused_by_user
        if attempt.record.state == _KEEPS_GUEST[attempt.record.role]:
            paused, _ = await asyncio.gather(self._pause(attempt), self._autostart(attempt))

        async def note() -> None:
            await attempt.note(aftercare=False, paused_by_user=paused)

        await retry(attempt, "recording that the guest is settled", note)

    async def _autostart(self, attempt: Attempt) -> None:
        await attempt.ended(*SourceEffect, *DestinationEffect)  # each may hold a libvirt job on the guest
        record = attempt.record

        async def switch() -> None:
            with contextlib.suppress(DomainNotFound):
                await self._host.hypervisor.set_autostart(record.domain_uuid, record.autostart)

        await retry(attempt, f"switching the guest's autostart {'on' if record.autostart else 'off'}", switch)

    async def _pause(self, attempt: Attempt) -> bool:
        """Pause the guest again if its user had paused it. Return whether he had."""
        if attempt.record.role is Role.SOURCE:
            await attempt.ended(*SourceEffect)
            paused = attempt.record.paused_by_user
        else:
            paused = await self._was_paused(attempt)
        if not paused:
            return False

        async def suspend() -> None:
            with contextlib.suppress(DomainNotFound):
                await self._host.hypervisor.suspend(attempt.record.domain_uuid)

        await retry(attempt, "pausing the guest, as its user did during the transfer", suspend)
        await see(self._host, attempt)
        log.info("paused, as its user did during the transfer", migration=attempt.record.migration_id)
        return True

    async def _was_paused(self, attempt: Attempt) -> bool:
        """Ask the source whether the user paused the guest: certain once its Perform has ended. False after `ASK_SECONDS`."""
        source = self._source_of(attempt)
        if source is None:
            return False
        pauses = Pauses(OTHER_HOST, self._host.clock)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ASK_SECONDS):
                while True:
                    try:
                        async for response in source.watch_record(pb.WatchRecordRequest(ref=attempt.record.ref)):
                            if wrong := differs(attempt.record, response.record, self._host.name, unnamed=True):
                                log.warning("not the source's record", migration=attempt.record.migration_id, why=wrong)
                                return False
                            if response.record.paused_by_user:
                                return True
                            if response.record.state != pb.RECORD_STATE_PERFORMING:
                                return False
                    except DroverError as error:
                        if error.reason in NO_RECORD:
                            return False
                    await pauses.pause()
        return False
