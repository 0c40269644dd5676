"""Control socket: lets the users of simulated guests act on them from outside the agent's process, as `virsh` does with libvirt.

Each connection carries one request, a line of JSON: ``{"start": a SimGuest}``, ``{"end": UUID}``, ``{"save": UUID}`` or
``{"links": {"mig1": false}}``, which takes interfaces down or up. The answer is a line: empty on success, else the reason of the
failure.
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
from agent.hypervisor.sim.definition import Definition
from agent.hypervisor.sim.host import Host

SECONDS = 10.0
"""Most seconds for a request and its answer."""


class Request(Base, kw_only=True, frozen=True):
    start: SimGuest | None = None
    end: str = ""
    """The guest's UUID."""
    save: str = ""
    """The UUID of a guest whose memory is to be saved."""
    links: dict[str, bool] = msgspec.field(default_factory=dict)
    """By the name of an interface: whether it is up."""


async def serve(host: Host) -> asyncio.Server:
    """Serve requests at `control_path` until the returned server is closed."""

    async def execute(line: bytes) -> str:
        try:
            request = msgspec.json.decode(line, type=Request)
            if request.start is not None:
                host.create(Definition.of(request.start))
                host.save()
            if request.end:
                await host.end(request.end)
            host.set_links(request.links)
            if request.save:
                host.save_memory(request.save)
        except (msgspec.DecodeError, HypervisorError) as error:
            return str(error)
        return ""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(SECONDS):
                answer = await execute(await reader.readline())
                writer.write(answer.replace("\n", " ").encode() + b"\n")
                await writer.drain()
        except (OSError, TimeoutError):
            return  # the client is gone
        finally:
            writer.close()

    server = await asyncio.start_unix_server(answer, host.config.control_path)
    os.chmod(host.config.control_path, 0o600)
    return server


def ask(path: Path, request: Mapping[str, Any]) -> None:
    """Send a request to the control socket of a simulated host. Blocks. Raises RuntimeError with the reason where it fails."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(SECONDS)
        connection.connect(str(path))
        connection.sendall(json.dumps(request).encode() + b"\n")
        with connection.makefile("rb") as file:
            answer = file.readline()
    if answer != b"\n":
        raise RuntimeError(f"{path}: {answer.decode().strip() or 'no answer'}")
