"""agent.migration.fencing: the command of the site, run once per host."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest

import agent.migration.fencing
from agent.migration.fencing import Fences, FencingConfig, fence
from tests.unit.asking import until


def shell(script: str, directory: Path, *, after: float = 1.0, timeout: float = 10.0) -> FencingConfig:
    """A command that runs a script with $0 the directory and $1 the host."""
    return FencingConfig(command=("/bin/sh", "-c", script, str(directory)), after_seconds=after, timeout_seconds=timeout)


def silent(seconds: float) -> Callable[[], float]:
    return lambda: seconds


async def test_6_12_one_command_at_a_time_for_a_host_and_one_result_for_all(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "go")
    fences = Fences(shell('echo "$1" >> "$0/runs"; cat "$0/go"', tmp_path))
    waiting = [asyncio.create_task(fences.dead("h2", silent(seconds))) for seconds in (5.0, 0.0, 0.5, 2.0)]
    other = asyncio.create_task(fences.dead("h3", silent(5.0)))
    runs = tmp_path / "runs"
    await until(lambda: runs.exists() and sorted(runs.read_text().split()) == ["h2", "h3"])
    late = asyncio.create_task(fences.dead("h2", silent(9.0)))
    await asyncio.sleep(0)
    other.cancel()
    await asyncio.wait({other})
    (tmp_path / "go").write_text("pulled")
    results = await asyncio.wait_for(asyncio.gather(*waiting, late), 5)
    assert set(results) == {"the fencing command ended with status 0: pulled"}
    assert sorted(runs.read_text().split()) == ["h2", "h3"]


async def test_6_12_the_command_ends_with_the_last_migration_that_waits_for_it(tmp_path: Path) -> None:
    fences = Fences(shell('echo $$ > "$0/pid"; sleep 60 & echo $! > "$0/child"; wait', tmp_path))
    one, two = [asyncio.create_task(fences.dead("h2", silent(5.0))) for _ in range(2)]
    await until(lambda: (tmp_path / "child").exists() and (tmp_path / "child").read_text().strip())
    group = int((tmp_path / "pid").read_text())
    one.cancel()
    await asyncio.wait({one})
    os.killpg(group, 0)
    two.cancel()
    await asyncio.wait({two})
    await until(lambda: _gone(int((tmp_path / "child").read_text())))
    assert _gone(group)


async def test_6_12_a_migration_that_comes_while_the_command_is_killed_starts_another_after_that(tmp_path: Path) -> None:
    fences = Fences(shell('echo x >> "$0/runs"; [ -e "$0/stop" ] || sleep 60', tmp_path))
    first = asyncio.create_task(fences.dead("h2", silent(5.0)))
    await until(lambda: (tmp_path / "runs").exists() and bool((tmp_path / "runs").read_text()))
    (tmp_path / "stop").touch()
    first.cancel()
    await asyncio.sleep(0)
    assert "status 0" in await asyncio.wait_for(fences.dead("h2", silent(5.0)), 5)
    assert (tmp_path / "runs").read_text().split() == ["x", "x"]


async def test_6_12_a_migration_that_goes_away_in_a_hurry_leaves_no_command_behind(tmp_path: Path) -> None:
    """It is cancelled again while the command is being killed, as when a silent host answers and falls silent again."""
    fences = Fences(shell('echo x >> "$0/runs"; [ -e "$0/stop" ] || sleep 60', tmp_path))
    first = asyncio.create_task(fences.dead("h2", silent(5.0)))
    await until(lambda: (tmp_path / "runs").exists() and bool((tmp_path / "runs").read_text()))
    (tmp_path / "stop").touch()
    first.cancel()
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait({first})
    assert "status 0" in await asyncio.wait_for(fences.dead("h2", silent(5.0)), 5)


async def test_6_12_the_output_is_bounded(tmp_path: Path) -> None:
    said = await fence(shell("head -c 20000000 /dev/zero | tr '\\0' x; echo; echo last words", tmp_path), "h2")
    assert said is not None
    assert said.endswith("last words")
    assert len(said) < 400


async def test_6_12_output_that_a_process_left_behind_keeps_open_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent.migration.fencing, "_LAST_OUTPUT_SECONDS", 0.1)
    said = await asyncio.wait_for(fence(shell('sleep 5 & echo $! > "$0/pid"; echo pulled', tmp_path), "h2"), 3)
    os.kill(int((tmp_path / "pid").read_text()), 9)
    assert said == "the fencing command ended with status 0: pulled"


@pytest.mark.parametrize(("script", "timeout"), [("exit 3", 10.0), ("sleep 60", 1.0)])
async def test_a_command_that_fails_or_takes_too_long_says_nothing(tmp_path: Path, script: str, timeout: float) -> None:
    assert await fence(shell(script, tmp_path, timeout=timeout), "h2") is None


async def test_a_command_that_does_not_exist_says_nothing() -> None:
    assert await fence(FencingConfig(command=("/nowhere/fence",)), "h2") is None


def _gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
