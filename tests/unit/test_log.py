"""Issue 6, line 23: no peer can write a line into a daemon's log."""

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.runtime.stray_output import MAX_LINE, MAX_LINES
from tests.transcript import ROOT

FORGED = {"event": "the guest runs on h2", "level": "info"}
DEBUG_TEXT = b"\n" + json.dumps(FORGED).encode() + b"\x1b[2J\n"


def frame(kind: int, payload: bytes) -> bytes:
    """Return a frame of HTTP/2 on stream 0."""
    return struct.pack(">I", len(payload))[1:] + bytes([kind, 0]) + struct.pack(">I", 0) + payload


GOAWAYS = b"".join(frame(7, struct.pack(">II", 0, 11) + DEBUG_TEXT) for _ in range(200))
SETTINGS = frame(4, b"")
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


class RawServer:
    """Answers every connection with GOAWAY frames that hold a text of its own."""

    def __enter__(self) -> "RawServer":
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"
        self.answered = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        return self

    def _serve(self) -> None:
        while True:
            try:
                peer, _ = self._socket.accept()
            except OSError:
                return
            with peer:
                peer.sendall(SETTINGS + GOAWAYS)
                peer.settimeout(1)
                while _received(peer):
                    pass
            self.answered.release()

    def __exit__(self, *_: object) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(5)


def _received(peer: socket.socket) -> bytes:
    try:
        return peer.recv(65536)
    except OSError:
        return b""


@pytest.fixture(name="server")
def _server() -> Iterator[RawServer]:
    with RawServer() as server:
        yield server


def lines_of(log: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in log.splitlines()]
    assert all(isinstance(line, dict) and "timestamp" in line for line in lines)
    return lines


@pytest.mark.parametrize("verbosity", ["INFO", ""], ids=["all that gRPC says", "as it is"])
def test_6_23_a_raw_peer_writes_no_line_of_its_own(server: RawServer, tmp_path: Path, verbosity: str) -> None:
    config = tmp_path / "agent.toml"
    config.write_text(
        f'name = "h1"\nlisten = ["unix:{tmp_path}/a.sock", "127.0.0.1:0"]\nstate_dir = "{tmp_path}/state"\nhypervisor = "sim"\n'
        f'coordinator = "{server.address}"\nallow_insecure_tcp = true\n[[networks]]\nname = "m"\naddress = "127.0.0.1"\n'
    )
    environment = {key: value for key, value in os.environ.items() if key != "GRPC_VERBOSITY"}
    agent = subprocess.Popen(
        [str(ROOT / ".venv/bin/drover"), "agent", "--config", str(config)],
        stderr=subprocess.PIPE,
        text=True,
        env={**environment, **({"GRPC_VERBOSITY": verbosity} if verbosity else {})},
    )
    try:
        assert agent.stderr is not None
        first = ""
        while "serving" not in first:
            first += agent.stderr.readline()
            assert agent.poll() is None, first
        (serving,) = [line for line in lines_of(first) if line["event"] == "serving"]
        host, _, port = serving["addresses"][1].rpartition(":")
        for _ in range(5):
            with socket.create_connection((host, int(port)), timeout=5) as peer:
                peer.sendall(PREFACE + SETTINGS + GOAWAYS)
                peer.shutdown(socket.SHUT_WR)
                peer.settimeout(2)
                while _received(peer):
                    pass
        for _ in range(2):
            assert server.answered.acquire(timeout=20)
    finally:
        agent.send_signal(signal.SIGTERM)
        log = first + agent.communicate(timeout=20)[1]
    lines = lines_of(log)
    assert not [line for line in lines if line["event"] == FORGED["event"]]
    assert [line["change"] for line in lines if line["event"] == "host"] == ["stopping"], "events are written to the last"
    assert "\x1b" not in log
    assert len(log) < 60_000
    output = [line for line in lines if line["event"] == "library output"]
    assert len(output) <= 3 * MAX_LINES
    assert bool(output) == bool(verbosity), "the raw peer did reach gRPC's log"


SCRIPT = """
import logging, os, sys
from agent.runtime.log import logging_to_stderr
import structlog
with logging_to_stderr():
    os.write(2, b'{"event": "forged"}\\x1b[31m\\n' + b"x" * 5000 + b"\\n")
    for number in range(5000):
        try:
            os.write(2, b"line %d\\n" % number)
        except BlockingIOError:
            pass
    logging.getLogger("grpc").error("broken\\n%s", "thing")
    structlog.get_logger().info("own")
    print("no newline", end="", file=sys.stderr)
print("plain again", file=sys.stderr)
"""


def test_6_23_what_goes_past_the_log_is_a_value_bounded_and_limited() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=30, check=True)
    *logged, last = done.stderr.splitlines()
    assert last == "plain again"
    lines = lines_of("\n".join(logged))
    texts = [line["text"] for line in lines if line["event"] == "library output"]
    assert texts[0] == '{"event": "forged"}\\x1b[31m'
    assert texts[1] == "x" * MAX_LINE + "…"
    assert len(texts) == MAX_LINES
    (left_out,) = [line["lines_left_out"] for line in lines if line["event"] == "too much library output"]
    assert left_out > 10
    (message,) = [line for line in lines if line["event"] == "library message"]
    assert (message["logger"], message["text"]) == ("grpc", "broken\nthing")
    assert [line for line in lines if line["event"] == "own"]
