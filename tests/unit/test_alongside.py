"""agent.runtime.alongside: work that goes on when its caller goes away."""

import asyncio
import gc

import pytest
from structlog.testing import capture_logs

from agent.runtime.alongside import outlasting
from agent.runtime.errors import DroverError, Reason

MISTAKE = DroverError(Reason.WRONG_PHASE, "not now")


@pytest.mark.parametrize(("error", "logged"), [(None, []), (MISTAKE, []), (ValueError("a bug"), ["unexpected error (bug)"])])
async def test_6_29_work_outlasts_its_caller_and_only_a_bug_is_logged(error: Exception | None, logged: list[str]) -> None:
    unheard: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unheard.append(context))
    goes_on, ended = asyncio.Event(), asyncio.Event()

    async def work() -> str:
        try:
            await goes_on.wait()
            if error is not None:
                raise error
            return "done"
        finally:
            ended.set()

    caller = asyncio.create_task(outlasting(work()))
    await asyncio.sleep(0)
    caller.cancel()
    await asyncio.wait({caller})
    assert (caller.cancelled(), ended.is_set()) == (True, False)
    with capture_logs() as logs:
        goes_on.set()
        await ended.wait()
        await asyncio.sleep(0)
        gc.collect()
    assert ([line["event"] for line in logs], unheard) == (logged, [])

    call = outlasting(work())
    if error is None:
        assert await call == "done"
    else:
        with pytest.raises(type(error)):
            await call
