"""The main loop of a daemon: runs until SIGTERM or SIGINT."""

import asyncio
import gc
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Final

SWITCH_SECONDS: Final = 0.0005
"""How long a thread keeps the interpreter while another one waits for it. With Python's default of 5 ms, each return from a call of
libvirt or SQLite in a thread may take that long, and a handshake has dozens."""


def run_until_stopped(daemon: Callable[[asyncio.Event], AbstractAsyncContextManager[object]]) -> None:
    """Enter the daemon, and leave it on SIGTERM or SIGINT. The signal sets the daemon's event, to end a long start."""
    sys.setswitchinterval(SWITCH_SECONDS)
    raise_file_limit()
    asyncio.run(_main(daemon))


def raise_file_limit() -> None:
    """Raise the limit of open files to the hard limit; systemd's default is 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def _main(daemon: Callable[[asyncio.Event], AbstractAsyncContextManager[object]]) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with daemon(stop):
        gc.freeze()  # objects of the start live until the end: the collector need not visit them
        await stop.wait()
