"""Daemon threads for calls that block.

asyncio's default executor does not fit: it has few threads (6 on 2 cores), which a few Performs would use up, and it is
joined when the process ends, so that a transfer of an hour would keep the agent from stopping. These threads are started
when none is idle, are reused, end after `IDLE_SECONDS` without work, and die with the process, while libvirtd continues.
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
"""An idle thread ends after this time: long enough to serve the next phase of a migration, short enough not to pile up."""

_Job = Callable[[], None]
_jobs: "queue.SimpleQueue[_Job]" = queue.SimpleQueue()
_idle = threading.Semaphore(0)  # one token for each thread that waits for a job


def submit(function: Callable[[], T]) -> "Future[T]":
    """Run `function` in a thread that it has alone; once it runs, it cannot be cancelled. Where no thread can be started, it never
    runs and the future has `HypervisorUnavailable`.
    """
    future: Future[T] = Future()

    def job() -> None:
        if not future.set_running_or_notify_cancel():
            return  # cancelled before it started
        try:
            result = function()
        except BaseException as error:  # the waiter gets it
            future.set_exception(error)
        else:
            future.set_result(result)

    if not _idle.acquire(blocking=False):
        try:
            threading.Thread(target=_work, name="libvirt-call", daemon=True).start()
        except RuntimeError as error:
            future.set_exception(HypervisorUnavailable(f"the agent could not start a thread for the call to libvirt: {error}"))
            return future
    _jobs.put(job)  # only now is there a thread that will take it
    return future


def _work() -> None:
    while True:
        try:
            job = _jobs.get(timeout=IDLE_SECONDS)
        except queue.Empty:
            # End only with a token: without one, a submitter has taken this thread's token and is about to queue a job for it.
            if _idle.acquire(blocking=False):
                return
            continue
        job()
        del job  # frees what it captured (a domain, a connection) before the next job
        _idle.release()
