"""No second copy, whatever strikes around the switch-over: a libvirtd is killed, an agent with it, or the migration is aborted.

Finish is armed, so the destination starts the guest by itself. A round strikes so many milliseconds after the guest was
suspended, starts libvirtd again, asks both sides what is true, and does what the handshake would do. Its guest's serial log tells
whether two copies ever ran. The tests are a sample; the whole sweep::

    python -m tests.lab.test_libvirt_guard 10 --agents alive dead --guards hook none
"""

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from time import perf_counter

import pytest

from agent.hypervisor.base import Begun, DomainBusy, DomainNotFound, DomainState, HypervisorError, Prepared
from agent.hypervisor.options import Options
from tests.kit.lab import Guest, Lab, wait_until
from tests.kit.lab.guestlog import judge_file

if os.environ.get("CI") != "true":
    pytest.importorskip("libvirt", reason="libvirt-python is not installed")

from agent.hypervisor.libvirt import LibvirtHypervisor, switchover
from agent.hypervisor.libvirt.hook import install

OPTIONS = Options(post_copy=False)
"""An unprivileged QEMU may not use post-copy, and no round switches to it."""
SLOW = 8 << 20
DECIDED_SECONDS = 10.0
"""A destination that says nothing for so long never will."""


@dataclass(frozen=True)
class Strike:
    """What happens, when, and who is there to see it."""

    after: float
    """Milliseconds from the guest's suspension to the strike; below zero: that much before, while memory flows slowly."""
    what: str = "source"
    """``source``, ``destination``: its libvirtd is killed. ``abort``: the migration is aborted."""
    agent: str = "alive"
    """The source's. ``alive``; ``dead``: killed with libvirtd; ``blind``: alive but not given the chance to mend."""
    hook: bool = True
    down: float = 0.0
    """Seconds until libvirtd is started again."""


@dataclass(frozen=True)
class Result:
    source: str
    """The source's word after all was settled and before anything was decided: its state and reason."""
    destination: str
    """``running`` or ``gone``."""
    problems: tuple[str, ...]
    """What the guest's log tells against us, and what else is wrong."""


