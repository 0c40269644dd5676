"""A command of the site that makes sure that a host is dead (pulls its power), for a host that never comes back.

It is run with the host's name as its last argument; exit status 0 means that the host is dead for certain. Its word is then
recorded like an operator's. Anything else changes nothing, and it is run again after the same time.
"""

import asyncio
from typing import Annotated, Final

import msgspec
import structlog

log = structlog.get_logger()

_OUTPUT_BYTES: Final = 300
"""Of what the command prints, for the record."""


class FencingConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[fencing]``"""

    command: Annotated[tuple[str, ...], msgspec.Meta(min_length=1, max_length=64)]
    """Program and arguments; the host's name comes last."""
    after_seconds: Annotated[float, msgspec.Meta(ge=1, le=86_400)] = 60
    """How long the outcome of a migration must have been unknown."""
    timeout_seconds: Annotated[float, msgspec.Meta(ge=1, le=3600)] = 60
    """A command that takes longer is killed, and counts as failed."""


async def fence(config: FencingConfig, host: str) -> str | None:
    """Run the command. What to record when the host is dead for certain, else None."""
    log.warning("fencing", host=host, command=config.command[0])
    try:
        process = await asyncio.create_subprocess_exec(
            *config.command, host, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
    except OSError as error:
        log.error("the fencing command cannot be run", host=host, error=str(error))
        return None
    try:
        async with asyncio.timeout(config.timeout_seconds):
            output, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        log.error("the fencing command took too long", host=host, seconds=config.timeout_seconds)
        return None
    said = output[-_OUTPUT_BYTES:].decode(errors="replace").strip()
    log.warning("fenced" if process.returncode == 0 else "not fenced", host=host, status=process.returncode, output=said)
    return f"the fencing command ended with status 0: {said}" if process.returncode == 0 else None
