"""Daemon threads for calls that block.

Not asyncio's default executor: it has few threads (6 on 2 cores), one Perform each would fill it, and it is joined when
the process ends, so that a transfer of an hour would keep the agent from stopping. These threads are made when none is
idle, are used again, end after `IDLE_SECONDS` without work, and die with the process: libvirtd goes on by itself then.
Their number is bounded by the callers: one for each migration's phase, and `connection.CONNECTIONS` and `OPENINGS`.
"""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from agent.hypervisor.base import HypervisorUnavailable

T = TypeVar("T")

IDLE_SECONDS = 30.0
"""An idle thread ends after so long. Long enough to serve the next phase of a migration, short enough to be forgotten."""

_Job = Callable[[], None]
_jobs: "queue.SimpleQueue[_Job]" = queue.SimpleQueue()
_idle = threading.Semaphore(0)  # one token for each thread that waits for a job


def submit(function: Callable[[], T]) -> "Future[T]":
    """Run `function` in a thread of its own for as long as it lasts; once it runs, it cannot be cancelled. Where no thread can be
    had, it never runs and the future has `HypervisorUnavailable`.
    """
    future: Future[T] = Future()

    def job() -> None:
        if not future.set_running_or_notify_cancel():
            return  # nobody wants it any more
        try:
            result = function()
        except BaseException as error:  # handed to whoever waits
            future.set_exception(error)
        else:
            future.set_result(result)

    if not _idle.acquire(blocking=False):
        try:
            threading.Thread(target=_work, name="libvirt-call", daemon=True).start()
        except RuntimeError as error:
            future.set_exception(HypervisorUnavailable(f"this host gives the agent no thread for the call: {error}"))
            return future
    _jobs.put(job)  # only now is there a thread that will take it
    return future


def _work() -> None:
    while True:
        try:
            job = _jobs.get(timeout=IDLE_SECONDS)
        except queue.Empty:
            # Leave only with a token: without one, a job that counts on this thread is on its way.
            if _idle.acquire(blocking=False):
                return
            continue
        job()
        del job  # what it captured (a domain, a connection) must not live until the next job
        _idle.release()
