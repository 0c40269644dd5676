"""What source and destination share: their host, how a request begins or joins a phase, and how the hypervisor is asked."""

import asyncio
import contextlib
import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, Final

import msgspec
import structlog
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from agent.handshake.host.attempt import Attempt, waits_for
from agent.handshake.host.records import AttemptRecord, Role, Statement, record_to_proto
from agent.handshake.host.signs import MAX_WAIT
from agent.handshake.machines.destination import DestinationState
from agent.hypervisor.base import Domain, DomainNotFound, HypervisorError
from agent.hypervisor.guest_fact import NO_PROCESS, GuestFact, GuestState, fact_of, fact_of_event, silent
from agent.hypervisor.interface import Hypervisor
from agent.hypervisor.reasons import from_hypervisor
from agent.network.interfaces import is_own
from agent.network.networks import listen_on
from agent.network.ports import any_is_free
from agent.network.uri import MigrationUri, address_problem
from agent.runtime.address import Address, parse_address
from agent.runtime.backoff import HYPERVISOR, SYSTEM_CLOCK, Clock, Pauses
from agent.runtime.errors import DroverError, Reason, invalid_field
from agent.runtime.events import Bus
from agent.runtime.failure import Failure
from drover.agent.v1 import handshake_pb2 as pb
from drover.agent.v1 import host_pb2, options_pb2

log = structlog.get_logger()

SEE_SECONDS: Final = 1.0
"""How long a record that ends waits for the hypervisor to report the guest's state."""


@dataclass
class LocalHost:
    """The host on which an engine works."""

    name: str
    hypervisor: Hypervisor
    networks: tuple[host_pb2.Network, ...]
    """Its own ones, as of its configuration and its interfaces now."""
    features: options_pb2.MigrationFeatures
    lease_seconds: float
    takeover_after: float
    bus: Bus
    simulated: bool = False
    """Whether its hypervisor is simulated, in this process: several such hosts share the addresses of one machine."""
    draining: bool = False
    """Whether the agent is stopping."""
    clock: Clock = SYSTEM_CLOCK
    interfaces: tuple[host_pb2.Interface, ...] = ()
    """As the kernel reports them now."""

    def show(self, record: AttemptRecord, progress: pb.Progress | None = None) -> pb.Record:
        """Return a record of this host for the wire, under the name that the host had when the record was made."""
        return record_to_proto(record, record.host or self.name, progress)

    def check_not_draining(self) -> None:
        if self.draining:
            raise DroverError(
                Reason.DRAINING,
                f"the agent of {self.name} is stopping and takes no new migration. Nothing was done to the guest",
                retry_after=5.0,
            )

    def listen(self, request: pb.ReserveSlotRequest | pb.PrepareRequest) -> MigrationUri:
        """Return where a guest is to arrive. Raises URI_NOT_ALLOWED, NETWORK_NOT_FOUND."""
        listen = listen_on(self.networks, self.features, request.network, request.uri_in, self.interfaces)
        self.check_listens_on(str(listen.host))
        return listen

    def check_listens_on(self, address: str) -> None:
        """Raise NETWORK_NOT_FOUND unless the kernel has `address` on this host now, so that guests may arrive there."""
        own = ip_address(address)
        problem = address_problem(own) or ("" if is_own(own) else f"is no address of {self.name} now")
        if problem and not self.simulated:
            raise DroverError(
                Reason.NETWORK_NOT_FOUND,
                f"{address} {problem}, so {self.name} takes no guest there. Nothing was done to the guest; check `ip address` on "
                f"{self.name} and the networks in its agent's configuration",
                metadata={"host": self.name, "address": address},
            )

    def check_sends_to(self, uri: MigrationUri) -> None:
        """Raise URI_NOT_ALLOWED if `uri` is this host's own address, where other guests arrive, or no address of a host."""
        problem = address_problem(uri.host) or ("is an address of this host itself" if is_own(uri.host) else "")
        if problem and not self.simulated:
            raise DroverError(
                Reason.URI_NOT_ALLOWED,
                f"migration URI {uri} is refused: {uri.host} {problem}. Nothing was sent, and the guest stays on {self.name}",
                metadata={"uri": str(uri)},
            )


def wait_of(wait: Duration, *, unset: float) -> float:
    """Return for how many seconds a caller wants to wait, at most MAX_WAIT; `unset` if the field is missing or zero."""
    seconds = wait.seconds + wait.nanos / 1e9
    return min(max(seconds, 0.0), MAX_WAIT) if seconds else unset


