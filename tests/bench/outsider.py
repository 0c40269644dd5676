"""A caller who is not the driver: makes plausible random calls about migrations that others drive, and about their slots."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from agent.runtime.wire import duration
from drover.agent.v1 import admission_pb2, host_pb2
from drover.agent.v1 import handshake_pb2 as pb

AT_DESTINATION: Final = frozenset({"ReserveSlot", "Prepare", "Finish", "Abandon"})
INCOMING, OUTGOING = admission_pb2.SLOT_DIRECTION_INCOMING, admission_pb2.SLOT_DIRECTION_OUTGOING
EPOCHS: Final = (0, 1, 2, 3)
"""Guessed epochs, beside the learned one."""


@dataclass
class Known:
    """What any caller can learn about one migration, by queries and repeated calls."""

    domain: str
    source: str
    destination: str
    attempt: int = 1
    uri: str = ""
    epoch: int = 0
    xml: str = ""
    cookies: list[bytes] = field(default_factory=lambda: [b""])


class Outsider:
    """A source of requests. `agents`: addresses by host; `uuids`: UUIDs of the guests by name."""

    def __init__(self, rng: random.Random, agents: Mapping[str, str], uuids: Mapping[str, str]) -> None:
        self._rng = rng
        self._agents = dict(agents)
        self._uuids = dict(uuids)
        self.known: dict[str, Known] = {}
        """By migration id."""
        self._makers: Sequence[tuple[int, Callable[[pb.AttemptRef, Known], Any]]] = (
            (2, self._reserve),
            (3, self._begin),
            (3, self._prepare),
            (3, self._perform),
            (4, self._finish),
            (6, self._confirm),
            (3, self._abort),
            (5, self._abandon),
            (1, self._post_copy),
            (1, self._bandwidth),
            (3, self._get),
            (3, self._acquire),
            (3, self._release),
        )

    def next(self) -> tuple[str, str, Any]:
        """Return a host, the name of a method, and its request. `known` must not be empty."""
        rng = self._rng
        migration_id = rng.choice([*self.known][-12:])  # the newest ones, most of which are under way
        known = self.known[migration_id]
        ref = pb.AttemptRef(migration_id=migration_id, attempt=rng.choice((known.attempt,) * 8 + (0, 1, 2)))
        if rng.random() < 0.05:  # a new migration of its own
            ref.migration_id = f"{rng.getrandbits(32):08x}-0000-4000-8000-00000000beef"
        make = rng.choices([maker for _, maker in self._makers], [weight for weight, _ in self._makers])[0]
        request = make(ref, known)
        method = type(request).__name__.removesuffix("Request")
        right = known.destination if is_for_destination(method, request) else known.source
        return self._mostly(right), method, request

    def learn(self, request: Any, answer: Any) -> None:
        """Remember what an answer reveals."""
        known = self.known.get(request.ref.migration_id) if "ref" in request.DESCRIPTOR.fields_by_name else None
        if known is None:
            return
        if answer.record.slot.epoch:
            known.epoch = answer.record.slot.epoch
        known.xml = getattr(answer, "domain_xml", "") or known.xml
        known.uri = getattr(answer, "uri_out", "") or known.uri
        cookie = getattr(answer, "cookie_out", b"")
        if cookie and cookie not in known.cookies:
            known.cookies.append(cookie)

    # ---- requests

    def _reserve(self, ref: pb.AttemptRef, known: Known) -> Any:
        needs = host_pb2.GuestRequirements(name=known.domain, uuid=self._uuids[known.domain], memory_bytes=16 << 20, vcpus=1)
        source = self._mostly(known.source)
        return pb.ReserveSlotRequest(ref=ref, requirements=needs, source_host=source, source_agent=self._agent(source))

    def _begin(self, ref: pb.AttemptRef, known: Known) -> Any:
        to = self._mostly(known.destination)
        return pb.BeginRequest(ref=ref, domain=known.domain, destination_host=to, destination_agent=self._agent(to))

    def _prepare(self, ref: pb.AttemptRef, known: Known) -> Any:
        epoch = self._rng.choice((known.epoch, known.epoch, *EPOCHS))
        return pb.PrepareRequest(ref=ref, slot_epoch=epoch, domain_xml=known.xml or "{}", cookie_in=self._cookie(known))

    def _perform(self, ref: pb.AttemptRef, known: Known) -> Any:
        uri = known.uri or "tcp://127.91.0.2:49152"
        return pb.PerformRequest(
            ref=ref,
            uri=uri,
            cookie_in=self._cookie(known),
            wait=self._wait(),
            bandwidth_bytes_per_second=self._rate(),
            destination_record=self._record(ref, known, known.destination),
        )

    def _finish(self, ref: pb.AttemptRef, known: Known) -> Any:
        return pb.FinishRequest(ref=ref, cookie_in=self._cookie(known), wait=self._wait())

    def _confirm(self, ref: pb.AttemptRef, known: Known) -> Any:
        decision = self._rng.choice((pb.DECISION_RUNNING, pb.DECISION_GONE, pb.DECISION_GONE))
        statement = self._statement() if decision == pb.DECISION_GONE else None
        return pb.ConfirmRequest(
            ref=ref,
            decision=decision,
            cookie_in=self._cookie(known),
            wait=self._wait(),
            statement=statement,
            destination_record=self._record(ref, known, known.destination),
        )

    def _abort(self, ref: pb.AttemptRef, known: Known) -> Any:
        return pb.AbortRequest(ref=ref)

    def _abandon(self, ref: pb.AttemptRef, known: Known) -> Any:
        kept = self._rng.random() < 0.7
        return pb.AbandonRequest(
            ref=ref,
            source_kept=kept,
            statement=self._statement() if kept else None,
            source_record=self._record(ref, known, known.source),
        )

    def _post_copy(self, ref: pb.AttemptRef, known: Known) -> Any:
        return pb.StartPostCopyRequest(ref=ref)

    def _bandwidth(self, ref: pb.AttemptRef, known: Known) -> Any:
        return pb.SetBandwidthRequest(ref=ref, bandwidth_bytes_per_second=self._rate())

    def _get(self, ref: pb.AttemptRef, known: Known) -> Any:
        return pb.GetRecordRequest(ref=ref)

    def _acquire(self, ref: pb.AttemptRef, known: Known) -> Any:
        direction = self._rng.choice((INCOMING, OUTGOING))
        return admission_pb2.AcquireSlotRequest(
            migration_id=ref.migration_id,
            direction=direction,
            kind=self._rng.choice(admission_pb2.SlotKind.values()[1:]),
            peer_host=self._mostly(known.source if direction == INCOMING else known.destination),
            memory_bytes=self._rng.choice((0, 16 << 20)),
            wait=self._wait(),
            driver="outsider",
            place_only=self._rng.random() < 0.3,
        )

    def _release(self, ref: pb.AttemptRef, known: Known) -> Any:
        return admission_pb2.ReleaseSlotRequest(
            migration_id=ref.migration_id,
            direction=self._rng.choice((INCOMING, OUTGOING)),
            keep_place=self._rng.random() < 0.5,
            cancelled=self._rng.random() < 0.1,
        )

    # ---- parts of requests

    def _host(self) -> str:
        return self._rng.choice([*self._agents])

    def _mostly(self, host: str) -> str:
        return host if self._rng.random() < 0.85 else self._host()

    def _agent(self, host: str) -> str:
        return self._rng.choice((self._agents[host], self._agents[host], self._agents[host], ""))

    def _record(self, ref: pb.AttemptRef, known: Known, host: str) -> pb.Record | None:
        """Return a forged record of that host, as if relayed, or None."""
        if self._rng.random() < 0.3:
            return None
        return pb.Record(
            ref=ref,
            state=self._rng.choice(pb.RecordState.values()[1:]),
            domain_name=known.domain,
            domain_uuid=self._uuids[known.domain],
            host=host,
            peer_host=known.source if host == known.destination else known.destination,
            uri=known.uri,
            revision=self._rng.choice((1, 5, 1000)),
        )

    def _cookie(self, known: Known) -> bytes:
        return self._rng.choice(known.cookies)

    def _wait(self) -> Any:
        seconds = self._rng.choice((None, 0.0, 0.02))
        return None if seconds is None else duration(seconds)

    def _rate(self) -> int:
        return self._rng.choice((0, 8 << 20, 100 << 20))

    def _statement(self) -> pb.Statement | None:
        if self._rng.random() < 0.5:
            return None
        statement = pb.Statement(dead_host=self._host(), reason="so it seems", said_by="somebody")
        statement.say_time.GetCurrentTime()
        return statement


def is_for_destination(method: str, request: Any) -> bool:
    """Return whether the request is one for the migration's destination; else it is for its source."""
    return method in AT_DESTINATION or getattr(request, "direction", OUTGOING) == INCOMING
