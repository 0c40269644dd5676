"""The site's command that makes sure that a host is dead (for example, cuts its power), for a host that never comes back.

The host's name is its last argument; exit status 0 means that the host is dead for certain. That is then recorded like an operator's
statement, for every migration that waits for this host. After any other status nothing changes, and the command runs again after
`after_seconds`."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Final

import msgspec
import structlog

log = structlog.get_logger()

_OUTPUT_BYTES: Final = 300
"""Bytes of the command's output that are recorded: the last ones."""
_LAST_OUTPUT_SECONDS: Final = 1.0
"""How long to read output after the command has ended."""


class FencingConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[fencing]``"""

    command: Annotated[tuple[str, ...], msgspec.Meta(min_length=1, max_length=64)]
    """Program and arguments; the host's name is appended."""
    after_seconds: Annotated[float, msgspec.Meta(ge=1, le=86_400)] = 60
    """How long a host must not have answered before the command runs."""
    timeout_seconds: Annotated[float, msgspec.Meta(ge=1, le=3600)] = 60
    """A command that takes longer is killed, and counts as failed."""


class Fences:
    """Runs of the command: one at a time for each host, with one result for all migrations that wait for that host."""

    def __init__(self, config: FencingConfig) -> None:
        self.after_seconds = config.after_seconds
        self._config = config
        self._hosts: dict[str, _Fence] = {}

    async def dead(self, host: str, silent_for: Callable[[], float]) -> str:
        """Wait until the command has succeeded for the host, and return what to record.

        `silent_for` returns for how many seconds the host has not answered: the command runs once that is `after_seconds` for one of
        the callers, and again after the same time while it fails. It is killed when the last caller is cancelled."""
        while (fence := self._hosts.get(host)) is not None and not fence.waiting:
            await asyncio.wait({fence.task})  # it is being killed
        if fence is None:
            waiting: list[Callable[[], float]] = []
            fence = self._hosts[host] = _Fence(waiting, asyncio.create_task(self._keep_fencing(host, waiting), name=f"fence {host}"))
            fence.task.add_done_callback(lambda _: self._hosts.pop(host))
        fence.waiting.append(silent_for)
        try:
            return await asyncio.shield(fence.task)
        finally:
            fence.waiting.remove(silent_for)
            if not fence.waiting:
                fence.task.cancel()
                await asyncio.wait({fence.task})

    async def close(self) -> None:
        """Kill every command that runs."""
        tasks = [fence.task for fence in self._hosts.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _keep_fencing(self, host: str, waiting: Sequence[Callable[[], float]]) -> str:
        while True:
            missing = self.after_seconds - max((silent_for() for silent_for in waiting), default=0.0)
            if missing > 0:
                await asyncio.sleep(missing)
            elif (outcome := await fence(self._config, host)) is not None:
                return outcome
            else:
                await asyncio.sleep(self.after_seconds)


@dataclass(frozen=True)
class _Fence:
    """The runs for one host, and the `silent_for` of each caller that waits for their result."""

    waiting: list[Callable[[], float]]
    task: asyncio.Task[str]


async def fence(config: FencingConfig, host: str) -> str | None:
    """Run the command once. Return what to record if the host is dead for certain, else None. Kills the command's process group at
    its timeout, or when the caller is cancelled."""
    log.warning("fencing", host=host, command=config.command[0])
    async with _output() as (tail, write_end):
        try:
            process = await asyncio.create_subprocess_exec(
                *config.command,
                host,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=write_end,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            log.error("the fencing command cannot be run", host=host, error=str(error))
            return None
        finally:
            os.close(write_end)
        try:
            async with asyncio.timeout(config.timeout_seconds):
                status = await process.wait()
        except TimeoutError:
            log.error("the fencing command took too long", host=host, seconds=config.timeout_seconds)
            return None
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
        # A process that the command has left behind may keep its output open.
        await asyncio.wait({tail.reading}, timeout=_LAST_OUTPUT_SECONDS)
        log.warning("fenced" if status == 0 else "not fenced", host=host, status=status, output=tail.text)
        return f"the fencing command ended with status 0: {tail.text}" if status == 0 else None


@contextlib.asynccontextmanager
async def _output() -> AsyncIterator[tuple["_Tail", int]]:
    """Yield what is written into a pipe, and the descriptor of its write end, which the caller closes.

    With asyncio's own pipe, the wait for a process would last until all of its children have closed their output."""
    read_end, write_end = os.pipe()
    stream = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(stream), os.fdopen(read_end, "rb")
    )
    tail = _Tail(stream)
    try:
        yield tail, write_end
    finally:
        tail.reading.cancel()
        await asyncio.wait({tail.reading})
        transport.close()


class _Tail:
    """The last bytes of a stream, which is read to its end."""

    def __init__(self, stream: asyncio.StreamReader) -> None:
        self._last = b""
        self.reading = asyncio.create_task(self._read(stream), name="fencing output")

    async def _read(self, stream: asyncio.StreamReader) -> None:
        while chunk := await stream.read(4096):
            self._last = (self._last + chunk)[-_OUTPUT_BYTES:]

    @property
    def text(self) -> str:
        return self._last.decode(errors="replace").strip()
