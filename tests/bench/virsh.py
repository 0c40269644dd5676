"""`virsh migrate`, as a new process each time, or through a virsh that runs already."""

import os
import select
import subprocess
import time
from collections.abc import Sequence
from types import TracebackType
from typing import IO

from tests.kit.lab.errors import LabError, LabTimeoutError
from tests.kit.lab.hosts import Host

NETWORK = "mig1"
TIMEOUT = 60.0
"""Seconds for one migration."""


def migrate_words(guest: str, destination: Host, *, p2p: bool, post_copy: bool) -> list[str]:
    """Return the arguments of `virsh`. The flags are those that Drover gives to libvirt, so that all do the same.

    `p2p`: the source's libvirtd calls the destination's itself; else virsh calls the phases of both.
    """
    address = destination.addresses[NETWORK]
    flags = ["--live", "--persistent", "--undefinesource", "--change-protection"]
    flags += ["--p2p"] * p2p + ["--postcopy"] * post_copy
    return ["migrate", *flags, guest, destination.destination_uri, "--migrateuri", f"tcp://{address}", "--listen-address", address]


class Virsh:
    """A running virsh that reads its commands from a pipe, so that its start is not measured."""

    def __init__(self, host: Host) -> None:
        self._count = 0
        self._process = subprocess.Popen(
            ["virsh", "-q", "-c", host.libvirt_uri],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
        )

    def __enter__(self) -> "Virsh":
        self.run(["uri"])  # connects
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def run(self, words: Sequence[str]) -> None:
        """Run one command to its end. Raises `LabError` with virsh's error."""
        self._count += 1
        # virsh echoes its input; the quotes keep the mark itself out of the echo.
        mark = f"mark-{self._count};"
        _pipe(self._process.stdin).write(f"{' '.join(words)}; echo 'mark'-{self._count}';'\n".encode())
        output = self._read_until(mark.encode()).decode(errors="replace")
        errors = [line for line in output.splitlines() if line.startswith("error:")]
        if errors:
            raise LabError(f"virsh {words[0]}: {' '.join(errors)}")

    def _read_until(self, mark: bytes) -> bytes:
        output = _pipe(self._process.stdout)
        deadline = time.monotonic() + TIMEOUT
        received = b""
        while mark not in received:
            readable, _, _ = select.select([output], [], [], max(0.0, deadline - time.monotonic()))
            if not readable:
                raise LabTimeoutError(
                    f"virsh did not answer within {TIMEOUT:g} s; it wrote: {received.decode(errors='replace')[-500:]}"
                )
            data = os.read(output.fileno(), 65536)
            if not data:
                raise LabError(f"virsh ended; it wrote: {received.decode(errors='replace')[-500:]}")
            received += data
        return received


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None, "made with a pipe"
    return pipe
