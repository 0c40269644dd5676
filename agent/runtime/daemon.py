"""What every daemon of Drover does alike: run until it is told to stop."""

import asyncio
import gc
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Final

SWITCH_SECONDS: Final = 0.0005
"""For which a thread keeps the interpreter while another one waits for it. With Python's own 5 ms, each return from a thread
that waited for libvirt or SQLite may take as long, and a handshake has dozens."""


def run_until_stopped(daemon: Callable[[asyncio.Event], AbstractAsyncContextManager[object]]) -> None:
    """Enter the daemon, and leave it on SIGTERM or SIGINT. It is handed the event that says so, for a start that takes long."""
    sys.setswitchinterval(SWITCH_SECONDS)
    raise_file_limit()
    asyncio.run(_main(daemon))


def raise_file_limit() -> None:
    """Allow this process as many open files as the system permits; systemd's default is 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def _main(daemon: Callable[[asyncio.Event], AbstractAsyncContextManager[object]]) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with daemon(stop):
        gc.freeze()  # what lives from the start lives to the end: the collector need not look at it again and again
        await stop.wait()
