"""The command ``drover`` against the fake servers of `tests.unit.fake_server`, for the tests of the command line."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from coordinator.cli import main

UUID = "0b6f3c1e-8f0a-4c57-9a53-1f5d2f0c9a11"
HEED = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
"""Restores SIGINT, which is ignored in tests in the background of a shell and so in their children. Runs in the child's own program,
because code between fork and exec fails with the threads of gRPC here."""
DROVER = (sys.executable, "-c", HEED + "from coordinator.cli import run; run()")


@contextmanager
def serving(directory: Path) -> Iterator[subprocess.Popen[str]]:
    """Run a fake coordinator and a fake agent in another process, as the command runs its own event loop."""
    program = Path(__file__).with_name("fake_server.py")
    with subprocess.Popen([sys.executable, program, directory], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


class Drover:
    """The command ``drover``, run in this process."""

    def __init__(self, server: str) -> None:
        self.server = server

    def __call__(self, *args: str, code: int = 0) -> Result:
        result = CliRunner().invoke(main, args, prog_name="drover", env={"DROVER_SERVER": self.server})
        assert result.exit_code == code, result.output
        return result

    def json(self, *args: str, code: int = 0) -> Any:
        return json.loads(self(*args, "-o", "json", code=code).stdout)


def start(drover: Drover, guest: str) -> str:
    return str(drover.json("migrate", guest, "--to", "b", "--detach")["migration_id"])
