"""Finds the host of a guest among those of the cluster."""

from collections.abc import Sequence
from typing import Final

from agent.hypervisor.base import Job
from agent.hypervisor.names import ambiguity
from agent.runtime.errors import DroverError, Reason
from coordinator.hosts.hosts import HostRegistry
from drover.agent.v1 import host_pb2

Found = tuple[str, host_pb2.GetDomainResponse]
"""A host, and a guest as that host describes it."""

_ALIVE: Final = (host_pb2.DOMAIN_STATE_RUNNING, host_pb2.DOMAIN_STATE_PAUSED)


async def find_guest(registry: HostRegistry, request: host_pb2.GetDomainRequest, option: str) -> Found:
    """Return the host on which the guest runs, and the guest as that host describes it. Ignores a copy that is shut off on
    another host, and one that waits for its memory. `option`: the one of the command line by which a user names the host.

    Raises DOMAIN_NOT_FOUND, DOMAIN_AMBIGUOUS, HOST_UNREACHABLE (it may run on a host that does not answer).
    """
    domain = request.domain
    found, silent = await registry.find_domain(request)
    if text := ambiguity(domain, [(guest.domain.name, guest.domain.uuid) for _, guest in found]):
        where = ",".join(host for host, _ in found)
        raise DroverError(Reason.DOMAIN_AMBIGUOUS, text, metadata={"domain": domain, "hosts": where})
    candidates = _alive(found)
    if not candidates and silent:
        raise DroverError(
            Reason.HOST_UNREACHABLE,
            f'no host that answered runs a guest "{domain}"; it may run on {", ".join(silent)}, which did not answer. '
            "Nothing was changed; `drover host list` shows the hosts",
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
        f'guest "{domain}" is on {" and ".join(hosts)}; say which with {option} HOST{", or name it by UUID" if differ else ""}',
        metadata={"domain": domain, "hosts": ",".join(hosts)},
    )


def _alive(found: Sequence[Found]) -> Sequence[Found]:
    """Return the copies that run or are paused. If all are of one guest and one of them runs, only those that run: a paused one is
    left over from a migration.
    """
    alive = [(host, guest) for host, guest in found if guest.domain.state in _ALIVE and guest.domain.job != Job.INCOMING]
    runs = [(host, guest) for host, guest in alive if guest.domain.state == host_pb2.DOMAIN_STATE_RUNNING]
    one_guest = len({guest.domain.uuid for _, guest in alive}) == 1
    return runs if runs and one_guest else alive
