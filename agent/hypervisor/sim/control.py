"""What the users of simulated guests do to them from outside of the agent's process, as `virsh` does for libvirt.

One request for each connection, a line of JSON: ``{"start": a SimGuest}``, ``{"end": UUID}`` or ``{"save": UUID}``. The answer is a
line: empty when it is done, else why not.
"""

import asyncio
import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from agent.hypervisor.base import HypervisorError
from agent.hypervisor.sim.config import Base, SimGuest
from agent.hypervisor.sim.guest import Definition
from agent.hypervisor.sim.host import Host

SECONDS = 10.0
"""For a request and its answer."""


class Request(Base, kw_only=True, frozen=True):
    start: SimGuest | None = None
    end: str = ""
    """The guest's UUID."""
    save: str = ""
    """The UUID of a guest whose memory is saved."""


async def serve(host: Host) -> asyncio.Server:
    """Until the server is closed."""

    async def obey(line: bytes) -> str:
        try:
            request = msgspec.json.decode(line, type=Request)
            if request.start is not None:
                host.create(Definition.of(request.start))
                host.save()
            if request.end:
                await host.end(request.end)
            if request.save:
                host.save_memory(request.save)
        except (msgspec.DecodeError, HypervisorError) as error:
            return str(error)
        return ""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(SECONDS):
                answer = await obey(await reader.readline())
                writer.write(answer.replace("\n", " ").encode() + b"\n")
                await writer.drain()
        except (OSError, TimeoutError):
            return  # whoever asked is gone
        finally:
            writer.close()

    server = await asyncio.start_unix_server(answer, host.config.control_path)
    os.chmod(host.config.control_path, 0o600)
    return server


def ask(path: Path, request: Mapping[str, Any]) -> None:
    """Have a simulated host do it. Blocks. Raises RuntimeError with its reason where it does not."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(SECONDS)
        connection.connect(str(path))
        connection.sendall(json.dumps(request).encode() + b"\n")
        with connection.makefile("rb") as file:
            answer = file.readline()
    if answer != b"\n":
        raise RuntimeError(f"{path}: {answer.decode().strip() or 'no answer'}")