class Round:
    """One migration from h1 to h2 that is struck."""

    def __init__(self, lab: Lab, strike: Strike, guest: Guest) -> None:
        self.lab, self.strike, self.guest = lab, strike, guest
        self.uuid = str(guest.stable_uuid)
        self.h1, self.h2 = lab["h1"], lab["h2"]
        self.problems: list[str] = []
        self.decision = ""

    async def run(self) -> Result:
        async with AsyncExitStack() as stack:
            self.source = await stack.enter_async_context(_driver(self.h1.libvirt_uri))
            self.destination = await stack.enter_async_context(_driver(self.h2.libvirt_uri))
            self.outgoing = self.source.outgoing(self.uuid)
            self.incoming = self.destination.incoming(self.uuid)
            stack.push_async_callback(self.incoming.close)
            stack.push_async_callback(self._close_outgoing)
            await self._run()
            await asyncio.to_thread(self.guest.wait_lines, 3)
        verdict = judge_file(self.guest.serial_log)
        return Result(self.state, self.decision, (*self.problems, *verdict.problems()))

    async def _run(self) -> None:
        perform, finish = await self._start()
        await self._wait()
        await self._strike()
        lost = perf_counter()
        with suppress(HypervisorError):
            await perform
        await asyncio.sleep(max(0.0, self.strike.down - (perf_counter() - lost)))
        for host in self.lab:
            await asyncio.to_thread(host.start_libvirtd)
        if self.strike.agent == "dead":
            self.outgoing = self.source.outgoing(self.uuid)
        await self.outgoing.settle()
        state = await self._state()
        self.state = f"{state[0].value} ({state[1]})"
        await self._decide(state[0], finish)

    async def _start(self) -> "tuple[asyncio.Task[object], asyncio.Task[object]]":
        """Everything up to a Perform under way and a Finish that waits for it."""
        self.events = self.source.events()
        begun = await self.outgoing.begin(OPTIONS, self.guest.name)
        prepared = await self.incoming.prepare(
            begun.domain_xml, begun.cookie, OPTIONS, self.guest.name, self.h2.addresses["mig1"], ""
        )
        bandwidth = SLOW if self.strike.after < 0 else 0
        if self.strike.agent == "dead":
            await self.outgoing.close()
            self.child = await _perform_in_a_child(self.h1.libvirt_uri, self.uuid, prepared, bandwidth)
            perform: asyncio.Task[object] = asyncio.create_task(self.child.wait())
        else:
            if self.strike.agent == "blind":
                self.outgoing._guard.mend = _nothing  # type: ignore[method-assign]
            perform = asyncio.create_task(self._perform(begun, prepared, bandwidth))
        finish: asyncio.Task[object] = asyncio.create_task(self.incoming.finish(begun.domain_xml, b"", OPTIONS, self.guest.name))
        return perform, finish

    async def _perform(self, begun: Begun, prepared: Prepared, bandwidth: int) -> object:
        return await self.outgoing.perform(prepared.uri, begun.domain_xml, prepared.cookie, OPTIONS, self.guest.name, bandwidth)

    async def _wait(self) -> None:
        async with asyncio.timeout(20):
            if self.strike.after < 0:
                while (reading := await self.outgoing.progress()) is None or reading.processed_bytes < 1 << 20:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            else:
                async for event in self.events:
                    if event.kind == "suspended":
                        break
                await _exactly(self.strike.after / 1000)

    async def _strike(self) -> None:
        if self.strike.what == "abort":
            await self.outgoing.abort()
            return
        struck = self.h1 if self.strike.what == "source" else self.h2
        victims = [struck.libvirtd_pid, *([self.child.pid] if self.strike.agent == "dead" else [])]
        for pid in random.sample(victims, len(victims)):
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
        reaped = Path(f"/proc/{victims[0]}")  # until then the host's init takes it for alive, and would not start it again
        await asyncio.to_thread(wait_until, lambda: not reaped.exists(), 5, "libvirtd is gone", 0.001)

    async def _state(self) -> tuple[DomainState, str]:
        try:
            domain = await self.source.get_domain(self.uuid)
        except DomainNotFound:
            return DomainState.SHUTOFF, "absent"
        return domain.state, domain.reason

    async def _decide(self, state: DomainState, finish: "asyncio.Task[object]") -> None:
        """As the handshake does: a source that runs has kept the guest; any other obeys the destination."""
        if state is DomainState.RUNNING:
            await self._abandon()
            if self.decision == "running":
                self.problems.append("the source has kept the guest, and it runs at the destination")
            with suppress(HypervisorError):
                await finish
            return
        try:
            async with asyncio.timeout(DECIDED_SECONDS):
                await asyncio.shield(finish)
            self.decision = "running"
        except HypervisorError:
            await self._abandon()
        except TimeoutError:
            self.problems.append("the source is stopped and the destination never decides")
            await self._abandon()
            with suppress(HypervisorError):
                await finish
        for _ in range(2):
            await (self.outgoing.resume() if self.decision == "gone" else self.outgoing.remove(b"", OPTIONS))

    async def _abandon(self) -> None:
        """As the handshake does: again, until it is done or refused."""
        while True:
            try:
                await self.incoming.abandon()
                self.decision = "gone"
            except DomainBusy:
                self.decision = "running"
            except HypervisorError:
                await asyncio.sleep(0.05)
                continue
            return

    async def _close_outgoing(self) -> None:
        with suppress(HypervisorError):
            await self.outgoing.close()


async def _nothing() -> None: ...


async def _exactly(seconds: float) -> None:
    """asyncio's clock is coarse; the last millisecond is waited out."""
    until = perf_counter() + seconds
    await asyncio.sleep(max(0.0, seconds - 0.001))
    while perf_counter() < until:
        pass


@asynccontextmanager
async def _driver(uri: str) -> AsyncIterator[LibvirtHypervisor]:
    driver = LibvirtHypervisor(uri, call_timeout=10)
    await driver.open()
    try:
        yield driver
    finally:
        await driver.close()


# --- an agent that can be killed


async def _perform_in_a_child(uri: str, uuid: str, prepared: Prepared, bandwidth: int) -> asyncio.subprocess.Process:
    """Begins and performs in a process of its own, as an agent would."""
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.lab.test_libvirt_guard", "--child", stdin=asyncio.subprocess.PIPE
    )
    assert child.stdin is not None
    words = {"uri": uri, "uuid": uuid, "to": prepared.uri, "cookie": prepared.cookie.hex(), "bandwidth": bandwidth}
    child.stdin.write(json.dumps(words).encode())
    child.stdin.close()
    return child


async def _child(uri: str, uuid: str, to: str, cookie: str, bandwidth: int) -> None:
    async with _driver(uri) as driver:
        outgoing = driver.outgoing(uuid)
        begun = await outgoing.begin(OPTIONS, "")
        with suppress(HypervisorError):
            await outgoing.perform(to, begun.domain_xml, bytes.fromhex(cookie), OPTIONS, "", bandwidth)
        await asyncio.Event().wait()


