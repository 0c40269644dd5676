"""A command of the site that makes sure that a host is dead (pulls its power), for a host that never comes back.

It is run with the host's name as its last argument; exit status 0 means that the host is dead for certain. Its word is then
recorded like an operator's, for every migration that waits for this host. Anything else changes nothing, and it is run again after
the same time.
"""

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
"""Of what the command prints, for the record; the rest is read and dropped."""
_LAST_OUTPUT_SECONDS: Final = 1.0
"""How long the command's last words are waited for once it has ended."""


class FencingConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[fencing]``"""

    command: Annotated[tuple[str, ...], msgspec.Meta(min_length=1, max_length=64)]
    """Program and arguments; the host's name comes last."""
    after_seconds: Annotated[float, msgspec.Meta(ge=1, le=86_400)] = 60
    """How long the outcome of a migration must have been unknown."""
    timeout_seconds: Annotated[float, msgspec.Meta(ge=1, le=3600)] = 60
    """A command that takes longer is killed, and counts as failed."""


class Fences:
    """The command's runs: one at a time for each host, and one result for all migrations that wait for that host."""

    def __init__(self, config: FencingConfig) -> None:
        self.after_seconds = config.after_seconds
        self._config = config
        self._hosts: dict[str, _Fence] = {}

    async def dead(self, host: str, silent_for: Callable[[], float]) -> str:
        """Wait until the command has said that the host is dead for certain; what to record then.

        `silent_for` says for how many seconds the host has not answered: the command is run once that is `after_seconds` for one
        of those who wait, and again after the same time while it fails. It is killed when the last of them goes away.
        """
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
    """The runs for one host, and those who wait for their result."""

    waiting: list[Callable[[], float]]
    task: asyncio.Task[str]


async def fence(config: FencingConfig, host: str) -> str | None:
    """Run the command once. What to record when the host is dead for certain, else None. Kills the command, and what it started
    in its process group, when its time is over or the caller is cancelled.
    """
    log.warning("fencing", host=host, command=config.command[0])
    async with _output() as (said, write_end):
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
        await asyncio.wait({said.reading}, timeout=_LAST_OUTPUT_SECONDS)
        log.warning("fenced" if status == 0 else "not fenced", host=host, status=status, output=said.text)
        return f"the fencing command ended with status 0: {said.text}" if status == 0 else None


@contextlib.asynccontextmanager
async def _output() -> AsyncIterator[tuple["_Tail", int]]:
    """A pipe: what is written into it, and the file descriptor to write to, which the caller closes.

    Not the pipe that asyncio offers: with that one, the wait for a process lasts until everybody has closed its output.
    """
    read_end, write_end = os.pipe()
    stream = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(stream), os.fdopen(read_end, "rb")
    )
    said = _Tail(stream)
    try:
        yield said, write_end
    finally:
        said.reading.cancel()
        await asyncio.wait({said.reading})
        transport.close()


class _Tail:
    """The last bytes of a stream, which is read to its end whatever its length."""

    def __init__(self, stream: asyncio.StreamReader) -> None:
        self._last = b""
        self.reading = asyncio.create_task(self._read(stream), name="fencing output")

    async def _read(self, stream: asyncio.StreamReader) -> None:
        while chunk := await stream.read(4096):
            self._last = (self._last + chunk)[-_OUTPUT_BYTES:]

    @property
    def text(self) -> str:
        return self._last.decode(errors="replace").strip()