def phase_changes(attempt: Attempt, phase: str, request: Message) -> dict[str, Any]:
    """Return what the record must remember of a request that begins a phase; nothing for one that joins it.

    Raises:
        DroverError: REQUEST_ID_REUSED if the same request id comes with another content.
    """
    request_id = str(getattr(request, "request_id", ""))
    digest = _digest(request)
    record = attempt.record
    known = record.requests.get(phase)
    if known is None:
        return {
            "requests": {**record.requests, phase: digest},
            "request_ids": {**record.request_ids, phase: request_id},
        }
    if request_id and request_id == record.request_ids.get(phase) and digest != known:
        raise DroverError(
            Reason.REQUEST_ID_REUSED,
            f"request id {request_id} was already used for a {phase} of this attempt with another content; nothing was changed",
            metadata={"request_id": request_id},
        )
    return {}


def check_ports(host: LocalHost) -> None:
    """Raise BUSY unless a port for the stream is free."""
    first, last = host.features.first_port, host.features.last_port
    if not any_is_free(first, last):
        raise DroverError(
            Reason.BUSY,
            f"all ports from {first} to {last}, on which {host.name} takes migrations, are in use. Nothing was done to the guest; "
            "try again when a migration has ended, or widen the range (migration_port_min and _max in its qemu.conf, first_port "
            "and last_port of its agent)",
            metadata={"host": host.name, "limit": "ports"},
            retry_after=5.0,
        )


def check_same(attempt: Attempt, host: str, *, agent: str = "", **given: object) -> None:
    """Check that a call that begins an attempt which is known here is about the same migration: else two would share one id.

    Args:
        agent: the address of the other host's agent in the call. Whoever answers there decides where the guest runs, so an attempt
            that was begun with another address, or with none, is not the caller's.
        given: other values in the call, by field of the record. Empty values are not compared.

    Raises:
        DroverError: MIGRATION_EXISTS, with what differs.
    """
    record = attempt.record
    differs = {name: value for name, value in given.items() if value and getattr(record, name) and value != getattr(record, name)}
    if agent and record.requests and _address(agent) != _address(record.peer_agent):
        differs["peer_agent"] = agent
    if differs:
        what = ", ".join(
            f"{name.replace('_', ' ')} {getattr(record, name) or '(none)'}, not {value}" for name, value in differs.items()
        )
        raise DroverError(
            Reason.MIGRATION_EXISTS,
            f"{host} already has a different migration with the id {record.migration_id} ({what}); nothing was done. Choose a new "
            f"UUID for a new migration, or look at that one: `drover migration show {record.migration_id}`",
            metadata={"migration_id": record.migration_id, "host": host, "peer_host": record.peer_host},
        )


def overtaken(attempt: Attempt) -> DroverError:
    """Return the error for a call whose state changed between its checks and its turn."""
    record = attempt.record
    return DroverError(
        Reason.WRONG_PHASE,
        f"attempt {record.attempt} of migration {record.migration_id} became {record.state} during this call; nothing was done, so "
        "make the call again",
        metadata={"state": record.state},
    )


def _address(text: str) -> Address | str:
    try:
        return parse_address(text)
    except ValueError:
        return text


def check_address(address: str, field: str) -> None:
    """Raise INVALID_FIELD unless `address` is a valid agent address, or empty, which means that the agent is never asked."""
    if address:
        try:
            parse_address(address)
        except ValueError as error:
            raise invalid_field(field, str(error)) from None


def check_statement(attempt: Attempt, statement: pb.Statement) -> None:
    """Raise INVALID_FIELD unless the statement is about the other host of the attempt: this host answers, so it is not dead."""
    peer = attempt.record.peer_host
    if peer and statement.dead_host != peer:
        raise invalid_field("statement.dead_host", f"must be {peer}, the other host of this migration, not {statement.dead_host}")


def stated_changes(attempt: Attempt, message: pb.Statement) -> dict[str, object]:
    """Return the changes of a record that an operator's statement decides."""
    statement = Statement.of(message)
    log.warning("an operator's statement decides", migration=attempt.record.migration_id, **msgspec.structs.asdict(statement))
    return {"failure": statement.failure(), "statement": statement}


