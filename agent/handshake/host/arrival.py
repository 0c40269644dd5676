"""Checks whether a guest may come to this host, by asking the hypervisor, before anything is recorded."""

import asyncio
from collections.abc import Awaitable
from contextlib import suppress

from agent.handshake.host.phases import LocalHost, check_address, check_ports
from agent.handshake.machines.facts import check_place_is_free
from agent.hypervisor.base import Domain, DomainNotFound, DomainState
from agent.hypervisor.features import check_options, check_protocol
from agent.hypervisor.reasons import translated
from agent.hypervisor.wire import requirements_from_proto
from agent.runtime.errors import DroverError, Reason
from agent.runtime.failure import Failure
from drover.agent.v1 import handshake_pb2 as pb


async def check_arrival(host: LocalHost, request: pb.ReserveSlotRequest) -> bool:
    """Refuse what can be refused before the guest is touched. Return whether a definition of the guest is stored here.

    Raises:
        DroverError: the reason for the refusal.
    """
    here = f"the destination {host.name}"
    host.check_not_draining()
    check_address(request.source_agent, "source_agent")
    if request.protocol_version:
        check_protocol(request.protocol_version, request.protocol_version, "the caller")
    check_options(request.options, host.features, here)
    check_ports(host)
    wanted = requirements_from_proto(request.requirements)
    name = request.destination_name or wanted.name
    with translated(host.name):
        problems, by_uuid, by_name = await asyncio.gather(
            host.hypervisor.incompatibilities(wanted),
            _has_definition(host, host.hypervisor.get_domain(wanted.uuid), wanted.uuid, name),
            _has_definition(host, host.hypervisor.get_named(name), wanted.uuid, name),
        )
    if problems:
        raise DroverError(
            Reason.INCOMPATIBLE_GUEST,
            f"{here} cannot run guest {wanted.name}: {'; '.join(problems)}. Nothing was done to the guest; choose another host",
            metadata={"host": host.name, "problems": "; ".join(problems)[:900]},
        )
    return by_uuid or by_name


async def _has_definition(host: LocalHost, found: Awaitable[Domain], uuid: str, name: str) -> bool:
    try:
        domain = await found
    except DomainNotFound:
        return False
    check_place_is_free(domain, uuid, name, host.name)
    return True


async def tombstone_fields(host: LocalHost, request: pb.AbandonRequest) -> dict[str, object]:
    """Return the fields of the GONE record for an attempt that was not known here.

    The record names the guest, and so decides for its source, only where the hypervisor has no such guest, or only a stored
    definition of one that did not run here: this host's journal may have been lost.
    """
    domain = None
    with translated(host.name), suppress(DomainNotFound):
        domain = await host.hypervisor.get_domain(request.domain_uuid)
    if domain is None or (domain.state in (DomainState.SHUTOFF, DomainState.CRASHED) and not domain.has_run):
        failure = Failure(Reason.GIVEN_UP, f"the migration was given up before it reached {host.name}")
        return {"failure": failure, "domain_uuid": request.domain_uuid, "peer_host": request.source_host}
    text = (
        f"{host.name} has no record of this attempt, but guest {domain.name} is there ({domain.state}, {domain.reason}), so "
        f"{host.name} does not decide where it runs"
    )
    return {"failure": Failure(Reason.GIVEN_UP, text)}
