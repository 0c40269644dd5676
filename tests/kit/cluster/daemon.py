"""One process of Drover that tests start with a configuration file, kill and start again."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.kit.lab.processes import wait_until

DROVER = Path(sys.executable).with_name("drover")

Popen = Callable[..., subprocess.Popen[Any]]


class Daemon:
    """A `drover agent` or `drover coordinator`. `popen` starts a program on the daemon's test host."""

    def __init__(self, kind: str, name: str, folder: Path, config: Mapping[str, Any], popen: Popen) -> None:
        self.kind = kind
        self.name = name
        self.folder = folder
        self.config = folder / f"{name}.toml"
        self.log = folder / f"{name}.log"
        self.socket = folder / f"{name}.sock"
        self.environment: dict[str, str] = {}
        self.process: subprocess.Popen[Any] | None = None
        self._popen = popen
        folder.mkdir(parents=True, exist_ok=True)
        self.config.write_text(to_toml(config))

    @property
    def address(self) -> str:
        """A unix socket, which can be reached from every network namespace of the machine."""
        return f"unix:{self.socket}"

    def start(self, *, wait: bool = True) -> None:
        self._mark = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            self.process = self._popen(
                [str(DROVER), self.kind, "--config", str(self.config)],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **self.environment},
            )
        if wait:
            self.wait_serving()

    def wait_serving(self, timeout: float = 120.0) -> None:
        """Wait until its log says that it serves. Raises RuntimeError, with the end of its log, if it ends instead."""
        wait_until(self._serving, timeout, f"{self.kind} {self.name} to serve (its log: {self.log})")

    def _serving(self) -> bool:
        process = self.running()
        if process.poll() is not None:
            raise RuntimeError(f"{self.kind} {self.name} ended with status {process.returncode}:\n{self.tail()}")
        return any(line.get("event") == "serving" for line in self.lines(self._mark))

    def lines(self, offset: int = 0) -> list[dict[str, Any]]:
        """Return the log's lines from byte `offset` on, without lines that are not JSON (a traceback of the interpreter)."""
        with self.log.open("rb") as log:
            log.seek(offset)
            parsed = []
            for line in log.read().splitlines():
                try:
                    parsed.append(json.loads(line))
                except ValueError:
                    continue
            return parsed

    def tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-20:])

    def running(self) -> subprocess.Popen[Any]:
        if self.process is None:
            raise RuntimeError(f"{self.kind} {self.name} was not started")
        return self.process

    def signal(self, number: signal.Signals) -> None:
        self.running().send_signal(number)

    def kill(self) -> None:
        """Kill it with SIGKILL, as a crash would."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(timeout=10)

    def stop(self, timeout: float = 30.0) -> int:
        """Stop it with SIGTERM, as an upgrade would, and wait for its end. Return the exit status."""
        if self.process is None:
            return 0
        self.process.send_signal(signal.SIGCONT)
        self.process.terminate()
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def restart(self) -> None:
        self.stop()
        self.start()


def to_toml(table: Mapping[str, Any]) -> str:
    """Return a configuration as TOML: tables, arrays of tables, and values (JSON's values are TOML's, except null)."""
    return "\n".join(_lines(table, ())) + "\n"


def _lines(table: Mapping[str, Any], path: Sequence[str]) -> list[str]:
    plain = {k: v for k, v in table.items() if not isinstance(v, Mapping) and not _is_tables(v)}
    lines = [f"{_key(k)} = {_value(v)}" for k, v in plain.items()]
    for key, value in table.items():
        if key in plain:
            continue
        name = ".".join(map(_key, (*path, key)))
        for item in value if _is_tables(value) else [value]:
            lines += [f"[[{name}]]" if _is_tables(value) else f"[{name}]", *_lines(item, (*path, key))]
    return lines


def _is_tables(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def _key(key: str) -> str:
    return key if key.replace("_", "").replace("-", "").isalnum() else json.dumps(key)


def _value(value: Any) -> str:
    return json.dumps(value)
