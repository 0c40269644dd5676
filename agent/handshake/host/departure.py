"""Checks whether a guest may leave this host, by asking the hypervisor, before the guest is touched."""

from typing import cast

from agent.handshake.host.attempts import Attempts
from agent.handshake.host.owner import Owner
from agent.handshake.host.phases import LocalHost, check_address
from agent.handshake.machines.facts import check_movable
from agent.hypervisor.base import Domain, HypervisorError
from agent.hypervisor.features import check_options, settled
from agent.hypervisor.options import Options
from agent.hypervisor.reasons import from_hypervisor, translated
from agent.hypervisor.wire import options_from_proto
from agent.runtime.errors import DroverError, Reason
from drover.agent.v1 import handshake_pb2 as pb
from drover.agent.v1 import host_pb2


class Departures:
    """The checks of a Begin, made before anything is done to the guest."""

    def __init__(self, host: LocalHost, attempts: Attempts, owner: Owner) -> None:
        self._host = host
        self._attempts = attempts
        self._owner = owner

    def check_request(self, request: pb.BeginRequest) -> None:
        """Check what needs no other host and no hypervisor. Raises `DroverError`."""
        self._host.check_not_draining()
        check_address(request.destination_agent, "destination_agent")
        check_options(request.options, self._host.features, f"the source {self._host.name}")

    async def check(self, request: pb.BeginRequest) -> Domain:
        """Return the guest of a Begin. Raises `DroverError` if the hypervisor does not have it or it cannot be moved now."""
        hypervisor = self._host.hypervisor
        with translated(self._host.name, request.domain or request.domain_uuid):
            if request.domain_uuid:
                domain = await hypervisor.get_domain(request.domain_uuid)
            else:
                domain = (await hypervisor.describe(request.domain))[0]
        self._check_movable(domain)
        return domain

    async def settle(self, uuid: str, name: str) -> None:
        """Wait for the work that earlier migrations left to do for the guest. Raises DOMAIN_BUSY, DECLARED_DEAD."""
        await self._attempts.wait_for_aftercare(uuid, name)
        await self._owner.ask_before_leaving(uuid)

    def _check_movable(self, domain: Domain) -> None:
        self._attempts.check_free(domain.uuid, domain.name)  # first: its error names the migration, not only the hypervisor's job
        check_movable(domain, self._host.name)

    async def check_leaving(self, domain: Domain, leaving: host_pb2.Leaving) -> None:
        """Raise the `DroverError` that Begin would raise now, as far as that can be known. Changes nothing."""
        self._check_movable(domain)
        if domain.settings is not None and domain.settings.unread:
            raise DroverError(
                Reason.INCOMPATIBLE_GUEST,
                f"guest {domain.name} does not leave {self._host.name}, as it is not known to whose networks its memory may go: "
                f"{domain.settings.unread}. Nothing was done to the guest; set its tenant anew: "
                f"`drover domain set {domain.name} --tenant TENANT`, or none",
                metadata={"domain": domain.name},
            )
        options = cast(Options, options_from_proto(settled(leaving.options, self._host.features)))
        try:
            await self._host.hypervisor.check_leaving(domain.uuid, options, leaving.destination_name)
        except HypervisorError as error:
            ours = from_hypervisor(error, self._host.name)
            text = f"guest {domain.name} cannot leave {self._host.name}: {error}. Nothing was done to the guest"
            raise DroverError(ours.reason, text, metadata=ours.metadata) from None
