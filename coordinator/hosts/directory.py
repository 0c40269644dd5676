"""Turns the names of a migration into hosts of the cluster (`agent.handshake.drive.ends.Directory`)."""

import asyncio
from collections.abc import Sequence
from typing import Final

import grpc.aio

from agent.handshake.drive.ends import Ends, Side
from agent.hypervisor.base import Job
from agent.hypervisor.names import ambiguity
from agent.runtime.errors import DroverError, Reason
from agent.service.bounds import checked_answer
from agent.service.handshake_service import QUESTION_SECONDS, RemotePeer
from agent.service.peers import ask_host, leaving_request
from agent.service.status import errors_of
from coordinator.hosts.hosts import HostRegistry
from drover.agent.v1 import host_pb2, host_pb2_grpc
from drover.agent.v1 import migration_pb2 as pb
from drover.coordinator.v1.host_pb2 import HOST_STATE_UP

_ALIVE: Final = (host_pb2.DOMAIN_STATE_RUNNING, host_pb2.DOMAIN_STATE_PAUSED)

Found = Sequence[tuple[str, host_pb2.GetDomainResponse]]


class ClusterDirectory:
    """Source and destination are hosts that registered."""

    def __init__(self, registry: HostRegistry) -> None:
        self._registry = registry

    async def find(self, spec: pb.MigrationSpec) -> Ends:
        # Both hosts are asked at once; what is wrong with the source is told first.
        source, destination = await asyncio.gather(self._source(spec), self._side(spec.destination_host), return_exceptions=True)
        if isinstance(source, BaseException):
            raise source
        if isinstance(destination, BaseException):
            raise destination
        return Ends(source[0], destination, source[1])

    async def _source(self, spec: pb.MigrationSpec) -> tuple[Side, host_pb2.GetDomainResponse]:
        if spec.source_host:
            return await asyncio.gather(self._side(spec.source_host), self._guest(spec.source_host, spec))
        name, guest = await self._find_guest(spec)
        return await self._known(name), guest  # it has just answered: what it said of itself is news enough

    async def _find_guest(self, spec: pb.MigrationSpec) -> tuple[str, host_pb2.GetDomainResponse]:
        """Where the guest runs, and what is said of it there. Neither counts a definition that is shut off elsewhere, nor a copy
        that waits for its memory."""
        domain = spec.domain
        found, silent = await self._registry.find_domain(leaving_request(spec))
        if text := ambiguity(domain, [(guest.domain.name, guest.domain.uuid) for _, guest in found]):
            where = ",".join(host for host, _ in found)
            raise DroverError(Reason.DOMAIN_AMBIGUOUS, text, metadata={"domain": domain, "hosts": where})
        candidates = _alive(found)
        if not candidates and silent:
            raise DroverError(
                Reason.HOST_UNREACHABLE,
                f'no host that answers runs a guest "{domain}", and {", ".join(silent)} did not answer: it may run there. '
                "Nothing was done; `drover host list` shows the hosts",
                metadata={"domain": domain, "host": silent[0]},
            )
        candidates = candidates or found
        if len(candidates) == 1:
            return candidates[0]
        hosts = [host for host, _ in candidates]
        if not candidates:
            raise DroverError(
                Reason.DOMAIN_NOT_FOUND,
                f'no host of the cluster has a guest "{domain}"; `drover domain list` shows the guests',
                metadata={"domain": domain},
            )
        differ = len({guest.domain.uuid for _, guest in candidates}) > 1
        raise DroverError(
            Reason.DOMAIN_AMBIGUOUS,
            f'guest "{domain}" is on {" and ".join(hosts)}; say which with --from HOST{", or name it by UUID" if differ else ""}',
            metadata={"domain": domain, "hosts": ",".join(hosts)},
        )

    async def _guest(self, host: str, spec: pb.MigrationSpec) -> host_pb2.GetDomainResponse:
        """The guest, and what keeps it from leaving as it shall."""
        stub = host_pb2_grpc.HostServiceStub(self._registry.channel(host))
        with errors_of(host):
            answer = await stub.GetDomain(leaving_request(spec), timeout=QUESTION_SECONDS)
        return checked_answer(answer, host)

    async def _side(self, name: str) -> Side:
        """A host that is up has told its news on its watch; another one is asked, so that its error says what is wrong."""
        known = await self._registry.get(name)
        host = known.host if known.state == HOST_STATE_UP else await ask_host(self._registry.channel(name), name)
        return Side(host, self._peer(known.host, known.agent_address), known.agent_address)

    def _peer(self, host: host_pb2.Host, address: str) -> RemotePeer:
        """The agent of that host, wherever it registers next. A name can pass to another host, which knows nothing of what this
        one did: that is not the peer. One of that name at the same address is, though its libvirt has another UUID by now."""

        def channel() -> grpc.aio.Channel:
            if not self._registry.has(host.name, host.host_uuid, address):
                raise DroverError(
                    Reason.HOST_UNREACHABLE,
                    f'host {host.host_uuid} is not registered as "{host.name}" any more',
                    metadata={"peer": host.name},
                )
            return self._registry.channel(host.name)

        return RemotePeer(channel, host.name)

    async def ends(self, migration: pb.Migration) -> tuple[Side, Side]:
        source, destination = [await self._known(n) for n in (migration.source_host, migration.destination_host)]
        return source, destination

    async def _known(self, name: str) -> Side:
        """From the last word of the host: it need not answer now."""
        known = await self._registry.get(name)
        return Side(known.host, self._peer(known.host, known.agent_address), known.agent_address)


def _alive(found: Found) -> Found:
    """The copies that run or are paused by their user. Of one and the same guest, the copy that runs: a paused one is what a
    migration has left.
    """
    alive = [(host, guest) for host, guest in found if guest.domain.state in _ALIVE and guest.domain.job != Job.INCOMING]
    runs = [(host, guest) for host, guest in alive if guest.domain.state == host_pb2.DOMAIN_STATE_RUNNING]
    one_guest = len({guest.domain.uuid for _, guest in alive}) == 1
    return runs if runs and one_guest else alive
