"""By which rules Drover's peers admit migrations, and a driver that applies them (`scripts/bench storm`)."""

import asyncio
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from drover.agent.v1 import migration_pb2 as pb


@dataclass(frozen=True)
class Order:
    """One guest that is to move."""

    name: str
    source: str
    importance: pb.Importance.ValueType
    memory_mib: int
    id: str = field(default_factory=lambda: str(uuid.uuid4()))


@dataclass(frozen=True)
class Rule:
    """How many migrations may run at once; None: any number. Importance counts for none of the peers: the oldest goes first."""

    name: str
    outgoing: int | None = None
    """From one source."""
    incoming: int | None = None
    """To the destination."""
    cluster: int | None = None
    """In the whole cluster."""
    retry: float | None = None
    """Seconds after which one that the destination refused tries again. None: it goes as soon as there is room."""


def rules(retry: float) -> tuple[Rule, ...]:
    """The peers. `retry`: vdsm's pause."""
    return (
        Rule("KubeVirt", outgoing=2, cluster=5),
        Rule("Nova", outgoing=1),
        Rule("vdsm", outgoing=2, incoming=2, retry=retry),
        Rule("unlimited"),
    )


class Admission:
    """Applies a rule: who may run, by what runs."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self._of_source: Counter[str] = Counter()
        self._running = 0
        self._changed = asyncio.Condition()

    def _below(self, taken: int, limit: int | None) -> bool:
        return limit is None or taken < limit

    def _may_leave(self, source: str) -> bool:
        return self._below(self._of_source[source], self.rule.outgoing) and self._below(self._running, self.rule.cluster)

    async def take(self, source: str) -> None:
        """Wait for room, in the order of the calls."""
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda: self._may_leave(source))
                if self._below(self._running, self.rule.incoming):
                    self._of_source[source] += 1
                    self._running += 1
                    return
            await asyncio.sleep(self.rule.retry or 0.0)  # the rule itself, not an event that could be awaited

    async def give(self, source: str) -> None:
        async with self._changed:
            self._of_source[source] -= 1
            self._running -= 1
            self._changed.notify_all()


async def start_by_rule(rule: Rule, orders: Sequence[Order], move: Callable[[Order], Awaitable[None]]) -> None:
    """Move all guests, each as soon as the rule allows it. Return when all have ended."""
    admission = Admission(rule)

    async def one(order: Order) -> None:
        await admission.take(order.source)
        try:
            await move(order)
        finally:
            await admission.give(order.source)

    await asyncio.gather(*map(one, orders))
