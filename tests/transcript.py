"""Runs the console blocks of the documentation as they are.

Lines that begin with ``$ `` are commands, run one after the other in one shell that stops at the first failure. Each line below
a command must be in its output exactly, except for numbers (and their units of time and size), ids and the width of columns. ``…``
stands for anything.
"""

import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

_MARK = "--- transcript "

_VARIES = re.compile(
    r"(?P<id>\b(?=[0-9a-f]*\d)[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b|\b(?=[0-9a-f]*\d)[0-9a-f]{8}\b)"
    r"|(?P<number>(?<![A-Za-z\d])\d[\d.,:]*(?: (?:ms|s|KiB|MiB|GiB)\b)?)|(?P<space>\s+)|(?P<any>…)"
)
_PATTERNS = {
    "id": r"[0-9a-f-]{8,36}",
    "number": r"[\d.,:]+(?: (?:ms|s|KiB|MiB|GiB))?",
    "space": r"\s+",
    "any": r".*",
}


@dataclass(frozen=True)
class Step:
    command: str
    printed: tuple[str, ...]


def steps(text: str) -> Iterator[Step]:
    """Yield the commands of a document with their documented output."""
    for block in re.findall(r"^```console\n(.*?)^```", text, re.M | re.S):
        command: str = ""
        printed: list[str] = []
        for line in block.splitlines():
            if line.startswith("$ "):
                if command:
                    yield Step(command, tuple(printed))
                command, printed = line[2:], []
            else:
                printed.append(line)
        if command:
            yield Step(command, tuple(printed))


def run(document: Path, folder: Path, environment: Mapping[str, str], instead: Mapping[str, str] | None = None) -> None:
    """Run all commands of a document, after replacing in its text the keys of `instead` by their values. Raises AssertionError with
    the command that failed or printed something else.
    """
    text = document.read_text()
    for old, new in (instead or {}).items():
        text = text.replace(old, new)
    todo = list(steps(text))
    script = ["set -eo pipefail"]
    for number, step in enumerate(todo):
        script += [f"echo '{_MARK}{number}'", step.command]
    done = subprocess.run(
        ["bash", "-c", "\n".join(script)],
        cwd=folder,
        env={**os.environ, **environment, "PATH": f"{ROOT}/.venv/bin:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    outputs = re.split(rf"^{_MARK}(\d+)\n", done.stdout, flags=re.M)
    by_number = {int(outputs[i]): outputs[i + 1] for i in range(1, len(outputs), 2)}
    last = max(by_number, default=0)
    assert done.returncode == 0, f"{todo[last].command}\nended with {done.returncode}: {by_number.get(last)}{done.stderr}"
    for number, step in enumerate(todo):
        for line in step.printed:
            assert re.search(pattern(line), by_number[number]), f"{step.command}\ndid not print: {line}\nbut: {by_number[number]}"


def pattern(line: str) -> str:
    """Return a regular expression for the line in another run."""
    parts, at = [], 0
    for match in _VARIES.finditer(line.strip()):
        parts += [re.escape(line.strip()[at : match.start()]), _PATTERNS[str(match.lastgroup)]]
        at = match.end()
    return "".join([*parts, re.escape(line.strip()[at:])])
