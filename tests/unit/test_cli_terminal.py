"""``drover`` on a terminal, with Ctrl-C, and with an output that was closed."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import time

import pytest

from tests.unit.running_drover import DROVER, UUID, Drover, start


def resolving(drover: Drover, *args: str) -> tuple[str, ...]:
    return ("migration", "resolve", start(drover, "lost"), "--assume-dead", "b", "--reason", "ticket 4711", *args)


def test_what_was_resolved_is_done(drover: Drover) -> None:
    out = drover(*resolving(drover, "--yes")).stdout
    assert '"lost" runs on a; b was declared dead' in out
    assert 'If b comes back, its agent pauses or removes its copy of "lost"' in out
    assert drover.json(*resolving(drover, "--yes"))["runs_on"] == "a"


def test_nobody_to_ask_is_a_usage_error(drover: Drover) -> None:
    assert "add --yes" in drover(*resolving(drover), code=2).stderr
    assert "add --yes" in json.loads(drover(*resolving(drover, "-o", "json"), code=2).stderr)["error"]["message"]


@pytest.mark.parametrize(("answer", "code"), [("y\n", 0), ("n\n", 130), ("\x04", 130), ("", 130)])
def test_an_operator_is_asked(drover: Drover, answer: str, code: int) -> None:
    args = [*DROVER, "--server", drover.server, *resolving(drover)]
    parent, child = pty.openpty()
    with subprocess.Popen(args, stdin=child, stdout=child, stderr=child) as process:
        os.close(child)
        screen = _read_until(parent, "[y/N]")
        if answer:
            os.write(parent, answer.encode())
        else:
            time.sleep(0.3)  # the prompt is there a moment before Python waits for the answer
            process.send_signal(signal.SIGINT)
        screen += _read_until(parent, "never start it" if code == 0 else "Nothing was stated about b")
        assert process.wait(10) == code
    os.close(parent)
    assert "Aborted!" not in screen


def test_ctrl_c_ends_the_watching_and_not_the_migration(drover: Drover) -> None:
    args = [*DROVER, "--server", drover.server, "migrate", "long", "--to", "b", "--id", UUID[:-1] + "7"]
    with subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        while "perform" not in process.stdout.readline():
            pass
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        text = process.stderr.read()
    assert "the migration goes on" in text
    assert f"drover --server {drover.server} migration cancel {UUID[:-1]}7" in text
    assert "Traceback" not in text
    assert drover.json("migration", "show", UUID[:-1] + "7")["state"] == "MIGRATION_STATE_ACTIVE"
    drover("migration", "cancel", UUID[:-1] + "7")


def test_output_that_nobody_reads_ends_quietly(drover: Drover) -> None:
    for args in (["migration", "list", "-o", "json"], ["migrate", "long", "--to", "b", "--id", UUID[:-1] + "8"]):
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run([*DROVER, *args], stdout=writer, stderr=subprocess.PIPE, text=True, check=False, timeout=20,
                              env={**os.environ, "DROVER_SERVER": drover.server})  # fmt: skip
        os.close(writer)
        assert (done.returncode, done.stderr) == (141, "")
    drover("migration", "cancel", UUID[:-1] + "8")


def test_ctrl_c_in_json(drover: Drover) -> None:
    args = [*DROVER, "--server", drover.server, "migration", "watch", start(drover, "long"), "-o", "json"]
    with subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        while "PERFORM" not in process.stdout.readline().upper():
            pass
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        error = json.loads(process.stderr.read())["error"]
    assert (error["exit_code"], error["migration_id"]) == (130, args[-3])
    drover("migration", "cancel", args[-3])


def test_a_terminal_gets_a_live_line(drover: Drover) -> None:
    migration_id = start(drover, "long")
    parent, child = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "50"}
    args = [*DROVER, "--server", drover.server, "migration", "watch", migration_id]
    with subprocess.Popen(args, stdout=child, stderr=child, env=env) as process:
        os.close(child)
        screen = _read_until(parent, "perform")
        drover("migration", "cancel", migration_id)
        screen += _read_until(parent, "next:")
        assert process.wait(10) == 1
    os.close(parent)
    assert "\x1b[?25l" in screen  # the cursor is hidden, and comes back
    assert "\x1b[?25h" in screen
    assert "cancelled" in screen
    lines = [line for line in re.split(r"[\r\n]+|\x1b\[[0-9;?]*[A-Za-z]", screen) if "long: perform" in line]
    assert lines
    assert all(len(line) <= 50 and line.endswith("…") for line in lines), lines  # one line, as more could not be updated in place


def _read_until(terminal: int, words: str) -> str:
    seen, end = "", time.monotonic() + 10
    while words not in seen:
        assert time.monotonic() < end, seen
        if select.select([terminal], [], [], 0.5)[0]:
            try:
                seen += os.read(terminal, 4096).decode(errors="replace")
            except OSError:  # the other end has closed it
                pytest.fail(seen)
    return seen
