"""Issue 6, line 25: a host's description of itself is bounded, and never keeps other hosts out of the store."""

from typing import Any

from agent.runtime.errors import DroverError, Reason
from coordinator.hosts.host_table import PREFIX
from coordinator.hosts.hosts import HostRegistry
from coordinator.store import MemoryStore
from tests.unit.fake_agents import UNREACHABLE, UP, register, until


async def test_6_25_a_host_that_cannot_be_saved_stops_no_other(registry: HostRegistry, store: MemoryStore, agents: Any) -> None:
    first, second = await agents("a"), await agents("b")
    await register(registry, first)
    await register(registry, second)
    saved = store.txn

    async def txn(compares: Any, operations: Any) -> Any:
        if operations[0].key == PREFIX + "a":
            raise DroverError(Reason.FIELD_TOO_LARGE, "too large")
        return await saved(compares, operations)

    store.txn = txn  # type: ignore[method-assign]
    first.change(incoming_in_use=1)
    second.change(incoming_in_use=1)
    await until(store, "b", lambda known: known.host.incoming_in_use == 1)


async def test_6_25_an_agent_whose_word_is_too_large_is_not_heard(registry: HostRegistry, store: MemoryStore, agents: Any) -> None:
    agent = await agents("alpha")
    await register(registry, agent)
    agent.change(hypervisor="x" * 200_000)
    await until(store, "alpha", lambda known: known.state == UNREACHABLE)
    known = await registry.get("alpha")
    assert len(known.host.hypervisor) < 300
    assert "is refused: host: has 200028 bytes" in known.unreachable_reason  # the reason says that it answers, but too much
    agent.change(hypervisor="QEMU")
    await register(registry, agent)
    assert not (await until(store, "alpha", lambda known: known.state == UP)).unreachable_reason
