"""`python -m tests.model`: its output and its exit status."""

import pytest

from tests.model.__main__ import main


def test_a_good_world_ends_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["no_fault"]) == 0
    out = capsys.readouterr().out
    assert "1 worlds, each whole" in out
    assert "all good" in out


def test_a_broken_world_is_an_error_and_shows_the_way_to_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["no_fault", "cancel_resumes"]) == 1
    out = capsys.readouterr().out
    assert "1 broken" in out
    assert "the source resumes only on GONE  (world cancel_resumes)" in out
    assert "the beginning" in out


def test_a_limit_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["no_fault", "--states", "100"]) == 0
    assert "not each whole: 100 states" in capsys.readouterr().out


def test_a_world_that_there_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nowhere"]) == 2
    assert "no world is called nowhere" in capsys.readouterr().err
