"""The choice of the destination of a migration to any host: candidates are asked for a slot in their order."""

import asyncio
import contextlib
from collections.abc import Container
from dataclasses import dataclass
from typing import Final

from agent.handshake.drive.ends import Chosen, Directory, Ends
from agent.handshake.drive.slots import DIRECTION, PREPARED, TRANSFERRING, slot_request
from agent.migration.collection import Collection
from agent.migration.planning import make_plan
from agent.migration.waiting import AWAY
from agent.runtime.alongside import outlasting
from agent.runtime.errors import DroverError, Reason
from drover.agent.v1 import admission_pb2
from drover.agent.v1 import migration_pb2 as pb

NOT_THIS_HOST: Final = AWAY | {
    Reason.BUSY,
    Reason.HOST_CLOSED,
    Reason.HOST_NOT_FOUND,
    Reason.SAME_HOST,
    Reason.DOMAIN_EXISTS,
    Reason.INCOMPATIBLE_GUEST,
    Reason.OPTION_UNSUPPORTED,
    Reason.BANDWIDTH_UNSUPPORTED,
    Reason.BANDWIDTH_INSUFFICIENT,
    Reason.PROTOCOL_MISMATCH,
    Reason.SPLIT_PHASES_MISSING,
    Reason.NETWORK_NOT_FOUND,
    Reason.NETWORK_FORBIDDEN,
    Reason.URI_NOT_ALLOWED,
}
"""Errors of one destination, after which another one may do."""

_FULL: Final = frozenset({Reason.BUSY, Reason.OVERLOADED})


@dataclass(frozen=True)
class Chooser:
    """Chooses among the candidates of a directory; plans beside the migrations of a collection."""

    directory: Directory
    collection: Collection
    driver: str
    """The name of whoever drives."""

    def plan(self, migration_id: str, spec: pb.MigrationSpec, ends: Ends, *, network_later: bool = False) -> Chosen:
        """Plan a migration to the destination that the spec names. Raises as `make_plan`."""
        return Chosen(ends, *make_plan(spec, ends, self.collection.others(migration_id), network_later=network_later))

    async def first(self, migration_id: str, spec: pb.MigrationSpec, *, may_wait: bool) -> Chosen:
        """Return the named destination, or choose one. With `may_wait`, the plan for a named one has no network while none can be
        used for reasons that may pass. Raises as `Directory.find`, `plan` and `choose`."""
        if spec.destination_host:
            return self.plan(migration_id, spec, await self.directory.find(spec), network_later=may_wait)
        return await self.choose(migration_id, spec, may_wait=may_wait)

    async def choose(
        self,
        migration_id: str,
        spec: pb.MigrationSpec,
        *,
        may_wait: bool,
        without: Container[str] = (),
        only_free: bool = False,
    ) -> Chosen:
        """Return the first candidate that gives a slot; with `may_wait`, if all are busy, the best one. Hosts in `without` are left
        out, and with `only_free` those that had no slot by their last report, or give none.

        Raises BUSY (all are), NO_HOST (none can take the guest), and errors of the source and the guest."""
        best: Chosen | None = None
        kind = PREPARED if may_wait else TRANSFERRING
        refused: dict[str, DroverError] = {}
        for candidate in await self.directory.candidates(spec, self.collection.others(migration_id)):
            if candidate.name in without or (only_free and not candidate.free):
                continue
            try:
                await self._take(migration_id, spec, candidate, kind)
            except DroverError as error:
                if error.reason not in NOT_THIS_HOST:
                    raise
                refused[candidate.name] = error
                if error.reason in _FULL:
                    best = best or candidate
            else:
                return candidate
        if best is not None and may_wait and not only_free:
            return best
        raise _none_of(refused)

    async def free(self, migration_id: str, spec: pb.MigrationSpec, without: Container[str]) -> Chosen | None:
        """Return a candidate that has given a slot to a migration that waits, among those with one by their last report; None if
        there is none."""
        try:
            return await self.choose(migration_id, spec, may_wait=True, without=without, only_free=True)
        except DroverError as error:
            if error.reason in NOT_THIS_HOST | {Reason.NO_HOST}:
                return None
            raise

    async def alternatives(self, spec: pb.MigrationSpec, host: str) -> tuple[str, ...]:
        """Return hosts that could take the guest now in place of `host`, at most 8, by their last reports. Raises nothing: they are
        advice."""
        try:
            candidates = await self.directory.candidates(spec)
        except DroverError:
            return ()
        return tuple(each.name for each in candidates if each.free and each.name != host)[:8]

    async def _take(self, migration_id: str, spec: pb.MigrationSpec, chosen: Chosen, kind: admission_pb2.SlotKind.ValueType) -> None:
        request = slot_request(migration_id, "destination", chosen.plan)
        request.kind, request.importance, request.driver = kind, spec.importance, self.driver
        try:
            await chosen.ends.destination.handshake.acquire_slot(request)
        except DroverError as error:
            if error.reason is not Reason.UNIMPLEMENTED:  # an older agent: ReserveSlot will say
                raise
        except asyncio.CancelledError:
            await outlasting(self.give_back(migration_id, chosen.ends))
            raise

    async def give_back(self, migration_id: str, ends: Ends) -> None:
        """Give back the slot of a choice that is not used. On an error, its lease ends it."""
        request = admission_pb2.ReleaseSlotRequest(migration_id=migration_id, direction=DIRECTION["destination"])
        with contextlib.suppress(DroverError):
            await ends.destination.handshake.release_slot(request)


def _none_of(refused: dict[str, DroverError]) -> DroverError:
    """Return the error where no candidate took the guest."""
    why = "; ".join(f"{host}: {error.message}" for host, error in refused.items())
    busy = {host: error for host, error in refused.items() if error.reason is Reason.BUSY}
    if busy:
        retry = min((error.retry_after for error in busy.values() if error.retry_after is not None), default=None)
        first = next(iter(busy.values()))
        return DroverError(
            Reason.BUSY,
            f"no host can take the guest now ({why}). Nothing was done to the guest; try again later, or wait with --wait",
            metadata={**first.metadata, "hosts": ",".join(busy)},
            retry_after=retry,
        )
    text = f"no host can take the guest: {why or 'every other host is silent, closed or cordoned'}. Nothing was done to the guest"
    return DroverError(Reason.NO_HOST, text[:2000], metadata={"hosts": ",".join(refused)} if refused else {})