def failure_of(error: Exception, host: str) -> Failure:
    """Return the failure for an effect's error on `host`. An error that is not the hypervisor's is a bug; it ends the phase too."""
    if isinstance(error, HypervisorError):
        return Failure.of(from_hypervisor(error, host))
    log.error("unexpected error of the hypervisor's driver", exc_info=error)
    text = f"{host}: unexpected error (bug) of the hypervisor's driver, {type(error).__name__}; see the agent's log there"
    return Failure(Reason.INTERNAL, text, {"host": host})


def failed(attempt: Attempt, failure: Failure) -> dict[str, Any]:
    """Return the change of the record by a failure. It replaces a known failure only if it is nearer to the cause."""
    known = attempt.record.failure
    return {"failure": failure} if known is None or failure.distance < known.distance else {}


async def look_up(host: LocalHost, attempt: Attempt) -> Domain | None:
    """Return the attempt's guest as it is now, None if the host does not have it. Asks until the hypervisor answers."""
    pauses = Pauses(HYPERVISOR, host.clock)
    while True:
        try:
            async with attempt.reporting_wait(f"the hypervisor of {host.name} to report the guest's state"):
                domain = await _ask(host, attempt)
        except Exception as error:
            await waits_for(
                attempt, f"the hypervisor of {host.name} to report the guest's state, but it does not answer: {error} (retrying)"
            )
            await pauses.pause()
            continue
        if pauses.failures:
            await waits_for(attempt, "")
        return domain


async def why_unresponsive(host: LocalHost, attempt: Attempt) -> str:
    """Return why the hypervisor may not answer about the attempt's guest; empty: not known."""
    record = attempt.record
    why = await host.hypervisor.why_unresponsive(record.destination_name if record.role is Role.DESTINATION else record.domain_name)
    return f"{host.name}: {why}" if why else ""


async def see(host: LocalHost, attempt: Attempt) -> None:
    """Ask once for the state of the attempt's guest, within `SEE_SECONDS`. The record then has it, or why there was no answer."""
    with contextlib.suppress(HypervisorError, TimeoutError):
        async with asyncio.timeout(SEE_SECONDS):
            await _ask(host, attempt)


async def _ask(host: LocalHost, attempt: Attempt) -> Domain | None:
    record = attempt.record
    try:
        domain = await host.hypervisor.get_domain(record.domain_uuid)
    except DomainNotFound:
        domain = None
    except asyncio.CancelledError:
        _unanswered(attempt, record.seen, TimeoutError("no answer yet"))
        raise
    except Exception as error:
        _unanswered(attempt, record.seen, error)
        raise
    if domain is None and record.seen is not None and record.seen.state in NO_PROCESS:
        attempt.saw(msgspec.structs.replace(record.seen, state=GuestState.ABSENT))  # keep the reason: how it ended
        return None
    arriving = record.role is Role.DESTINATION and record.state != DestinationState.RUNNING
    attempt.saw(fact_of(domain, arriving=arriving))
    return domain


def _unanswered(attempt: Attempt, before: GuestFact | None, error: Exception) -> None:
    """Note that the hypervisor did not answer, unless an event, or Finish's return, has reported a newer state meanwhile."""
    if attempt.record.seen == before:
        attempt.saw(silent(before, error))


async def follow_guest(host: LocalHost, attempt: Attempt, on_end: Callable[[], Awaitable[None]] | None = None) -> None:
    """Take the hypervisor's events about the guest until this task is cancelled. `on_end` is called when the guest's process has
    ended, whoever ended it.
    """
    async for event in host.hypervisor.events():
        if event.uuid == attempt.record.domain_uuid and (fact := fact_of_event(event)) is not None:
            waits = attempt.record.seen is not None and attempt.record.seen.state is GuestState.WAITING
            if not waits or fact.state is GuestState.RUNNING:  # what happens to an empty copy does not happen to the guest
                attempt.saw(fact, look_again=True)
            if fact.state in NO_PROCESS and on_end is not None:
                await on_end()


def _digest(request: Message) -> str:
    """Return the digest of a request's content, without `request_id` and `wait`."""
    copy = type(request)()
    copy.CopyFrom(request)
    for name in ("request_id", "wait"):
        if name in copy.DESCRIPTOR.fields_by_name:
            copy.ClearField(name)
    return hashlib.sha256(copy.SerializeToString(deterministic=True)).hexdigest()