# --- rounds


def a_round(lab: Lab, strike: Strike) -> Result:
    """One strike, on hosts as clean as new."""
    for host in lab:
        host.start_libvirtd()
        host.destroy_all()
    hook = lab["h1"].path / "etc/libvirt" / switchover.HOOK
    hook.unlink(missing_ok=True)
    if strike.hook:
        install(lab["h1"].path / "etc/libvirt")
    guest = lab.guest(f"g{random.randrange(1 << 40):x}", memory_mib=32)
    lab["h1"].start(guest, persistent=True)
    guest.wait_lines(5)
    result = asyncio.run(Round(lab, strike, guest).run())
    for path in lab.serial.glob(f"{guest.name}.*"):
        path.unlink()
    return result


def sweep(lab: Lab, strikes: list[Strike]) -> Counter[tuple[Strike, Result]]:
    """Run them all, telling each; returns how often each came out how."""
    seen: Counter[tuple[Strike, Result]] = Counter()
    for strike in strikes:
        result = a_round(lab, strike)
        seen[strike, result] += 1
        print(strike, result, flush=True)
    return seen


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    missing = "root" if os.geteuid() != 0 else next((tool for tool in ("libvirtd", "virsh") if not shutil.which(tool)), "")
    if missing and os.environ.get("CI") != "true":
        pytest.skip(f"the lab needs {missing}")
    with Lab.up(f"lvg{os.getpid() % 1_000_000}", hosts=2) as up:
        yield up


@pytest.mark.parametrize("after", [0, 3, 5, 8, 20])
def test_live_agent_without_the_hook(lab: Lab, after: float) -> None:
    assert a_round(lab, Strike(after, agent="alive", hook=False)).problems == ()


@pytest.mark.parametrize("after", [0, 3, 5, 8, 20])
def test_dead_agent_with_the_hook(lab: Lab, after: float) -> None:
    assert a_round(lab, Strike(after, agent="dead", hook=True)).problems == ()


def test_neither_agent_nor_hook_ends_with_one_copy(lab: Lab) -> None:
    """For a moment there are two: nobody was there to prevent it. The agent that comes back ends it."""
    for _ in range(3):
        result = a_round(lab, Strike(5, agent="blind", hook=False))
        assert not any("it runs at the destination" in problem for problem in result.problems)


@pytest.mark.parametrize("agent", ["alive", "dead"])
def test_killed_before_the_switch_over_the_guest_runs_on(lab: Lab, agent: str) -> None:
    assert a_round(lab, Strike(-1, agent=agent, down=0.3)) == Result("running (booted)", "gone", ())


@pytest.mark.parametrize("after", [-1, 0, 2, 4, 8, 15])
def test_abort(lab: Lab, after: float) -> None:
    assert a_round(lab, Strike(after, "abort", hook=False)).problems == ()


@pytest.mark.parametrize("after", [0, 4, 8, 15, 30])
def test_destinations_libvirtd_killed(lab: Lab, after: float) -> None:
    assert a_round(lab, Strike(after, "destination", hook=False)).problems == ()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("rounds", type=int, nargs="?", default=1)
    parser.add_argument("--lab", default="", help="a lab that is up; else one is made")
    parser.add_argument("--after", type=float, nargs="*", default=[0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 15, 20, 30, 40])
    parser.add_argument("--what", nargs="*", default=["source"])
    parser.add_argument("--agents", nargs="*", default=["alive", "dead"])
    parser.add_argument("--guards", nargs="*", default=["hook", "none"])
    parser.add_argument("--down", type=float, nargs="*", default=[0.0, 0.5, 2.0])
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.child:
        asyncio.run(_child(**json.load(sys.stdin)))
        return
    strikes = [
        Strike(after + random.random(), what, agent, guard == "hook", random.choice(words.down))
        for _ in range(words.rounds)
        for what, agent, guard, after in product(words.what, words.agents, words.guards, words.after)
    ]
    with nullcontext(Lab.attach(words.lab)) if words.lab else Lab.up(f"lvg{os.getpid() % 1_000_000}", hosts=2) as lab:
        seen = sweep(lab, strikes)
    kinds = Counter((d.what, d.agent, d.hook, r.source, r.destination, bool(r.problems)) for d, r in seen.elements())
    for kind, count in sorted(kinds.items(), key=str):
        print(count, kind)


if __name__ == "__main__":
    main()
